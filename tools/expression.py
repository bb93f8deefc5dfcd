"""Patterns written as text, for the command line: `window(256) | global_tokens([0, 7])`.

The text is parsed as a Python expression and walked; it is never evaluated. Known are the names of
mixgrain.patterns (with or without `P.` before them), `|` `&` `~` `-`, numbers, lists, `inf`, and
`range(...)` where a constructor takes positions.
"""

from __future__ import annotations

import ast
import difflib
import math
import warnings
from typing import Any, NoReturn

from mixgrain.formats import patterns
from mixgrain.formats.errors import MixgrainError
from mixgrain.formats.pattern import Pattern

LONGEST = 10_000
LONGEST_RANGE = 1 << 24


class ExpressionError(MixgrainError, ValueError):
    """Text that is not a pattern; says where and what is known."""


def parse(text: str) -> Pattern:
    """The pattern that a text stands for.

    Args:
        text: e.g. `causal() & window(256)`; at most 10,000 characters.

    Raises:
        ExpressionError: the text is no such expression, or a constructor refuses its arguments.
    """
    if len(text) > LONGEST:
        raise ExpressionError(f"{len(text)} characters given, at most {LONGEST} expected")
    try:
        with warnings.catch_warnings():  # of literals that are errors here in any case
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval")
        found = _Reader(text.strip()).read(tree.body)
    except (SyntaxError, ValueError) as error:
        if isinstance(error, MixgrainError):
            raise
        raise ExpressionError(
            f"{_shorten(text)!r} is no expression ({_reason(error)}); "
            "expected e.g. 'window(256) | global_tokens([0, 7])'"
        ) from None
    except (RecursionError, MemoryError):
        raise ExpressionError("the expression nests too deeply; write it flatter") from None
    if not isinstance(found, Pattern):
        raise ExpressionError(
            f"{_shorten(text)!r} is a {type(found).__name__}, a pattern expected: 'window(9)', say"
        )
    return found


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, SyntaxError) else str(error)


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


class _Reader:
    """Turns the nodes of one expression into patterns and plain values."""

    def __init__(self, text: str) -> None:
        self.text = text

    def fail(self, node: ast.AST, message: str) -> NoReturn:
        piece = ast.get_source_segment(self.text, node) or type(node).__name__
        raise ExpressionError(f"{_shorten(piece)!r}: {message}")

    def read(self, node: ast.expr) -> Any:
        """The value of a node: a pattern, a number, a bool, None, a list or a range."""
        match node:
            case ast.Constant(value=bool() | int() | float() | None):
                return node.value
            case ast.List() | ast.Tuple():
                return [self.read(item) for item in node.elts]
            case ast.Name(id="inf") | ast.Attribute(value=ast.Name(id="math"), attr="inf"):
                return math.inf
            case ast.Call():
                return self.call(node)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = self.read(operand)
                if isinstance(value, int | float):
                    return -value
                self.fail(node, "'-' alone stands before numbers; write '~' for the complement")
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return self.apply(node, lambda: ~self.pattern(operand))
            case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd() | ast.Sub() as sign):
                a, b = self.pattern(left), self.pattern(node.right)
                if isinstance(sign, ast.BitOr):
                    return self.apply(node, lambda: a | b)
                if isinstance(sign, ast.BitAnd):
                    return self.apply(node, lambda: a & b)
                return self.apply(node, lambda: a - b)
            case ast.Name():
                self.fail(node, f"a name alone is no pattern; did you mean '{node.id}(…)'?")
            case _:
                self.fail(
                    node, "not known here; expected patterns, | & ~ -, numbers, lists and range(…)"
                )

    def pattern(self, node: ast.expr) -> Pattern:
        """The pattern that an operand stands for."""
        value = self.read(node)
        if not isinstance(value, Pattern):
            self.fail(node, "a pattern expected on both sides of | & - and behind ~")
        return value

    def call(self, node: ast.Call) -> Any:
        """The result of a constructor of mixgrain.patterns, or a range."""
        match node.func:
            case ast.Name(id=name) | ast.Attribute(value=ast.Name(id="P"), attr=name):
                pass
            case _:
                self.fail(node.func, "only the names of mixgrain.patterns can be called")
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                self.fail(argument, "write the arguments out, '*' is not known here")
        arguments = [self.read(argument) for argument in node.args]
        named: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                self.fail(keyword.value, "write the arguments out, '**' is not known here")
            named[keyword.arg] = self.read(keyword.value)
        if name == "range":
            return self.range(node, arguments, named)
        if name not in patterns.__all__:
            near = difflib.get_close_matches(name, patterns.__all__, 1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            self.fail(node.func, f"no such pattern; {hint}Known: {', '.join(patterns.__all__)}")
        return self.apply(node, lambda: getattr(patterns, name)(*arguments, **named))

    def range(self, node: ast.Call, arguments: list[Any], named: dict[str, Any]) -> range:
        """A range of positions, of bounded length."""
        whole = [value for value in arguments if type(value) is int]
        if named or len(whole) != len(arguments) or not 1 <= len(whole) <= 3 or whole[2:] == [0]:
            self.fail(node, "range takes one to three whole numbers, the step not 0")
        found = range(*whole)
        # len() itself overflows on ranges that no pattern could use.
        first, last, step = found.start, found.stop, found.step
        if abs(last - first) // abs(step) > LONGEST_RANGE:
            self.fail(node, f"more than {LONGEST_RANGE} positions; a pattern of runs is cheaper")
        return found

    def apply(self, node: ast.AST, make: Any) -> Any:
        """What `make` returns; its refusals become errors that name the node."""
        try:
            return make()
        except ExpressionError:
            raise
        except MixgrainError as error:
            raise ExpressionError(str(error)) from None
        except (TypeError, ValueError, OverflowError, RuntimeError, AttributeError) as error:
            self.fail(node, str(error))

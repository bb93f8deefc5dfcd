"""What tests replace is there: on a machine with a GPU it would be late to learn that it is not."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(
    path for path in TESTS.rglob("test_*.py") if "monkeypatch.setattr(" in path.read_text()
)


def imported(nodes: Iterable[ast.AST]) -> dict[str, object]:
    """The library's objects that are imported, by the names they are given."""
    found: dict[str, object] = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mixgrain":
            for alias in node.names:
                name = alias.asname or alias.name
                try:
                    found[name] = importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    found[name] = getattr(importlib.import_module(node.module or ""), alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "mixgrain":
                    module = importlib.import_module(alias.name)
                    top = module if alias.asname else importlib.import_module("mixgrain")
                    found[alias.asname or "mixgrain"] = top
    return found


def meant(node: ast.expr, known: dict[str, object]) -> object | None:
    """What an expression of names and attributes is; None if it is no object of the library.

    Raises:
        AttributeError: an object of the library does not have what is asked of it.
    """
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = meant(node.value, known)
        return None if owner is None else getattr(owner, node.attr)
    return None


def replaced(module: ast.Module) -> Iterator[tuple[object, str, int]]:
    """Each object of which a test replaces an attribute, the attribute and the line."""
    everywhere = imported(module.body)
    for tree in module.body:  # what a function imports is its own
        yield from replaced_in(tree, everywhere | imported(ast.walk(tree)))


def replaced_in(tree: ast.stmt, known: dict[str, object]) -> Iterator[tuple[object, str, int]]:
    """The same of one statement, where these names are known."""
    loops = [
        (node.target.id, node.iter.elts, {id(child) for child in ast.walk(node)})
        for node in ast.walk(tree)
        if isinstance(node, ast.For)
        and isinstance(node.target, ast.Name)
        and isinstance(node.iter, ast.Tuple)
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr != "setattr" or len(node.args) < 3:
            continue
        target, name = node.args[:2]
        if not isinstance(name, ast.Constant) or any(k.arg == "raising" for k in node.keywords):
            continue
        owners = [
            meant(owner, known)
            for variable, elements, inside in loops
            if isinstance(target, ast.Name) and target.id == variable and id(node) in inside
            for owner in elements
        ] or [meant(target, known)]
        yield from ((owner, str(name.value), node.lineno) for owner in owners if owner is not None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_tests_replace_is_there(path: Path) -> None:
    for owner, name, line in replaced(ast.parse(path.read_text())):
        where = f"{path.relative_to(TESTS)}:{line}"
        assert hasattr(owner, name), f"{where} replaces {name}, which {owner} does not have"


def test_names_are_found() -> None:
    """Through imports, attributes and loops; what is not the library's is left alone."""
    source = """
from mixgrain.primitives.cuda import tile, tile_mma as other
import mixgrain.cuda.launch
import torch

def test(monkeypatch):
    monkeypatch.setattr(tile, "CALL", 0)
    monkeypatch.setattr(mixgrain.cuda.launch, "nothing", 0)
    monkeypatch.setattr(torch, "float16", 0)
    for module in (tile, other):
        monkeypatch.setattr(module, "gone", 0)
"""
    found = [
        (owner.__name__.split(".")[-1], name) for owner, name, _ in replaced(ast.parse(source))
    ]
    gone = [("tile", "gone"), ("tile_mma", "gone")]
    assert found == [("tile", "CALL"), ("launch", "nothing"), *gone]
    missing = source.replace("mixgrain.cuda.launch, ", "mixgrain.cuda.launch.gone, ")
    with pytest.raises(AttributeError, match="gone"):
        list(replaced(ast.parse(missing)))

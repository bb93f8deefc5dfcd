"""The command line: `mixgrain demo`, `show`, `explain` and `bench`.

Nothing heavy is imported before a sub-command runs, so that `--help` answers at once. A user's
mistake ends with one line and status 2, never with a traceback; an interrupt with status 130.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mixgrain import __version__
from mixgrain.formats.errors import MixgrainError

PATTERN_HELP = (
    "an expression of the names of mixgrain.patterns, e.g. 'window(256) | global_tokens([0, 7])'"
)
LONGEST = 1 << 24


def whole(low: int, high: int) -> Callable[[str], int]:
    """A converter for argparse: a whole number from low to high."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r} given, a whole number from {low} to {high} expected"
            )
        return value

    return convert


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="mixgrain",
        description="Sparse attention and linear layers for PyTorch.",
        epilog="mixgrain COMMAND --help says more.",
    )
    top.add_argument("--version", action="version", version=f"mixgrain {__version__}")
    verbs = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = verbs.add_parser(
        "demo",
        help="run a small language model with sparse attention and sparse weights, and compare",
        description="Scores held-out files of this machine's Python library with a byte-level model"
        " under dense and sparse attention and with pruned weights; checks every sparse result"
        " against a dense one; prints a table and draws one picture. No network is used.",
    )
    demo.add_argument(
        "--contexts",
        type=whole(1, 4096),
        default=8,
        help="how many contexts of 2048 bytes to score (default: 8)",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("mixgrain-demo.png"),
        help="the picture (default: mixgrain-demo.png)",
    )
    demo.add_argument(
        "--threads", type=whole(1, 1024), help="CPU threads (default: what torch chooses)"
    )
    demo.set_defaults(run=_demo)

    show = verbs.add_parser(
        "show",
        help="draw a pattern as blocks, panels and single entries",
        description="Draws the kept positions of a pattern in the terminal and sums up how they lie"
        " in memory.",
    )
    show.add_argument("pattern", metavar="PATTERN", help=PATTERN_HELP)
    show.add_argument("--nq", type=whole(1, LONGEST), default=1024, help="queries (default: 1024)")
    show.add_argument("--nk", type=whole(1, LONGEST), help="keys (default: as many as queries)")
    show.add_argument(
        "--size",
        type=int,
        choices=(16, 32, 64, 128),
        default=64,
        help="side of the blocks (default: 64)",
    )
    show.add_argument("--png", type=Path, metavar="FILE", help="write a picture, too")
    show.set_defaults(run=_show)

    explain = verbs.add_parser(
        "explain",
        help="say what attention with a pattern would do and cost",
        description="Prints the plan of mixgrain.attend for a pattern: its parts, densities,"
        " padding and predicted times.",
    )
    explain.add_argument("pattern", metavar="PATTERN", help=PATTERN_HELP)
    explain.add_argument(
        "--n", type=whole(1, 1 << 20), default=4096, help="queries and keys (default: 4096)"
    )
    explain.add_argument(
        "--head-dim", type=whole(1, 256), default=64, help="features per head (default: 64)"
    )
    explain.set_defaults(run=_explain)

    bench = verbs.add_parser(
        "bench",
        help="measure mixgrain and what people use today on this machine's GPU",
        description="Device times of CUDA-graph replays, caches flushed, each row checked against"
        " float64 first.",
    )
    bench.add_argument(
        "ids", nargs="*", metavar="ID", help="benchmarks, e.g. 'spmm-row*' (default: all)"
    )
    bench.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    bench.set_defaults(run=_bench)
    return top


def _demo(options: argparse.Namespace) -> int:
    # Idle OpenMP threads then sleep instead of spinning: beside other work on the same cores that
    # is several times faster. Read when torch loads, so it must be set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .demo.run import run

    return run(contexts=options.contexts, out=options.out, threads=options.threads)


def _show(options: argparse.Namespace) -> int:
    from .expression import parse
    from .picture import check_drawable, draw, summary

    pattern = parse(options.pattern)
    nq, nk = options.nq, options.nk or options.nq
    check_drawable(pattern, nq, nk)
    layout = pattern.to_layout("mixed", nq, nk, size=options.size)
    print(pattern)
    print(draw(layout, plain=not _can_print("█▒│·×")))
    print(summary(layout))
    if options.png:
        from .plot import write_layout

        write_layout(options.png, layout, str(pattern))
        print(f"picture: {options.png}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    from mixgrain.attention.explain import explain

    from .expression import parse

    print(explain(parse(options.pattern), options.n, options.n, head_dim=options.head_dim))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from .bench.run import run

    return run(options.ids, options.out)


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        0 when it did what was asked, 1 when a check failed, 2 for a user's mistake, 130 when
        interrupted.
    """
    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its message, or the help
        return stop.code if isinstance(stop.code, int) else 2
    run: Callable[[argparse.Namespace], int] = options.run
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without × still gets its table
    try:
        status = run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("mixgrain: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MixgrainError, OSError) as error:
        print(f"mixgrain: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        print("mixgrain: this needs more memory than there is; ask for less", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

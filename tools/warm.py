"""`mixgrain warm`: compile kernels ahead of their first use, also for another machine's device."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from mixgrain.cuda.compile import ARCHITECTURES, Request, build, cache_folder
from mixgrain.cuda.errors import CompileError, CudaError
from mixgrain.formats.errors import BackendUnavailableError

DTYPES = ("float16", "bfloat16", "float32")
WIDTHS = (64, 128)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command."""
    parser.add_argument(
        "--arch",
        action="append",
        choices=ARCHITECTURES,
        help="architecture to compile for, more than once for several; that of the device here",
    )
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="of the tensors; all three by default"
    )
    parser.add_argument(
        "--width",
        action="append",
        type=int,
        help=f"head dimension or columns; {' and '.join(map(str, WIDTHS))} by default",
    )
    parser.add_argument(
        "--masks", action="store_true", help="with the kernels of calls that have a key mask, too"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)


def wanted(options: argparse.Namespace) -> list[tuple[Request, str]]:
    """What the options ask for: kernels and architectures.

    Raises:
        BackendUnavailableError: no architecture is given and there is no device.
    """
    import torch

    from mixgrain.primitives.cuda.requests import requests

    dtypes = [(getattr(torch, name),) * 2 for name in options.dtype or DTYPES]
    masks = (0, 1, 2) if options.masks else (0,)
    widths = options.width or WIDTHS
    return [
        (found, arch)
        for arch in options.arch or [_here()]
        for found in requests(arch, dtypes, widths, masks)
    ]


def _here() -> str:
    import torch

    from mixgrain.cuda.device import facts

    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            "warm: torch finds no CUDA device here; say for which architecture with --arch, one of "
            + ", ".join(ARCHITECTURES)
        )
    return facts(torch.cuda.current_device()).arch


def run(options: argparse.Namespace) -> int:
    """Compile what is not in the cache yet, in threads, and say how far it is.

    Returns:
        1 when a kernel did not compile, else 0.

    Raises:
        BackendUnavailableError: no device, NVRTC, CUDA headers, or cache folder.
    """
    try:
        todo = wanted(options)
        folder = cache_folder()
        begin = time.perf_counter()
        failed, done, compiled = 0, 0, 0
        live = sys.stderr.isatty()
        with ThreadPoolExecutor(max(1, options.threads)) as pool:
            jobs = {pool.submit(build, *item): item for item in todo}
            try:
                for job in as_completed(jobs):
                    done += 1
                    try:
                        compiled += bool(job.result().log)
                    except CompileError as error:
                        failed += 1
                        print(f"{jobs[job]}: {error}", file=sys.stderr)
                    if live:
                        print(f"\r{done} of {len(todo)} kernels", end="", file=sys.stderr)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if live:
            print(file=sys.stderr)
    except CompileError:
        raise
    except CudaError as error:
        raise BackendUnavailableError(f"warm: {error}") from error
    spent = time.perf_counter() - begin
    known = len(todo) - compiled - failed
    print(f"{compiled} kernels compiled in {spent:.1f} s, {known} were there, {failed} failed")
    print(f"in {folder}")
    return 1 if failed else 0

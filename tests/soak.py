"""Makes the ladder of a tiny model again and again in one process: memory and open files must not grow.

    python tests/soak.py --runs 50

Each run plans, smooths, rounds and tunes, or with --naive makes the presets by themselves, in a directory of its own.
The first runs fill caches that stay (imported modules, compiled kernels); memory is compared with that after them.
"""

import argparse
import gc
import pathlib
import resource
import shutil
import sys
import tempfile

import kills

from bitladder.ladder import run
from bitladder.report import write_card, write_report

WARM = 5  # runs that fill caches
GROWTH = 0.05  # of the memory after them


def open_files() -> int:
    """Handles that the process holds."""
    return len(list(pathlib.Path("/proc/self/fd").iterdir()))


def memory() -> int:
    """Bytes in memory."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def soak(folder: pathlib.Path, runs: int, changes: dict[str, object]) -> list[tuple[int, int]]:
    """Makes runs. Returns memory in bytes and the number of open files after each."""
    seen = []
    for number in range(runs):
        options = kills.tiny_run(folder, folder / f"out{number}").replace(**changes)
        run(options)
        write_card(options.out)
        write_report(options.out)
        shutil.rmtree(options.out)
        gc.collect()
        seen.append((memory(), open_files()))
        print(f"run {number + 1}: {seen[-1][0] / 1e6:.1f} MB, {seen[-1][1]} open files", flush=True)
    return seen


def main() -> int:
    """Parses the command line and soaks."""
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--runs", type=int, default=50)
    parse.add_argument("--naive", action="store_true", help="presets by themselves, which take a second each")
    options = parse.parse_args()
    changes: dict[str, object] = {"mode": "naive", "method": "stock", "smooth": False} if options.naive else {}
    with tempfile.TemporaryDirectory() as folder:
        seen = soak(pathlib.Path(folder), options.runs, changes)
    (before, files_before), (after, files_after) = seen[min(WARM, len(seen)) - 1], seen[-1]
    growth = after / before - 1
    print(f"{options.runs} runs: memory {growth:+.1%} since run {WARM}, open files {files_after - files_before:+d}")
    return int(growth > GROWTH or files_after > files_before)


if __name__ == "__main__":
    sys.exit(main())

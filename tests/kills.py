"""Kills a run again and again and continues it, until the directory must be that of a run that nobody disturbed.

    python tests/kills.py --kills 100 --seed 7

A tiny model is made. Its run plans, smooths, rounds and tunes, in some seconds. After an undisturbed run each attempt
is a process of its own. SIGKILL ends its process group at a random time, or ends it before a random operation on the
directory, so that moments of microseconds are met too. The next attempt continues. When an attempt reaches its end,
every file is compared with the undisturbed run's, and a new directory begins.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import os
import pathlib
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import tiny_models

import bitladder
from bitladder.calibrate import UnfinishedWork
from bitladder.ladder import RunOptions, run
from bitladder.options import build
from bitladder.plan import PlanOptions
from bitladder.report import write_card, write_report
from bitladder.rundir import Layout, load_manifest
from bitladder.text import builtin_text

# What Python's audit says before an operation on a file.
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.chmod")


def tiny_run(folder: pathlib.Path, out: pathlib.Path, method: str = "feedback") -> RunOptions:
    """Options of a run with every kind of step but `bench`, whose figures are times.

    Parameters:
        folder: where the model and the texts lie. They are made if they are not there.
        out: the run directory.
        method: of rounding.
    """
    model, texts = folder / "model", (folder / "calibration.txt", folder / "text.txt")
    if not model.exists():
        wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "initializer_range": 0.1}
        tiny_models.llama(model, dtype="bfloat16", **wide)
        tiny_models.train_byte_level(model)
        for path, start, end in zip(texts, (0, 20_000), (8_000, 24_000), strict=True):
            path.write_text(builtin_text("calibration")[start:end])
    few = {"probe_tokens": 2000, "check_pairs": 3, "rounds": 1, "random_recipes": 1, "exchanges": 1, "finalists": 1}
    planning = build(PlanOptions, {**few, "chunks": 2, "menu": "k", "n_ctx": 64})
    chunks = dict.fromkeys(("imatrix_chunks", "moments_chunks", "tune_chunks"), 8)
    chunks |= dict.fromkeys(("trial_chunks", "guard_chunks", "tune_guard_chunks"), 2)
    names = {"model": str(model), "out": out, "calibration": (str(texts[0]),), "texts": (str(texts[1]),)}
    small = {"n_ctx": 64, "chunks": 4, "rungs": ("Q4_K_S",), "threads": 1, "bench": False, "method": method}
    return build(RunOptions, {**names, **small, **chunks, "planning": planning})


def make(options: RunOptions) -> tuple[str, ...]:
    """What `bitladder run` does. Returns the names of the steps that did work."""
    # A pass keeps its state after each chunk, so that a kill in any chunk finds one.
    UnfinishedWork.__init__.__defaults__ = (0.0,)
    made = run(options).made
    write_card(options.out)
    write_report(options.out)
    return made


@dataclasses.dataclass
class Operations:
    """Counts the operations on files below a folder, and calls `act` before number `last`."""

    folder: str
    last: int = 0
    act: Callable[[], None] = lambda: None
    count: int = 0
    name: str = ""

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """For `sys.addaudithook`."""
        if event not in OPERATIONS or not arguments or not isinstance(arguments[0], str | os.PathLike):
            return
        if not os.fspath(arguments[0]).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.last:
            self.name = f"{event} {os.fspath(arguments[0])[len(self.folder) + 1 :]}"
            self.act()


def in_child(work: Callable[[], object], seconds: float = 600.0) -> int:
    """Does work in a child with its own process group, which is killed after some seconds. Returns its wait status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            work()
            status = 0
        except BaseException as error:
            traceback.print_exception(error)
            sys.stderr.flush()
        os._exit(status)
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what the child started
            return status
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.005)


def make_ready(folder: pathlib.Path) -> None:
    """Imports what a run imports on the way, so that no attempt does, and makes the model in a child.

    So this process keeps one thread. Libraries start more when they compute, and a child that is forked beside one
    can wait for ever.

    Parameters:
        folder: where the model and the texts are made.
    """
    for module in pkgutil.walk_packages(bitladder.__path__, "bitladder."):
        if not module.name.endswith(("__main__", "render_chat")):
            importlib.import_module(module.name)
    for name in ("torch", "transformers.models.llama.modeling_llama", "highspy", "plotly.graph_objects"):
        importlib.import_module(name)
    if in_child(functools.partial(tiny_run, folder, folder)):
        raise SystemExit("the model cannot be made")


def undisturbed(work: Callable[[], object], out: pathlib.Path) -> tuple[float, int]:
    """Does work in a child that nobody disturbs. Returns its seconds, and its number of operations below a folder."""
    read, write = os.pipe()

    def counted() -> None:
        operations = Operations(str(out))
        sys.addaudithook(operations)
        began = time.monotonic()
        work()
        os.write(write, f"{time.monotonic() - began} {operations.count}".encode())

    tasks = pathlib.Path("/proc/self/task")
    threads = len(list(tasks.iterdir())) if tasks.is_dir() else 1
    if threads > 1:
        raise SystemExit(f"this process has {threads} threads and must not fork; set OMP_NUM_THREADS=1")
    if in_child(counted):
        raise SystemExit("the undisturbed run fails")
    os.close(write)
    with os.fdopen(read) as stream:
        seconds, operations = stream.read().split()
    return float(seconds), int(operations)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file and folder of a run directory. The manifest is without times, and the log tells of each attempt."""
    files = {}
    for path in set(folder.rglob("*")) - {Layout(folder).log}:
        files[path.relative_to(folder).as_posix()] = path.read_bytes() if path.is_file() else b"folder"
    manifest = load_manifest(folder)
    if manifest is not None:
        # How long steps took, and the times and inodes of files whose hashes are kept, differ between two runs.
        times = {"steps": {"__all__": {"seconds"}}, "hashes": {"__all__": {"mtime_ns", "inode"}}}
        files[Layout(folder).manifest.name] = repr(manifest.model_dump(mode="json", exclude=times)).encode()
    return files


def differing(folder: pathlib.Path, undisturbed: dict[str, bytes]) -> list[str]:
    """The names of files that are not as in the undisturbed run, that are missing, or that it does not have."""
    ours = contents(folder)
    return sorted(name for name in ours.keys() | undisturbed.keys() if ours.get(name) != undisturbed.get(name))


class Kills:
    """Attempts until so many of them were killed.

    Parameters:
        folder: for everything that is made.
        method: of rounding.
        share: of a run, within which the moment of a kill is drawn.
        draw: of the moments.
    """

    def __init__(self, folder: pathlib.Path, method: str, share: float, draw: random.Random) -> None:
        self._folder, self._method, self._share, self._draw = folder, method, share, draw
        self.faults: list[str] = []
        self.killed = self.finished = 0
        make_ready(folder)
        reference = self._options("undisturbed")
        self._seconds, self._operations = undisturbed(functools.partial(make, reference), reference.out)
        self._undisturbed = contents(reference.out)
        print(f"undisturbed: {self._seconds:.1f} s, {self._operations} operations, {len(self._undisturbed)} files")

    def _options(self, name: str) -> RunOptions:
        # The name of the directory is in the card: all have the same.
        return tiny_run(self._folder, self._folder / name / "ladder", self._method)

    def until(self, kills: int) -> None:
        """Kills, continues and compares."""
        while self.killed < kills:
            options = self._options(f"chain-{self.finished}")
            while self._attempt(options, kills):
                pass
            self._compare(options)
            shutil.rmtree(options.out.parent)

    def _attempt(self, options: RunOptions, kills: int) -> bool:
        """One attempt. Returns whether it was killed."""
        seconds, operation = 600.0, Operations(str(options.out))
        if self.killed < kills:
            if self._draw.random() < 0.5:
                seconds = self._draw.uniform(0, self._seconds * self._share)
            else:
                operation.last = self._draw.randint(1, int(self._operations * self._share))
        place = f"after {seconds:.3f} s" if not operation.last else f"before operation {operation.last}"
        operation.act = lambda: self._die(operation)
        before = load_manifest(options.out)

        def work() -> None:
            sys.addaudithook(operation)
            make(options)

        status = in_child(work, seconds)
        after = load_manifest(options.out)
        for name, step in before.steps.items() if before is not None else ():
            if after is None or after.steps.get(name) != step:
                self._fault(f"the step {name} was done again after a kill")
        killed = os.WIFSIGNALED(status)
        if not killed and status:
            raise SystemExit(f"kill {self.killed} left a directory in which the run fails: {options.out}")
        if killed:
            self.killed += 1
            print(f"kill {self.killed} {place}, {0 if after is None else len(after.steps)} steps complete", flush=True)
        return killed

    def _die(self, operation: Operations) -> None:
        print(f"killed before {operation.name}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def _compare(self, options: RunOptions) -> None:
        """Compares a run that has come to its end with the undisturbed one."""
        self.finished += 1
        names = differing(options.out, self._undisturbed)
        for name in names:
            self._fault(f"{name} differs")
        if names:
            shutil.copytree(options.out, self._folder / f"differing-{self.finished}")
        print(f"chain {self.finished} finished, {len(names)} files differ", flush=True)

    def _fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"FAULT: {text}", flush=True)


def main() -> None:
    """Runs the script: exit code 1 for any difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--share", type=float, default=1.0, help="of a run, within which each kill falls")
    parser.add_argument("--rounding", default="feedback")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    arguments = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kills-"))
    print(f"seed {arguments.seed}, in {folder}", flush=True)
    kills = Kills(folder, arguments.rounding, arguments.share, random.Random(arguments.seed))
    kills.until(arguments.kills)
    print(f"{kills.killed} kills, {kills.finished} runs to the end, {len(kills.faults)} faults; seed {arguments.seed}")
    if not arguments.keep and not kills.faults:
        shutil.rmtree(folder)
    sys.exit(bool(kills.faults))


if __name__ == "__main__":
    main()

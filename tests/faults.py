"""Disturbs runs in every way but a kill: each must end with one clear line, and the next run must finish.

    python tests/faults.py --seed 7 --times 20 disk_full damage

The tiny run of `kills.py` is given as a command. Before a random operation on its directory the disk is full, or can
only be read, or memory is used up, or a signal arrives; or files grow too long; or a run that was cut short finds a
file damaged. After each fault the same command must end with the files of an undisturbed run.
"""

import argparse
import errno
import functools
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from kills import Operations, contents, differing, in_child, make_ready, tiny_run, undisturbed

from bitladder import ladder
from bitladder.calibrate import UnfinishedWork
from bitladder.cli import main as command_line
from bitladder.ladder import RunOptions
from bitladder.options import words
from bitladder.refine import TuneOptions
from bitladder.rundir import Layout, load_manifest

INTERRUPTED = {"interrupt": 130, "terminate": 143}  # exit codes
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def command(options: RunOptions) -> None:
    """`bitladder run` with these options. Raises SystemExit."""
    original = ladder.run
    # How recipes are planned has no flags.
    ladder.run = lambda given, **more: original(given.replace(planning=options.planning), **more)
    UnfinishedWork.__init__.__defaults__ = (0.0,)  # a pass keeps its state after each chunk
    command_line(["run", "-q", options.model, *words(options)])


def completed(options: RunOptions) -> None:
    """The command, whose exit code must be 0."""
    try:
        command(options)
    except SystemExit as stop:
        if stop.code:
            raise


def attempt(options: RunOptions, prepare: Callable[[], Any], log: pathlib.Path) -> tuple[int, list[str]]:
    """Runs the command in a child. Returns its exit code (negative: the signal) and the lines of its stderr.

    Parameters:
        options: the options of the run.
        prepare: prepares the fault, in the child.
        log: a file for stderr.
    """

    def work() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        prepare()
        try:
            command(options)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else bool(stop.code)
            os._exit(code)

    code = os.waitstatus_to_exitcode(in_child(work))
    # click ends the line in which a terminal shows ^C.
    return code, [line for line in log.read_text(errors="replace").splitlines() if line]


class Refused:
    """From one operation on, whatever would write is refused, as by a full disk or one that can only be read."""

    def __init__(self, number: int, *, everything: bool) -> None:
        self._number, self._everything = number, everything

    def hook(self, operations: Operations) -> Callable[[str, tuple[Any, ...]], None]:
        """For `sys.addaudithook`."""

        def refuse(event: str, arguments: tuple[Any, ...]) -> None:
            before = operations.count
            operations(event, arguments)
            if operations.count == before or operations.count < operations.last:
                return
            opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
            if opened or event == "os.mkdir" or (self._everything and event != "open"):
                raise OSError(self._number, os.strerror(self._number), os.fspath(arguments[0]))

        return refuse


class Faults:
    """The faults, each of which is prepared in the process that it disturbs.

    Parameters:
        folder: for everything that is made.
        quick: presets of the library's blocks, smoothed, instead of a run with every kind of step.
        draw: of the moments.
    """

    def __init__(self, folder: pathlib.Path, quick: bool, draw: random.Random) -> None:
        self._folder, self._quick, self._draw = folder, quick, draw
        self.failures: list[str] = []
        self._unused = set[str]()  # damaged files that a complete run does not look at, such as its caches
        make_ready(folder)
        reference = self.options("undisturbed")
        self._seconds, self._operations = undisturbed(functools.partial(completed, reference), reference.out)
        self.undisturbed = contents(reference.out)
        self._largest = max(path.stat().st_size for path in reference.out.rglob("*") if path.is_file())
        print(f"undisturbed: {self._seconds:.1f} s, {self._operations} operations", flush=True)

    def options(self, name: str) -> RunOptions:
        """Options of a run in a directory of this name."""
        options = tiny_run(self._folder, self._folder / name / "ladder")
        # Flags that have no effect would be warned of, and what is said is one line.
        less = {"mode": "naive", "method": "stock", "smooth": True, **vars(TuneOptions())}
        return options.replace(**less) if self._quick else options

    def _operation(self, options: RunOptions, act: Callable[[], None]) -> Operations:
        return Operations(str(options.out), self._draw.randint(1, self._operations), act)

    def disk_full(self, options: RunOptions) -> Callable[[], None]:
        """No space from a random operation on."""
        operations = self._operation(options, lambda: None)
        return functools.partial(sys.addaudithook, Refused(errno.ENOSPC, everything=False).hook(operations))

    def read_only(self, options: RunOptions) -> Callable[[], None]:
        """A directory that can only be read, from a random operation on."""
        operations = self._operation(options, lambda: None)
        return functools.partial(sys.addaudithook, Refused(errno.EROFS, everything=True).hook(operations))

    def file_size(self, options: RunOptions) -> Callable[[], None]:
        """Writes beyond a random length fail in the middle of a file."""
        del options
        limit = int(self._largest ** self._draw.uniform(0.3, 1))
        return functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))

    def no_memory(self, options: RunOptions) -> Callable[[], None]:
        """An allocation fails at a random operation."""

        def act() -> None:
            raise MemoryError

        return functools.partial(sys.addaudithook, self._operation(options, act))

    def little_memory(self, options: RunOptions) -> Callable[[], None]:
        """The process gets only some MB more than it has."""
        del options
        more = self._draw.randint(0, 300 << 20)

        def prepare() -> None:
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + more
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        return prepare

    def interrupt(self, options: RunOptions) -> Callable[[], None]:
        """SIGINT at a random operation."""
        return self._signal(options, signal.SIGINT)

    def terminate(self, options: RunOptions) -> Callable[[], None]:
        """SIGTERM at a random operation."""
        return self._signal(options, signal.SIGTERM)

    def _signal(self, options: RunOptions, number: signal.Signals) -> Callable[[], None]:
        return functools.partial(sys.addaudithook, self._operation(options, lambda: os.kill(os.getpid(), number)))

    def clock(self, options: RunOptions) -> Callable[[], None]:
        """A run that was killed continues a day earlier: what it made has times in the future."""
        operation = self._operation(options, lambda: os.kill(os.getpid(), signal.SIGKILL))
        attempt(options, functools.partial(sys.addaudithook, operation), options.out.parent / "log")
        for path in options.out.rglob("*"):
            os.utime(path, (time.time() + 86_400,) * 2)
        return lambda: None

    def damage(self, options: RunOptions) -> Callable[[], None]:
        """A run that was killed, or is complete, finds some files truncated, changed or gone. The manifest is whole."""
        operation = self._operation(options, lambda: os.kill(os.getpid(), signal.SIGKILL))
        operation.last = int(operation.last * 1.3)
        attempt(options, functools.partial(sys.addaudithook, operation), options.out.parent / "log")
        manifest = Layout(options.out).manifest
        files = [path for path in sorted(options.out.rglob("*")) if path.is_file() and path != manifest]
        recorded = load_manifest(options.out)
        outputs = {output.path for step in recorded.steps.values() for output in step.outputs} if recorded else set()
        for path in self._draw.sample(files, min(len(files), 5)):
            harm(path, self._draw)
            layout = Layout(options.out)
            # What is deleted in the work folder is made again only if a step reads it.
            released = not path.exists() and path.is_relative_to(layout.work)
            if (name := layout.name(path)) not in outputs or released:
                self._unused.add(name)
        return lambda: None

    def two(self, options: RunOptions) -> Callable[[], None]:
        """Another run is at work in the directory."""
        from bitladder.ladder.store import locked

        options.out.mkdir(parents=True)

        def prepare() -> None:
            other = os.fork()
            if not other:
                with locked(options.out):
                    time.sleep(600)
            while not Layout(options.out).lock.exists() or not Layout(options.out).lock.stat().st_size:
                time.sleep(0.01)
            # It ends with the group of this process.

        return prepare

    def meet(self, fault: str, number: int) -> None:
        """One fault: the command must say one line, or not notice; and then finish with the undisturbed files."""
        options = self.options(f"{fault}-{number}")
        options.out.parent.mkdir()
        log = options.out.parent / "log"
        code, lines = attempt(options, getattr(self, fault)(options), log)
        lines = [line for line in lines if not line.startswith("bitladder: Interrupted")]
        expected = {0, INTERRUPTED.get(fault, 1)}
        print(f"{fault} {number}: exit code {code}; {' | '.join(lines)[:300]}", flush=True)
        if code not in expected or (code == 1) != (len(lines) == 1) or (code != 1 and lines):
            self._fail(f"{fault} {number}: exit code {code}, {len(lines)} lines", log)
        code, lines = attempt(options, lambda: None, log)
        names = [] if code else [name for name in differing(options.out, self.undisturbed) if name not in self._unused]
        self._unused.clear()
        if code or names:
            self._fail(f"{fault} {number}, continued: exit code {code}, {lines}; other files: {names[:5]}", log)
        else:
            shutil.rmtree(options.out.parent)

    def _fail(self, text: str, log: pathlib.Path) -> None:
        self.failures.append(text)
        print(f"FAULT: {text}\n{log.read_text(errors='replace')[-3000:]}", flush=True)


def harm(path: pathlib.Path, draw: random.Random) -> None:
    """Truncates a file, changes a byte of it, empties it, or deletes it."""
    data = bytearray(path.read_bytes())
    kind = draw.choice(["truncate", "change", "empty", "delete"])
    print(f"  {kind} {path.name}", flush=True)
    if kind == "delete":
        path.unlink()
    elif kind == "change" and data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    else:
        path.write_bytes(data[: draw.randrange(len(data)) if kind == "truncate" and data else 0])


# little_memory is not among them: what the library does without memory differs from call to call.
KINDS = ("disk_full", "read_only", "file_size", "no_memory", "interrupt", "terminate", "clock", "damage", "two")


def main() -> None:
    """Runs the script: exit code 1 if a fault was not met as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--quick", action="store_true", help="a run that neither plans nor rounds")
    parser.add_argument("--times", type=int, default=1, help="of each kind")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    arguments = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"seed {arguments.seed}, in {folder}", flush=True)
    faults = Faults(folder, arguments.quick, random.Random(arguments.seed))
    for number in range(arguments.times):
        for kind in arguments.kinds:
            faults.meet(kind, number)
    count = arguments.times * len(arguments.kinds)
    print(f"{count} faults, {len(faults.failures)} not met; seed {arguments.seed}")
    if not faults.failures:
        shutil.rmtree(folder)
    sys.exit(bool(faults.failures))


if __name__ == "__main__":
    main()

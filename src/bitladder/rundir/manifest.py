"""What a run directory says of its run: ladder.json, the manifest, and the log.

The manifest has the options of the run, complete steps, and their inputs. The log has what a run says, with times, so
that it can be followed from another terminal.
"""

import contextlib
import datetime
import pathlib
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import pydantic

from bitladder.errors import BitladderError
from bitladder.files import is_alive, write_json
from bitladder.progress import Bar, LoggedBar, Progress
from bitladder.rundir.layout import Layout

LARGEST, KEPT = 1 << 20, 1 << 18  # bytes: a log that is larger keeps so many of its end
COMMAND = " $ "  # between the time and a command
LAST_LINES = 12  # that are shown before new ones are followed
POLL = 0.5  # seconds


class RunLog:
    """A Progress that passes everything on and writes it into the log. The file is begun by `begin`, not before.

    Parameters:
        progress: gets everything.
        layout: the run directory.
        command: the command line of the run.
    """

    def __init__(self, progress: Progress, layout: Layout, command: str) -> None:
        self._progress, self._path = progress, layout.log
        self._waiting: list[str] | None = [_line(f"$ {command}")]

    def begin(self) -> None:
        """Writes what was said so far: the run directory is there, and is this run's."""
        if self._waiting is not None:
            lines, self._waiting = self._waiting, None
            for line in lines:
                self._append(line)

    def write(self, text: str) -> None:
        """Adds a line to the log alone."""
        line = _line(text)
        if self._waiting is None:
            self._append(line)
        else:
            self._waiting.append(line)

    def info(self, text: str) -> None:
        """Passes a remark on, and writes it."""
        self.write(text)
        self._progress.info(text)

    def warn(self, text: str) -> None:
        """Passes a warning on, and writes it."""
        self.write(f"warning: {text}")
        self._progress.warn(text)

    @contextlib.contextmanager
    def task(self, label: str, total: float) -> Iterator[Bar]:
        """A bar, which the log has a line of each minute."""
        with self._progress.task(label, total) as bar:
            yield _Both(bar, LoggedBar(self.write, label, total))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if self._waiting is None:
            self.write("done" if kind is None else f"stopped: {error}" if str(error) else "interrupted")

    def _append(self, line: str) -> None:
        # The log is a convenience: a full disk is found by what must be written.
        with contextlib.suppress(OSError):
            with self._path.open("a", encoding="utf-8", errors="replace") as stream:
                stream.write(line)
                size = stream.tell()
            if size > LARGEST:
                end = self._path.read_bytes()[-KEPT:]
                self._path.write_bytes(end[end.index(b"\n") + 1 :])


class _Both:
    def __init__(self, *bars: Bar) -> None:
        self._bars = bars

    def advance(self, amount: float = 1) -> None:
        for bar in self._bars:
            bar.advance(amount)

    def note(self, text: str) -> None:
        for bar in self._bars:
            bar.note(text)


def _line(text: str) -> str:
    now = datetime.datetime.now().astimezone()
    return f"{now:%Y-%m-%d %H:%M:%S} {' '.join(text.splitlines())}\n"


def last_command(folder: pathlib.Path) -> str | None:
    """The command line of the last run in a directory, as it was typed; None if there is no log."""
    commands = [line.split(COMMAND, 1)[1] for line in _read(folder) if COMMAND in line[:22]]
    return commands[-1] if commands else None


def follow(folder: pathlib.Path, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """The last lines of the log of a run, then each new one until no run is at work in the directory."""
    lines = _read(folder)
    yield from lines[-LAST_LINES:]
    while True:
        running = is_running(folder)
        seen, lines = lines, _read(folder)
        # A log that was shortened has lost its beginning; the last line that was seen tells where to go on.
        start = len(seen) if lines[: len(seen)] == seen else _place_after(lines, seen[-1])
        yield from lines[start:]
        if not running:
            return
        sleep(POLL)


def is_running(folder: pathlib.Path) -> bool:
    """Whether a run is at work in a directory: its lock file names a process that lives."""
    try:
        return is_alive(int(Layout(folder).lock.read_text(encoding="ascii")))
    except (OSError, ValueError):
        return False


def _place_after(lines: list[str], line: str) -> int:
    return lines.index(line) + 1 if line in lines else 0


def _read(folder: pathlib.Path) -> list[str]:
    try:
        return Layout(folder).log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


class OutputFile(pydantic.BaseModel):
    """A file that a step wrote. `path` is relative to the run directory, with forward slashes."""

    path: str
    bytes: int
    sha256: str


class StepRecord(pydantic.BaseModel):
    """A complete step. It is not made again while its key and its outputs are as recorded.

    Parameters:
        key: hash of the inputs.
        inputs: everything that the result depends on.
        outputs: the files.
        facts: for later steps and the report.
        seconds: time that the step took. Nothing depends on it.
    """

    key: str
    inputs: dict[str, Any]
    outputs: list[OutputFile]
    facts: dict[str, Any] = {}
    seconds: float = 0.0


class CachedHash(pydantic.BaseModel):
    """The content hash of a file. It is valid while size, time of change and inode are the same."""

    bytes: int
    mtime_ns: int
    inode: int
    sha256: str


class RunRecord(pydantic.BaseModel):
    """What a reader of the results must know of the last run. It has names and no paths.

    Parameters:
        command: the command line that repeats the run.
        model: name of the model.
        model_id: its id of the hub, or None.
        rungs: names of the rungs.
        n_ctx: tokens of a chunk.
        quantized_by: who made the quants.
        mode: how the types of the rungs were chosen; None for the presets by themselves.
        compared: names of files of somebody else, whose scores are in scores/NAME.json.
        datasets: data sets of the hub that the calibration text is from.
        repo: the repository of the hub that the ladder is for; None if it is not known.
        complete: whether every step is complete, so that the files belong together.
    """

    command: str
    model: str
    model_id: str | None
    rungs: tuple[str, ...]
    n_ctx: int
    quantized_by: str | None = None
    mode: str | None = None
    compared: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    repo: str | None = None
    complete: bool = False


class Manifest(pydantic.BaseModel):
    """The whole file.

    Parameters:
        run: the last run.
        before: the last run that was complete, while `run` is not.
        steps: complete steps by name: "convert", "quantize Q4_K_M".
        hashes: content hashes by the name of the file in the run.
    """

    schema_version: Literal[1] = 1
    run: RunRecord | None = None
    before: RunRecord | None = None
    steps: dict[str, StepRecord] = {}
    hashes: dict[str, CachedHash] = {}

    def whole(self) -> RunRecord | None:
        """The run whose files belong together: the last one, or the one before it that is being extended."""
        if self.run is not None and self.run.complete:
            return self.run
        return self.before if self.before is not None and self._kept(self.before) else None

    def _kept(self, run: RunRecord) -> bool:
        """Whether the rungs of a run, and what was measured of them, are still those that its scores are of."""
        pairs = [("score base", "measure base")]
        for rung in run.rungs:
            quant, measured, score = f"quantize {rung}", f"measure {rung}", f"score {rung}"
            pairs += [(score, quant), (score, measured), (measured, quant), (quant, "imatrix")]
        pairs += [(f"score {name}", f"measure {name}") for name in run.compared]
        for reader, read in pairs:
            if not {reader, read} <= self.steps.keys():
                return False
            outputs = {output.path: output.sha256 for output in self.steps[read].outputs}
            if self.steps[reader].inputs.get(read) != outputs:
                return False
        return True

    def save(self, folder: pathlib.Path) -> None:
        """Writes ladder.json in one step."""
        write_json(Layout(folder).manifest, self.model_dump(mode="json"))


def load_manifest(folder: pathlib.Path) -> Manifest | None:
    """The manifest of a run directory, or None. Raises BitladderError if it is damaged."""
    path = Layout(folder).manifest
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BitladderError(
            f"{path} is damaged or of another bitladder ({where}: {first['msg']}); restore it, or use another directory"
        ) from error


def complete_manifest(folder: pathlib.Path) -> tuple[Manifest, RunRecord]:
    """The manifest of a finished run, and its run record. While a run is extended, that is the one before.

    Raises BitladderError if the directory has no run, or an unfinished one.
    """
    manifest = load_manifest(folder)
    if manifest is None:
        name = Layout(folder).manifest.name
        raise BitladderError(f"{folder} is not a run directory: it has no {name}; bitladder run --out makes one")
    run = manifest.whole()
    if run is None:
        then = f"Continue it with: {run_command(folder, manifest)}"
        if is_running(folder):
            then = f"It is at work. Follow it with: bitladder show {shlex.quote(str(folder))} --follow"
        raise BitladderError(f"the run in {folder} is not finished. {then}")
    return manifest, run


def run_command(folder: pathlib.Path, manifest: Manifest) -> str:
    """The command of the last run in a directory: it continues the run, and makes what is missing of it."""
    return last_command(folder) or (manifest.run.command if manifest.run else "bitladder run")


def make_again(folder: pathlib.Path, manifest: Manifest) -> str:
    """A sentence for an error about a file of a run that is missing or damaged."""
    return f"Make it again with: {run_command(folder, manifest)}"


class _SourceFacts(pydantic.BaseModel):
    """What the step "convert" found out of the full-precision model, as far as readers of a run need it."""

    file: str = pydantic.Field(pattern=r"^[^/\\\x00]+$")
    stem: str
    architecture: str
    encoding: str
    parameters: int
    general: dict[str, Any]
    bytes: int = 0
    bpw: float = 0.0
    origin: str | None = None


def check_source(folder: pathlib.Path, manifest: Manifest) -> None:
    """Raises BitladderError if the manifest of a finished run lacks what every reader needs."""
    path = Layout(folder).manifest
    convert = manifest.steps.get("convert")
    if convert is None:
        raise BitladderError(f"{path} is damaged: it has no step convert. {make_again(folder, manifest)}")
    try:
        _SourceFacts.model_validate(convert.facts)
    except pydantic.ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise BitladderError(
            f"{path} is damaged (convert: {where}). Delete the file. {make_again(folder, manifest)}"
        ) from error

"""ladder.json, the manifest of a run directory: the options of the run, complete steps, and their inputs."""

import pathlib
import shlex
from typing import Any, Literal

import pydantic

from bitladder.errors import BitladderError
from bitladder.files import write_json
from bitladder.rundir.layout import Layout
from bitladder.rundir.run_log import is_running, last_command


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

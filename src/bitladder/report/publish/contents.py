"""Which files of a run directory belong on the hub."""

import dataclasses
import fnmatch
import json
import pathlib
from collections.abc import Iterator, Sequence

from bitladder.errors import BitladderError, UsageError
from bitladder.ladder.manifest import Manifest, RunRecord, complete_manifest

CARD = "README.md"
# Beside the card, the quants, their recipes and scores; those that the run did not make are left out.
BESIDE = ("report.html", "imatrix.gguf", "candidates.json", "sensitivity.json", "sensitivity-plain.json")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file to upload: its name in the run directory and in the repository alike, and its size in bytes.

    `rung` is the label of a quant (or the encoding of the full-precision file), None for what is no model.
    """

    name: str
    bytes: int
    rung: str | None = None


def contents(folder: pathlib.Path, exclude: Sequence[str] = ()) -> list[Entry]:
    """The files of a finished run that go to the hub: models first, then what describes them, the card last.

    `exclude` are patterns (`*`, `?`) of names to leave out. Raises BitladderError if the run is not finished, or a
    file is missing or not as the run left it; UsageError for a pattern that matches nothing.
    """
    manifest, run = complete_manifest(folder)
    recorded = {output.path: output.bytes for step in manifest.steps.values() for output in step.outputs}
    found: dict[str, Entry] = {}
    for name, rung in _names(folder, manifest, run):
        path = folder / name
        if not path.is_file():
            raise BitladderError(f"{path} is missing; give the `bitladder run` command again")
        size = path.stat().st_size
        if recorded.get(name, size) != size:
            raise BitladderError(f"{path} is not as the run left it; give the `bitladder run` command again")
        found[name] = Entry(name, size, rung)
    for pattern in exclude:
        gone = fnmatch.filter(found, pattern)
        if not gone:
            raise UsageError(f"--exclude {pattern} matches none of {', '.join(found)}")
        if CARD in gone:
            raise UsageError(f"--exclude {pattern} would leave the card out, without which the hub shows nothing")
        for name in gone:
            del found[name]
    return list(found.values())


def groups(entries: Sequence[Entry]) -> list[tuple[str, list[str]]]:
    """Commits, in order: the models before the page that promises them."""
    models = [entry.name for entry in entries if entry.rung is not None]
    rest = [entry.name for entry in entries if entry.rung is None]
    return [(message, names) for message, names in (("Quants", models), ("Card, scores and recipes", rest)) if names]


def _names(folder: pathlib.Path, manifest: Manifest, run: RunRecord) -> Iterator[tuple[str, str | None]]:
    """Names in the run directory and, for models, their labels."""
    convert = manifest.steps["convert"]
    for output in convert.outputs:  # none, if the run started from a GGUF: that is the user's
        yield output.path, str(convert.facts["encoding"])
    for rung in run.rungs:
        yield _model(folder, rung), rung
    for name in BESIDE:
        if (folder / name).is_file():
            yield name, None
    for label in ("base", *run.rungs, *run.compared):
        yield f"scores/{label}.json", None
    for rung in run.rungs:
        yield f"recipes/{rung}.toml", None
        for name in (f"scores/{rung}.naive.json", f"recipes/{rung}.naive.toml"):
            if (folder / name).is_file():
                yield name, None
    yield CARD, None


def _model(folder: pathlib.Path, rung: str) -> str:
    path = folder / "scores" / f"{rung}.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model"])
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BitladderError(f"{path} is damaged; give the `bitladder run` command again") from error

"""Publishing a run directory: which of its files belong on the hub, and what is wrong with them.

Faults are paths of this machine, quants that llama.cpp does not find, and a card without a licence.
"""

import dataclasses
import fnmatch
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from bitladder.errors import BitladderError, UsageError
from bitladder.evaluate import read_scores
from bitladder.hub import PRESET, pick, side_word
from bitladder.report.best import recommended
from bitladder.report.card import UNNAMED_RULE, render_card, write_card
from bitladder.report.finished_run import read_prices, read_run
from bitladder.report.page import write_report
from bitladder.rundir import Layout, Manifest, RunRecord, check_source, complete_manifest, make_again, naive

# The start of a path of this machine: /home/…, ~/…, ./…, C:\…, \\server, file:…
_LOCAL = re.compile(r"(/|~|\.{1,2}[/\\]|[A-Za-z]:[\\/]|\\\\|file:)")
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# huggingface.co delivers larger files not by plain HTTP, which llama.cpp uses.
MOST_BYTES = 50_000_000_000
TEXTS = (".md", ".html", ".json", ".toml")


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """A file to upload.

    Parameters:
        name: its name in the run directory and in the repository.
        bytes: its size.
        rung: label of a quant, or encoding of the full-precision file; None if the file is not a model.
    """

    name: str
    bytes: int
    rung: str | None = None


def published_files(folder: pathlib.Path, exclude: Sequence[str] = ()) -> list[PublishedFile]:
    """The files of a finished run that belong on the hub: models first, then what describes them, the card last.

    Parameters:
        folder: the run directory.
        exclude: patterns (`*`, `?`) of names to leave out.

    Raises:
        UsageError: a pattern matches no file, or the card.
        BitladderError: the run is not finished, or a file is missing or was changed after the run.
    """
    manifest, run = complete_manifest(folder)
    check_source(folder, manifest)
    layout = Layout(folder)
    recorded = {output.path: output.bytes for step in manifest.steps.values() for output in step.outputs}
    files: dict[str, PublishedFile] = {}
    for path, rung in _paths(layout, manifest, run):
        if ".." in path.parts or not path.resolve().is_relative_to(folder.resolve()):
            raise BitladderError(f"{path} lies outside {folder}: files of the run were tampered with; nothing is sent")
        name = layout.name(path)
        if not path.is_file():
            raise BitladderError(f"{path} is missing. {make_again(folder, manifest)}")
        size = path.stat().st_size
        if recorded.get(name, size) != size:
            raise BitladderError(f"{path} was changed after the run. {make_again(folder, manifest)}")
        files[name] = PublishedFile(name, size, rung)
    for pattern in exclude:
        excluded = fnmatch.filter(files, pattern)
        if not excluded:
            raise UsageError(f"--exclude {pattern} matches none of {', '.join(files)}")
        if layout.name(layout.card) in excluded:
            raise UsageError(f"--exclude {pattern} leaves out the card, which the hub needs")
        for name in excluded:
            del files[name]
    return list(files.values())


def record_repository(folder: pathlib.Path, repo: str) -> None:
    """Records the repository that a finished run is for. No page is written.

    Raises:
        BitladderError: the run is not finished.
    """
    manifest, _ = complete_manifest(folder)
    # While a run is extended, the finished one is the one before it. Both are for the same repository.
    manifest.run = manifest.run and manifest.run.model_copy(update={"repo": repo})
    manifest.before = manifest.before and manifest.before.model_copy(update={"repo": repo})
    manifest.save(folder)


def name_repository(folder: pathlib.Path, repo: str) -> bool:
    """Records the repository that a finished run is for, and writes the pages that name it.

    A card that somebody edited stays as it is.

    Returns:
        Whether the card names the repository.

    Raises:
        BitladderError: the run is not finished, or a file of it cannot be read.
    """
    _, run = complete_manifest(folder)
    layout = Layout(folder)
    if run.repo == repo:
        return True
    edited = layout.card.is_file() and layout.card.read_text(encoding="utf-8", errors="replace") != render_card(folder)
    record_repository(folder, repo)
    if not edited:
        write_card(folder)
        if layout.report.is_file():
            write_report(folder)
    return not edited


def groups(entries: Sequence[PublishedFile]) -> list[tuple[str, list[str]]]:
    """The commits with their files, in order: first the models, then the card that describes them."""
    models = [entry.name for entry in entries if entry.rung is not None]
    rest = [entry.name for entry in entries if entry.rung is None]
    return [(message, names) for message, names in (("Quants", models), ("Card, scores and recipes", rest)) if names]


def _paths(layout: Layout, manifest: Manifest, run: RunRecord) -> Iterator[tuple[pathlib.Path, str | None]]:
    """Paths of the files and, for models, their labels."""
    convert = manifest.steps["convert"]
    for output in convert.outputs:  # there are none if the run started from a GGUF, which belongs to the user
        yield layout.model(output.path), None if side_word(output.path) else str(convert.facts["encoding"])
    rungs = {rung: read_scores(layout.scores(rung)) for rung in run.rungs}
    for rung, scores in rungs.items():
        yield layout.model(scores.model), rung
    prices = read_prices(layout, {rung: scores.smoothed for rung, scores in rungs.items()})
    priced = (path for files in prices.values() for path in files)
    for path in (layout.report, layout.imatrix, layout.candidates, *priced):
        if path.is_file():
            yield path, None
    for label in ("base", *run.rungs, *run.compared):
        yield layout.scores(label), None
    for rung in run.rungs:
        yield layout.recipe(rung), None
        for path in (layout.scores(naive(rung)), layout.recipe(naive(rung))):
            if path.is_file():
                yield path, None
    yield layout.card, None


def front_matter(folder: pathlib.Path) -> dict[str, Any]:
    """The YAML at the top of the card. Raises BitladderError if it is missing or is not a mapping."""
    path = Layout(folder).card
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BitladderError(f"{path} is not UTF-8; `bitladder card` writes it again") from error
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        value = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise BitladderError(f"{path}: the front matter is not YAML; `bitladder card` writes it again") from error
    if not isinstance(value, dict):
        raise BitladderError(f"{path} has no front matter; `bitladder card` writes it again")
    return value


def check_private(folder: pathlib.Path, entries: Sequence[PublishedFile]) -> None:
    """Refuses files with paths of this machine: any local path in the front matter, the run directory's own anywhere.

    Raises:
        BitladderError: there is such a path; the error names file and key.
    """
    card = Layout(folder).card
    for key, value in _strings(front_matter(folder)):
        if _LOCAL.match(value):
            raise BitladderError(
                f"{card}: {key} is a path of this machine ({value}); name the model on the hub with "
                "`bitladder run --base-model OWNER/NAME`, or correct the card"
            )
    here = str(folder.resolve())
    for entry in entries:
        if pathlib.PurePath(entry.name).suffix in TEXTS:
            text = (folder / entry.name).read_text(encoding="utf-8", errors="replace")
            if len(here) > 1 and here in text:
                raise BitladderError(
                    f"{folder / entry.name} contains the path {here}; remove it, or make the file again"
                )


def warnings(folder: pathlib.Path, entries: Sequence[PublishedFile]) -> list[str]:
    """What is wrong for a reader of the published page, a line each."""
    lines = []
    card = Layout(folder).card.name
    front = front_matter(folder)
    base = front.get("base_model")
    if not base:
        lines.append(f"{card} names no base_model: the hub will not show the source model (--base-model of run)")
    elif not all(_ID.fullmatch(str(name)) for name in (base if isinstance(base, list) else [base])):
        lines.append(f"{card}: base_model {base} is not a hub id (OWNER/NAME)")
    if not front.get("license"):
        lines.append(f"{card} names no license; that of the source model applies to its quants; name it in the card")
    names = sorted(entry.name for entry in entries)
    for entry in entries:
        if entry.rung is None:
            continue
        if word := side_word(entry.name):
            lines.append(f'{entry.name}: llama.cpp does not load a file with "{word}" in its name as a model')
        elif (picked := pick(names, entry.rung)) != entry.name:
            lines.append(f"{entry.name}: -hf REPO:{entry.rung} takes {picked}")
        if entry.bytes > MOST_BYTES:
            lines.append(
                f"{entry.name} has {entry.bytes / 1e9:.0f} GB: llama.cpp cannot download more than 50 in one file"
            )
    if PRESET in names:
        lines.append(f"{PRESET}: llama.cpp would read it instead of the models")
    return lines


def default_file(entries: Sequence[PublishedFile]) -> str | None:
    """The file that `-hf REPO` takes if no quant is named."""
    return pick(sorted(entry.name for entry in entries))  # the hub sorts by name


def recommendation(folder: pathlib.Path, entries: Sequence[PublishedFile], repo: str) -> str:
    """A sentence about the quant that the card recommends, and about what `-hf REPO` takes if that is another one.

    Raises BitladderError if the run cannot be read.
    """
    memory, rung = recommended(read_run(folder))
    sentence = f"The card recommends {rung.label}, the best file for a memory of {memory} GB."
    taken = next((entry for entry in entries if entry.name == default_file(entries)), None)
    if taken is None or taken.rung == rung.label:
        return sentence
    return f"{sentence} -hf {repo} takes {taken.rung}: {UNNAMED_RULE}."


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings of nested lists and mappings, with their keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)

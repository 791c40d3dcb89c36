"""Files of somebody else, measured beside the ladder with the same settings."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from bitladder.compare import check_structure, check_weights, perplexity_sign
from bitladder.errors import BitladderError
from bitladder.evaluate import Scores
from bitladder.files import file_name
from bitladder.gguf.reader import GgufFile
from bitladder.gguf.shards import plain_path
from bitladder.hub import Fetched, fetch
from bitladder.progress import Progress


@dataclasses.dataclass(frozen=True)
class Other:
    """A third-party GGUF; `name` is that of its scores file, `source` the repository it is from (None: it was here)."""

    name: str
    path: pathlib.Path
    source: str | None


def find_others(specs: Sequence[str], taken: Iterable[str]) -> list[Other]:
    """The files that --compare names, fetched if they are the hub's; names that are `taken` get a number.

    Raises BitladderError as `hub.fetch`, and for a file that is no GGUF model.
    """
    found: list[Other] = []
    names = {name.lower() for name in taken}  # some file systems do not tell cases apart
    for spec in specs:
        file = fetch(spec, "--compare")
        with GgufFile(file.path) as opened:
            if not opened.tensors or opened.get("general.type", "model") != "model":
                raise BitladderError(f"--compare {spec} is no model")
        name = _free_name(file, names)
        names.add(name.lower())
        found.append(Other(name, file.path, file.source))
    return found


def check_headers(other: Other, full: pathlib.Path) -> None:
    """Raise BitladderError if a file is of another model than the full-precision one: no divergence can be measured."""
    with GgufFile(full) as base, GgufFile(other.path) as file:
        for one in check_structure(base, file):
            if one.gravity == "other":
                raise BitladderError(f"--compare {other.path.name} is no quant of this model: {one.text}; leave it out")


def doubts(other: Other, full: pathlib.Path, scores: Scores, threads: int | None, progress: Progress) -> list[str]:
    """Signs that a file was made from another checkpoint than the full-precision model, in sentences; warned of too."""
    with GgufFile(full) as base, GgufFile(other.path) as file:
        findings = [*check_structure(base, file), *check_weights(base, file, threads)]
    if scores.ln_ppl_ratio and scores.kld:
        far = any(one.about == "weights" for one in findings)
        findings += perplexity_sign(scores.ln_ppl_ratio, scores.kld.value, far)
    found = [one.text for one in findings if one.gravity == "sign"]
    for text in found:
        progress.warn(f"--compare {other.path.name}: {text}")
    return found


def about(other: Other, doubted: list[str]) -> dict[str, Any]:
    """What a reader of the scores should know of a file of somebody else, besides its figures."""
    found: dict[str, Any] = {"role": "third-party"}
    if other.source:
        found["source"] = other.source
    if doubted:
        found["doubts"] = doubted
    return found


def _free_name(file: Fetched, names: set[str]) -> str:
    stem = file_name(plain_path(file.path).name.removesuffix(".gguf"))
    if file.source:
        stem = f"{file.source.split('/')[0]}_{stem}"
    # "X.naive" would be taken for the preset of rung X by itself.
    stem = stem.removesuffix(".naive") or "model"
    number, name = 1, stem
    while name.lower() in names:
        number += 1
        name = f"{stem}-{number}"
    return name

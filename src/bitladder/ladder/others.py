"""Files of somebody else (--compare), which are measured beside the ladder with the same options."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from bitladder.compare import check_structure, check_weights, perplexity_sign
from bitladder.errors import BitladderError
from bitladder.evaluate import Scores
from bitladder.files import file_name
from bitladder.gguf import GgufFile, plain_path
from bitladder.hub import Fetched, fetch
from bitladder.progress import Progress
from bitladder.rundir import NAIVE


@dataclasses.dataclass(frozen=True)
class Other:
    """A GGUF of somebody else.

    Parameters:
        name: the name of its scores file.
        path: the file.
        source: the repository of the hub that it is from; None for a local file.
    """

    name: str
    path: pathlib.Path
    source: str | None


def find_others(specs: Sequence[str], reserved: Iterable[str]) -> list[Other]:
    """The files that --compare names. Files of the hub are fetched.

    Parameters:
        specs: the values of --compare.
        reserved: names that mean something else in the run directory. A file with such a name gets a number.

    Raises:
        BitladderError: as `hub.fetch`; or the file is not a GGUF model.
    """
    others: list[Other] = []
    names = {name.lower() for name in reserved}  # some file systems ignore case
    for spec in specs:
        file = fetch(spec, "--compare")
        with GgufFile(file.path) as opened:
            if not opened.tensors or opened.get("general.type", "model") != "model":
                raise BitladderError(f"--compare {spec} is not a model")
        name = _free_name(file, names)
        names.add(name.lower())
        others.append(Other(name, file.path, file.source))
    return others


def check_headers(other: Other, full: pathlib.Path) -> None:
    """Refuses a file of another model, because its divergence cannot be measured.

    Parameters:
        other: the file.
        full: path of the full-precision model.

    Raises:
        BitladderError: says how the file differs.
    """
    with GgufFile(full) as base, GgufFile(other.path) as file:
        for finding in check_structure(base, file):
            if finding.gravity == "other":
                raise BitladderError(
                    f"--compare {other.path.name} is not a quant of this model: {finding.text}; leave it out"
                )


def doubts(other: Other, full: pathlib.Path, scores: Scores, threads: int | None, progress: Progress) -> list[str]:
    """Signs that a file was made from another checkpoint than the full-precision model. Each is also a warning.

    Parameters:
        other: the file.
        full: path of the full-precision model.
        scores: the figures of the file.
        threads: threads that compare weights; None for all.
        progress: who is warned.

    Returns:
        One sentence for each sign.
    """
    with GgufFile(full) as base, GgufFile(other.path) as file:
        findings = [*check_structure(base, file), *check_weights(base, file, threads)]
    if scores.ln_ppl_ratio and scores.kld:
        far = any(finding.about == "weights" for finding in findings)
        findings += perplexity_sign(scores.ln_ppl_ratio, scores.kld.value, far)
    signs = [finding.text for finding in findings if finding.gravity == "sign"]
    for sign in signs:
        progress.warn(f"--compare {other.path.name}: {sign}")
    return signs


def about(other: Other, signs: list[str]) -> dict[str, Any]:
    """The fields of `RunScores` that say what a file of somebody else is. `signs` are those of `doubts`."""
    fields: dict[str, Any] = {"role": "third-party"}
    if other.source:
        fields["source"] = other.source
    if signs:
        fields["doubts"] = signs
    return fields


def _free_name(file: Fetched, names: set[str]) -> str:
    stem = file_name(plain_path(file.path).name.removesuffix(".gguf"))
    if file.source:
        stem = f"{file.source.split('/')[0]}_{stem}"
    # "X.naive" is the label of the preset of rung X by itself.
    stem = stem.removesuffix(NAIVE) or "model"
    number, name = 1, stem
    while name.lower() in names:
        number += 1
        name = f"{stem}-{number}"
    return name

"""The model that a run starts from, and files of others (--compare) that are measured beside the ladder."""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gguf

from bitladder import hub
from bitladder.compare import check_structure, check_weights, perplexity_sign
from bitladder.errors import BitladderError
from bitladder.evaluate import Scores
from bitladder.files import file_name
from bitladder.gguf import GgufFile, open_model, plain_path, prediction_tensors
from bitladder.hub import Fetched, fetch
from bitladder.ladder.model_shape import refuse_quantized
from bitladder.ladder.store import Store
from bitladder.progress import Progress
from bitladder.rundir import NAIVE, StepRecord

# Files of a checkpoint that a converter can read. The .bin files count only if there is no safetensors file.
READ = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "README.md", "*/*.jinja")
READ_OLD = "pytorch_model*.bin"
# Metadata that can name the repository of the model.
ORIGINS = ("general.source.repo_url", "general.source.url", "general.repo_url", "general.url")
_HUB_URL = re.compile(r"^https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/?$")
_ENCODING = re.compile(r"-(BF16|F16|F32)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Source:
    """The model that a run starts from.

    Parameters:
        path: the directory of the checkpoint, or the GGUF file (the first shard of a split model).
        name: the name in reports, without a path.
        model_id: the id of the hub, or None.
    """

    path: pathlib.Path
    name: str
    model_id: str | None

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF already."""
        return self.path.is_file()

    def files(self) -> dict[str, pathlib.Path]:
        """The files that decide the converted model, by their name in the directory."""
        if self.is_gguf:
            return {self.path.name: self.path}
        paths = {path for pattern in READ for path in self.path.glob(pattern) if path.is_file()}
        if not any(path.suffix == ".safetensors" for path in paths):
            paths |= set(self.path.glob(READ_OLD))
        return {path.relative_to(self.path).as_posix(): path for path in sorted(paths)}

    def is_full_model_of(self, convert: StepRecord, store: Store) -> bool:
        """Whether it is the full-precision GGUF of a ladder, whose step `convert` has this record."""
        if not self.is_gguf:
            return False
        (sha256,) = self.digest(store)["files"].values()
        return sha256 in {convert.facts["sha256"], *(output.sha256 for output in convert.outputs)}

    def digest(self, store: Store) -> dict[str, Any]:
        """The model's name (converters put it into the file) and the content hashes of its files."""
        files = {name: store.sha256(path, f"model: {name}") for name, path in self.files().items()}
        return {"name": self.name, "files": files}


def locate(model: str) -> Source:
    """Finds the model, and downloads it if it is of the hub.

    Parameters:
        model: a GGUF file, the directory of a checkpoint, or a repository or a GGUF of the hub.

    Raises:
        BitladderError: `model` is none of these.
    """
    path = pathlib.Path(model)
    if hub.names_file(model):
        path = hub.fetch(model, "MODEL").path
    if path.is_file():
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise BitladderError(f"{path} is not a GGUF file; name a GGUF, a checkpoint's directory or a hub id")
        return Source(path, path.name, None)
    folder = hub.fetch_checkpoint(model)
    if not path.is_dir():
        return Source(folder, model, model)
    identity = hub.hub_id(folder)
    return Source(folder, identity or folder.resolve().name, identity)


def describe(path: pathlib.Path) -> dict[str, Any]:
    """Facts of the full-precision GGUF for later steps and the card, as JSON.

    Parameters:
        path: the file, or the first shard of a split model. The value "bytes" counts all shards.

    Raises:
        BitladderError: the model is quantized already, or has no weights.
    """
    with open_model(path) as file:
        refuse_quantized(file, str(path))
        weights: dict[str, int] = {}
        for tensor in file.tensors.values():
            if len(tensor.shape) > 1:
                weights[tensor.type.name] = weights.get(tensor.type.name, 0) + tensor.elements
        if not weights:
            raise BitladderError(f"{path} has no weight matrices; it is not a model")
        general = {key: value.python() for key, value in file.metadata.items() if key.startswith("general.")}
        return {
            "file": path.name,
            "stem": file_stem(general, plain_path(path).stem),
            "architecture": file.architecture,
            "encoding": max(weights, key=lambda name: weights[name]).upper(),
            "bytes": file.size,
            "bpw": file.bpw,
            "parameters": sum(tensor.elements for tensor in file.tensors.values()),
            "prediction_weights": sum(file.tensors[name].elements for name in prediction_tensors(file)),
            "general": {key.removeprefix("general."): value for key, value in general.items()},
            "origin": _origin(general),
        }


def file_stem(general: Mapping[str, Any], fallback: str) -> str:
    """The first part of all file names, by GGUF's naming convention: Base-Size-Finetune-Version.

    Parameters:
        general: the general.* metadata.
        fallback: the stem of a model without a name, which gets no encoding at its end.
    """
    general = {key: value for key, value in general.items() if isinstance(value, str)}
    if not (general.get("general.basename") or general.get("general.name")):
        return _ENCODING.sub("", fallback)
    keys = {"name": "model_name", "basename": "base_name", "finetune": "finetune_string", "version": "version_string"}
    parts = {parameter: general.get(f"general.{key}") for key, parameter in keys.items()}
    stem: str = gguf.naming_convention(**parts, size_label=general.get("general.size_label"), output_type=None)
    return file_name(stem)


def _origin(general: Mapping[str, Any]) -> str | None:
    for key in ORIGINS:
        match = _HUB_URL.match(str(general.get(key, "")))
        if match:
            return match[1]
    return None


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

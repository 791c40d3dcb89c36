"""What is said about a model beside its weights: general.* from the card, config.json and the directory, and sampling.

The front matter of a card is YAML that somebody wrote by hand. What it says never stops a conversion.
"""

import dataclasses
import pathlib
import re
from typing import Any

import gguf
import yaml

from bitladder.convert.checkpoint_files import (
    MAX_INTEGER,
    Config,
    brief,
    decimal_number,
    plain,
    read_optional,
    whole_number,
)
from bitladder.files import file_name
from bitladder.hub import hub_id
from bitladder.progress import Progress

# A path on a machine, and no id of a repository.
LOCAL_PATH = re.compile(r"^([/~.\\]|[A-Za-z]:[\\/])")
# Bytes of a card that are looked at, and characters of what is read as YAML, which is slow. What matters of a card has
# some hundred characters, and no brackets within brackets within brackets.
LONGEST, LONGEST_YAML, DEEPEST = 1 << 22, 1 << 15, 16
# Characters of a value. The longest that makes sense is a description.
LONGEST_VALUE = 4000
# What the gguf package looks for, as a text or as a list of texts.
TEXTS = frozenset(
    f"{prefix}{key}"
    for prefix in ("", "model_")
    for key in (
        *("name", "author", "version", "organization", "description", "finetune", "basename", "size_label"),
        *("url", "doi", "uuid", "repo_url", "creator", "type"),
    )
) | {"license_name", "license_link"}
LISTS = frozenset({"tags", "pipeline_tag", "language", "languages", "license"})
# Models and data sets, each an id or an object with these keys.
ORIGINS = frozenset({"base_model", "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources"})
ORIGIN_KEYS = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")
_KEY = re.compile(r"""["']?([A-Za-z_][\w-]*)["']?\s*:(?:\s|$)""")
Value = str | list[str | dict[str, str]]


class _Texts(yaml.SafeLoader):
    """A loader to which every scalar is a text, but null: `no` is a language, and 1.0 a version."""


_Texts.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] == "tag:yaml.org,2002:null"]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_card(folder: pathlib.Path, progress: Progress) -> dict[str, Value]:
    """What README.md says of the model: texts, and lists of texts or of objects with texts.

    Local paths, and what is not of the type that it must have, are left out with a warning.

    Parameters:
        folder: directory of the checkpoint.
        progress: gets the warnings.

    Returns:
        Values by key, for `gguf.Metadata.apply_metadata_heuristic`.
    """
    path = folder / "README.md"
    card = _front_matter(path, progress)
    values: dict[str, Value] = {}
    left_out = []
    for key, value in card.items():
        if key not in TEXTS | LISTS | ORIGINS or value is None:
            continue
        kept: Value | None
        if key in TEXTS:
            kept = _text(value)
            failed = kept is None
        else:
            entries = value if isinstance(value, list) else [value]
            items = [_origin(entry) if key in ORIGINS else _text(entry) for entry in entries]
            kept = [item for item in items if item is not None]
            failed = len(kept) < sum(entry is not None for entry in entries)
        if failed:
            left_out.append(key)
        if kept:
            values[key] = kept
    if left_out:
        progress.warn(f"{path}: {', '.join(sorted(left_out))} holds what cannot be written to a GGUF; it is left out")
    licenses = values.get("license")
    if isinstance(licenses, list):
        values["license"] = ",".join(str(entry) for entry in licenses)
    return values


def clean(text: str) -> str:
    """A text on one line, without control characters and halves of surrogate pairs, and not too long."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(text.split())[:LONGEST_VALUE]


def _front_matter(path: pathlib.Path, progress: Progress) -> dict[Any, Any]:
    """The YAML between the first two lines `---`; empty if there is none, with a warning if it cannot be read."""
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as stream:
            data = stream.read(LONGEST)
    except OSError as error:
        progress.warn(f"cannot read {path}: {error.strerror}; the GGUF gets no metadata from it")
        return {}
    # A line of Latin-1 spoils only the letters in it that are not ASCII.
    lines = data.decode("utf-8-sig", "replace").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() in ("---", "...")), None)
    # Tabs, which YAML forbids, are in some cards.
    text = "\n".join(_needed(lines[1:end])).replace("\t", "  ")
    try:
        if len(text) > LONGEST_YAML:
            raise ValueError(f"it has more than {LONGEST_YAML} characters")
        _check_depth(text)
        card = yaml.load(text, Loader=_Texts)
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        progress.warn(
            f"{path}: the front matter cannot be read ({plain(reason, 200)}); the GGUF gets no metadata from it"
        )
        return {}
    if card is not None and not isinstance(card, dict):
        progress.warn(f"{path}: the front matter is no list of names and values; the GGUF gets no metadata from it")
    return card if isinstance(card, dict) else {}


def _needed(lines: list[str]) -> list[str]:
    """The lines of the keys that are looked for. Results of benchmarks can have a hundred thousand others."""
    kept, keep = [], True
    for line in lines:
        key = _KEY.match(line)
        if key:
            keep = key[1] in TEXTS | LISTS | ORIGINS
        if keep:
            kept.append(line)
    return kept


def _check_depth(text: str) -> None:
    """Raises ValueError for brackets within too many brackets."""
    depth = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")


def _text(value: Any) -> str | None:
    """A text that can be written; None for another type, for nothing, and for a local path."""
    text = clean(value) if isinstance(value, str) else ""
    return text if text and not LOCAL_PATH.match(text) else None


def _origin(value: Any) -> str | dict[str, str] | None:
    """The id of a model or data set, or the texts that an object says of it. None if there is neither."""
    if not isinstance(value, dict):
        text = _text(value)
        # OWNER/NAME, NAME, or an address. "outputs/checkpoint-1000" is a folder of a training.
        return None if text is None or re.search(r"(^|/)checkpoint-\d+/?$|\s", text) else text
    texts = {key: text for key in ORIGIN_KEYS if (text := _text(value.get(key))) is not None}
    return texts or None


_SIZE = re.compile(r"[\w.-]{1,40}")


def read_metadata(folder: pathlib.Path, config: Config, parameters: int, progress: Progress) -> gguf.Metadata:
    """The metadata that the gguf package's heuristics find, without local paths, and the sampling defaults.

    Parameters:
        folder: directory of the checkpoint.
        config: its config.json.
        parameters: number of weights.
        progress: gets a warning of what is left out.
    """
    identity = hub_id(folder)
    written = config.get("_name_or_path")
    written = clean(written) if isinstance(written, str) and not LOCAL_PATH.match(written) else None
    card: dict[str, Any] = dict(read_card(folder, progress))
    place = None if identity else folder.resolve()
    metadata = gguf.Metadata.apply_metadata_heuristic(
        read_sampling(folder, progress), card, {"_name_or_path": identity or written or None}, place, parameters
    )
    for field in dataclasses.fields(metadata):
        value = getattr(metadata, field.name)
        if isinstance(value, str):
            setattr(metadata, field.name, clean(value) or None)
    if metadata.name is None:
        metadata.name = clean(folder.resolve().name) or "model"
    if metadata.size_label is None or not _SIZE.fullmatch(metadata.size_label):
        metadata.size_label = gguf.size_label(parameters, parameters, 0, 0)
    return metadata


def default_file_name(metadata: gguf.Metadata, outtype: str) -> str:
    """A file name by GGUF's naming convention, such as Tiny-15M-F16.gguf. It is no path, whatever the metadata are."""
    encoding = f"-{outtype.upper()}.gguf"
    stem = gguf.naming_convention(
        metadata.name, metadata.basename, metadata.finetune, metadata.version, metadata.size_label, None
    )
    return file_name(stem, encoding)


# The field of gguf.Metadata, by the key of generation_config.json. The first ones are whole numbers, the rest not.
WHOLE = {"top_k": "sampling_top_k", "penalty_last_n": "sampling_penalty_last_n", "mirostat": "sampling_mirostat"}
DECIMAL = {
    "top_p": "sampling_top_p",
    "min_p": "sampling_min_p",
    "xtc_probability": "sampling_xtc_probability",
    "xtc_threshold": "sampling_xtc_threshold",
    "temperature": "sampling_temp",
    "penalty_repeat": "sampling_penalty_repeat",
    "mirostat_tau": "sampling_mirostat_tau",
    "mirostat_eta": "sampling_mirostat_eta",
}


def read_sampling(folder: pathlib.Path, progress: Progress) -> gguf.Metadata:
    """The sampling defaults of a checkpoint. What is no number is left out with a warning.

    Parameters:
        folder: directory of the checkpoint.
        progress: gets warnings.
    """
    values = read_optional(folder / "generation_config.json", progress)
    metadata = gguf.Metadata()
    for key in (*WHOLE, *DECIMAL, "sequence"):
        value: Any = values.get(key)
        if value is None:
            continue
        number: Any
        if key == "sequence":
            field, number = "sampling_sequence", value if isinstance(value, str) and value.isprintable() else None
        elif key in WHOLE:
            field, number = WHOLE[key], whole_number(value)
            number = number if number is not None and abs(number) <= MAX_INTEGER else None
        else:
            field, number = DECIMAL[key], decimal_number(value)
        if number is None:
            progress.warn(f"generation_config.json: {key} {brief(value)} cannot be written to a GGUF; it is left out")
        setattr(metadata, field, number)
    return metadata

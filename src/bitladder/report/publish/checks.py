"""What would embarrass a published ladder: paths of this machine, a quant that nobody finds, a card without licence."""

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from bitladder.errors import BitladderError
from bitladder.hub.quant_files import PRESET, pick, side_word
from bitladder.report.publish.contents import CARD, Entry

# A path of this machine: /home/…, ~/…, ./…, C:\…, \\server, file:…
_LOCAL = re.compile(r"(/|~|\.{1,2}[/\\]|[A-Za-z]:[\\/]|\\\\|file:)")
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# huggingface.co gives files by plain HTTP, as llama.cpp asks for them, only up to this size.
MOST_BYTES = 50_000_000_000
TEXTS = (".md", ".html", ".json", ".toml")


def front_matter(folder: pathlib.Path) -> dict[str, Any]:
    """The YAML at the top of the card. Raises BitladderError if there is none, or it is no mapping."""
    path = folder / CARD
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        value = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise BitladderError(f"{path}: the front matter is no YAML; `bitladder card` writes it again") from error
    if not isinstance(value, dict):
        raise BitladderError(f"{path} has no front matter; `bitladder card` writes it again")
    return value


def check_private(folder: pathlib.Path, entries: Sequence[Entry]) -> None:
    """Refuse what tells of this machine: a local path in the front matter, or the run directory's own anywhere.

    Raises BitladderError that names the file and key.
    """
    for key, value in _strings(front_matter(folder)):
        if _LOCAL.match(value):
            raise BitladderError(
                f"{folder / CARD}: {key} is a path of this machine ({value}); name the model on the hub with "
                "`bitladder run --base-model OWNER/NAME`, or mend the card"
            )
    here = str(folder.resolve())
    for entry in entries:
        if pathlib.PurePath(entry.name).suffix in TEXTS:
            text = (folder / entry.name).read_text(encoding="utf-8", errors="replace")
            if len(here) > 1 and here in text:
                raise BitladderError(
                    f"{folder / entry.name} holds the path {here}; take it out, or make the file again"
                )


def warnings(folder: pathlib.Path, entries: Sequence[Entry]) -> list[str]:
    """What a reader of the published page will miss, in lines."""
    found = []
    front = front_matter(folder)
    base = front.get("base_model")
    if not base:
        found.append(f"{CARD} names no base_model: the hub will not show whose quants these are (--base-model of run)")
    elif not all(_ID.fullmatch(str(one)) for one in (base if isinstance(base, list) else [base])):
        found.append(f"{CARD}: base_model {base} is no hub id (OWNER/NAME)")
    if not front.get("license"):
        found.append(f"{CARD} names no license; the source model's applies to its quants, and should be said")
    names = [entry.name for entry in entries]
    for entry in entries:
        if entry.rung is None:
            continue
        if word := side_word(entry.name):
            found.append(f'{entry.name}: llama.cpp never takes a file with "{word}" in its name for a model')
        elif (taken := pick(names, entry.rung)) != entry.name:
            found.append(f"{entry.name}: -hf REPO:{entry.rung} takes {taken}")
        if entry.bytes > MOST_BYTES:
            found.append(
                f"{entry.name} has {entry.bytes / 1e9:.0f} GB: llama.cpp cannot download more than 50 in one file"
            )
    if PRESET in names:
        found.append(f"{PRESET}: llama.cpp would read it instead of the models")
    return found


def default_file(entries: Sequence[Entry]) -> str | None:
    """The file that `-hf REPO` takes, without a quant's name."""
    return pick([entry.name for entry in entries])


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings of nested lists and mappings, with the keys that lead to them."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)

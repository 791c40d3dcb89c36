"""Chat templates: the one that transformers' tokenizer has, and those beside it."""

import pathlib
import re
from typing import Any

import gguf

from bitladder.convert.config import brief, read_json
from bitladder.convert.vocabulary import encodes
from bitladder.errors import BitladderError
from bitladder.progress import Progress

DEFAULT = "default"


def read_chat_templates(folder: pathlib.Path, progress: Progress) -> dict[str, str]:
    """The chat templates of a checkpoint by name.

    Files count before tokenizer_config.json: chat_template.jinja is the default, additional_chat_templates/NAME.jinja
    are others. chat_template.json, which only processors of older models have, counts last.

    Parameters:
        folder: directory of the checkpoint.
        progress: gets a warning where two places have different templates, and of each that cannot be used.

    Returns:
        Texts by name. "default" is the one that is used without a name.
    """
    files = {}
    if (folder / "chat_template.jinja").is_file():
        files[DEFAULT] = folder / "chat_template.jinja"
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    first = {name: text for name, path in files.items() if (text := _text(path, progress)) is not None}
    configured = _json_templates(folder / "tokenizer_config.json", progress)
    legacy = _json_templates(folder / "chat_template.json", progress)
    chosen = first
    for name, others in (("tokenizer_config.json", configured), ("chat_template.json", legacy)):
        if DEFAULT in chosen and others.get(DEFAULT, chosen[DEFAULT]) != chosen[DEFAULT]:
            progress.warn(
                f"the chat template in {name} differs from that in"
                f" {'chat_template.jinja' if DEFAULT in first else 'tokenizer_config.json'}; the latter is taken, as in"
                " transformers"
            )
        elif DEFAULT not in chosen:
            if chosen and DEFAULT in others:
                progress.warn(
                    f"the default chat template is that of {name}; transformers would take only"
                    " additional_chat_templates, among which there is no default"
                )
            chosen = others | chosen
    return chosen


def write_chat_templates(templates: dict[str, str], writer: gguf.GGUFWriter) -> None:
    """Writes chat templates, the named ones under their names in letters, digits and underscores."""
    named: dict[str, str] = {}
    for name, text in templates.items():
        if name != DEFAULT:
            key = re.sub(r"[^A-Za-z0-9]", "_", name) or "_"
            while key in named or key == DEFAULT:
                key += "_"
            named[key] = text
    for key, text in sorted(named.items()):
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=key), text)
    if named:
        writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, sorted(named))
    if DEFAULT in templates:
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE, templates[DEFAULT])


def _text(path: pathlib.Path, progress: Progress) -> str | None:
    try:
        return _usable(path.read_text(encoding="utf-8"), str(path), progress)
    except (OSError, UnicodeDecodeError) as error:
        progress.warn(f"{path} is not text in UTF-8 that can be read ({type(error).__name__}); it is left out")
        return None


def _json_templates(path: pathlib.Path, progress: Progress) -> dict[str, str]:
    """The templates of tokenizer_config.json or chat_template.json: a text, an object or a list of them."""
    try:
        value: Any = read_json(path).get("chat_template") if path.is_file() else None
    except BitladderError as error:
        progress.warn(f"{error}; its chat template is left out")
        return {}
    if value is None:
        return {}
    entries: list[tuple[Any, Any]] = [(DEFAULT, value)]
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = [
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else ("", entry) for entry in value
        ]
    templates = {}
    for name, text in entries:
        named = isinstance(name, str) and bool(name)
        where = f"{path}: the chat template {brief(name) if named else 'without a name'}"
        usable = _usable(text if named else None, where, progress)
        if usable is not None:
            templates[name] = usable
    return templates


def _usable(text: Any, where: str, progress: Progress) -> str | None:
    """A template that can be written; otherwise None, with a warning."""
    if isinstance(text, str) and text.strip() and encodes(text):
        return text
    what = "is empty" if text in ("", None) else f"cannot be written: {brief(text)}"
    progress.warn(f"{where} {what}; it is left out")
    return None

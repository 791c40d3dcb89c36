"""The tokenizer of a checkpoint, of whichever kind: read, and written with its chat templates."""

import pathlib
import re
from typing import Any

import gguf

from bitladder.convert.bpe import is_byte_level, read_bpe
from bitladder.convert.checkpoint_files import brief, read_json
from bitladder.convert.sentencepiece import has_pieces, read_byte_fallback, read_sentencepiece
from bitladder.convert.special_tokens import read_special_tokens
from bitladder.convert.vocabulary import Vocabulary, encodes
from bitladder.errors import BitladderError
from bitladder.progress import SILENT, Progress

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


_KEYS = {
    "bos": gguf.Keys.Tokenizer.BOS_ID,
    "eos": gguf.Keys.Tokenizer.EOS_ID,
    "unk": gguf.Keys.Tokenizer.UNK_ID,
    "sep": gguf.Keys.Tokenizer.SEP_ID,
    "pad": gguf.Keys.Tokenizer.PAD_ID,
    "mask": gguf.Keys.Tokenizer.MASK_ID,
    "eot": gguf.Keys.Tokenizer.EOT_ID,
    "eom": gguf.Keys.Tokenizer.EOM_ID,
    "fim_pad": gguf.Keys.Tokenizer.FIM_PAD_ID,
    "fim_rep": gguf.Keys.Tokenizer.FIM_REP_ID,
    "fim_sep": gguf.Keys.Tokenizer.FIM_SEP_ID,
}


def read_vocabulary(folder: pathlib.Path, size: int, progress: Progress = SILENT) -> Vocabulary:
    """Reads the vocabulary of a checkpoint.

    The first of these is read: tokenizer.json with byte-level BPE, tokenizer.model of SentencePiece, tokenizer.json
    with SentencePiece BPE in transformers' form.

    Parameters:
        folder: directory of the checkpoint.
        size: tokens of the embeddings.
        progress: gets warnings.

    Raises:
        BitladderError: there is none of them, or llama.cpp cannot reproduce the tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            return read_sentencepiece(folder, size, progress)
        hint = "; transformers' AutoTokenizer can write one (save_pretrained)" if any(folder.glob("vocab.*")) else ""
        raise BitladderError(f"{folder} has neither tokenizer.json nor tokenizer.model{hint}")
    tokenizer = read_json(path)
    model, before = tokenizer.get("model"), tokenizer.get("pre_tokenizer")
    kind = model.get("type", "BPE" if "merges" in model else None) if isinstance(model, dict) else None
    try:
        vocabulary = _read(folder, tokenizer, size, progress) if kind == "BPE" else None
        if vocabulary is not None:
            vocabulary.before, vocabulary.after = added_around(tokenizer.get("post_processor"), vocabulary, path)
            return vocabulary
    except RecursionError as error:
        raise BitladderError(f"{path} is nested too deeply to be read") from error
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise BitladderError(f"{path} is not a tokenizer.json that can be read: {brief(repr(error))}") from error
    described = before.get("type") if isinstance(before, dict) else before
    raise BitladderError(
        f"{path}: a {brief(kind)} tokenizer with the pre-tokenizer {brief(described)} is not one that bitladder"
        " converts (byte-level BPE, SentencePiece BPE); --converter PATH runs llama.cpp's own convert_hf_to_gguf.py"
    )


def _read(folder: pathlib.Path, tokenizer: dict[str, Any], size: int, progress: Progress) -> Vocabulary | None:
    """The vocabulary of a BPE; None if it is of no kind that is converted."""
    if is_byte_level(tokenizer.get("pre_tokenizer")):
        return read_bpe(folder, tokenizer, size, progress)
    if (folder / "tokenizer.model").is_file() and has_pieces(folder, tokenizer, progress):
        return read_sentencepiece(folder, size, progress)
    if tokenizer["model"].get("byte_fallback"):
        return read_byte_fallback(folder, tokenizer, size, progress)
    return None


def added_around(processor: Any, vocabulary: Vocabulary, path: pathlib.Path) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after each text.

    Parameters:
        processor: `post_processor` of tokenizer.json.
        vocabulary: the vocabulary.
        path: tokenizer.json, for the error.

    Returns:
        Ids before the text, and ids after it.

    Raises:
        BitladderError: a token is not in the vocabulary.
    """
    before: list[int] = []
    after: list[int] = []
    if not isinstance(processor, dict):
        return before, after
    kind = processor.get("type")
    if kind == "Sequence":
        for part in processor.get("processors") or []:
            first, last = added_around(part, vocabulary, path)
            before, after = first + before, after + last
        return before, after
    if kind in ("RobertaProcessing", "BertProcessing"):
        before, after = [processor["cls"][1]], [processor["sep"][1]]
    elif kind == "TemplateProcessing":
        place = before
        for piece in processor.get("single") or []:
            if "Sequence" in piece:
                place = after
            else:
                place += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    for token in before + after:
        if type(token) is not int or not 0 <= token < len(vocabulary.tokens):
            raise BitladderError(
                f"{path}: the post_processor adds token {brief(token)}, which is not in the vocabulary"
            )
    return before, after


def write_vocabulary(vocabulary: Vocabulary, folder: pathlib.Path, writer: gguf.GGUFWriter, progress: Progress) -> None:
    """Writes tokenizer.* with the special tokens and the chat templates of the checkpoint."""
    special = read_special_tokens(folder, vocabulary, progress)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(special.types)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for role, token in special.ids.items():
        writer.add_uint32(_KEYS[role], token)
    # The flags are always written, because llama.cpp's defaults depend on the name of the pre-tokenizer.
    writer.add_add_bos_token(special.add_bos)
    writer.add_add_eos_token(special.add_eos)
    write_chat_templates(read_chat_templates(folder, progress), writer)

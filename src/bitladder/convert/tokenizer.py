"""The tokenizer of a checkpoint, of whichever kind: it is read, and written with all that belongs to it."""

import pathlib
from typing import Any

import gguf

from bitladder.convert.bpe import read_bpe
from bitladder.convert.chat_templates import read_chat_templates, write_chat_templates
from bitladder.convert.config import brief, read_json
from bitladder.convert.pretokenizers import is_byte_level
from bitladder.convert.sentencepiece import has_pieces, read_byte_fallback, read_sentencepiece
from bitladder.convert.special_tokens import read_special_tokens
from bitladder.convert.vocabulary import Vocabulary
from bitladder.errors import BitladderError
from bitladder.progress import SILENT, Progress

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

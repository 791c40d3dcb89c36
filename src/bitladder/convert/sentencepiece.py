"""SentencePiece BPE (Llama 1 and 2): tokenizer.model, or the same in tokenizer.json → tokenizer.ggml.model "llama".

llama.cpp joins the neighbours whose joined token has the highest score, so it needs only scores. tokenizer.model is a
protocol buffer (sentencepiece_model.proto). The few fields that are needed are read without the sentencepiece package.
"""

import math
import pathlib
import re
import struct
from collections.abc import Iterator
from typing import Any

from bitladder.convert.bpe import read_merges
from bitladder.convert.checkpoint_files import brief, read_json
from bitladder.convert.vocabulary import (
    LONGEST,
    Kind,
    Vocabulary,
    added_tokens,
    base_tokens,
    lay_out,
    refuse_duplicates,
)
from bitladder.errors import BitladderError
from bitladder.progress import Progress

META = "▁"  # U+2581, written for a space
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# The score of tokens that no merge makes, below that of any merge.
LOWEST = -1e6
BPE_MODEL = 2
PADDING_SCORE = -10000.0
Message = dict[int, list[Any]]


def read_sentencepiece(folder: pathlib.Path, size: int, progress: Progress) -> Vocabulary:
    """The vocabulary of tokenizer.model, with the added tokens of the other files.

    Parameters:
        folder: directory of the checkpoint.
        size: tokens to which the vocabulary is padded.
        progress: gets warnings.

    Raises:
        BitladderError: the file is no SentencePiece model, or one that llama.cpp cannot reproduce (unigram, no byte
            pieces, spaces as suffixes).
    """
    path = folder / "tokenizer.model"
    try:
        model = parse_message(path.read_bytes())
        pieces = [parse_message(piece) for piece in model[1]]
        texts = _texts(pieces)
        trainer, normalizer = (parse_message(model.get(field, [b""])[0]) for field in (2, 3))
        scores = [struct.unpack("<f", piece[2][0])[0] if 2 in piece else 0.0 for piece in pieces]
        if not all(map(math.isfinite, scores)):
            raise ValueError("a score is not finite")
        # The numbers of ModelProto.SentencePiece.Type are those of GGUF's token types; NORMAL is the default.
        kinds = [int(Kind(piece.get(3, [1])[0])) for piece in pieces]
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise BitladderError(f"{path} is not a SentencePiece model") from error
    if trainer.get(3, [1])[0] != BPE_MODEL:
        raise BitladderError(f"{path} is not of SentencePiece's BPE kind; llama.cpp's llama tokenizer needs that")
    if trainer.get(24, [0])[0]:
        raise BitladderError(f"{path} writes spaces as suffixes, which llama.cpp's llama tokenizer does not")
    if Kind.BYTE not in kinds:
        raise BitladderError(f"{path} has no byte pieces (byte_fallback), which llama.cpp's llama tokenizer needs")
    if normalizer.get(2, [b""])[0] or normalizer.get(4, [1])[0]:
        progress.warn("the tokenizer normalizes text (Unicode forms, repeated spaces) first; llama.cpp does not")
    tokens, types = _merge_added(size, dict(enumerate(texts)), kinds, folder=folder, progress=progress)
    return Vocabulary(
        "llama",
        "default",
        tokens,
        types,
        scores=(scores + [PADDING_SCORE] * size)[:size],
        add_space_prefix=_space_prefix(folder, bool(normalizer.get(3, [1])[0])),
        ids=_trainer_ids(trainer, len(texts)),
    )


def has_pieces(folder: pathlib.Path, tokenizer: dict[str, Any], progress: Progress) -> bool:
    """Whether tokenizer.model has the tokens of tokenizer.json, which transformers goes by.

    Raises BitladderError if they differ and tokenizer.json has no bytes for unknown letters, without which it cannot be
    taken instead. If it can, the user is told.
    """
    path = folder / "tokenizer.model"
    try:
        texts = _texts([parse_message(piece) for piece in parse_message(path.read_bytes())[1]])
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise BitladderError(f"{path} is not a SentencePiece model") from error
    vocab = base_tokens(tokenizer["model"]["vocab"], folder / "tokenizer.json")
    added = added_tokens(folder)
    differ = [i for i, text in enumerate(texts) if vocab.get(i, text) != text]
    differ += [i for i in vocab if i >= len(texts) and i not in added]
    if not differ:
        return True
    what = f"{path} and tokenizer.json have different tokens (the first is {differ[0]})"
    if not tokenizer["model"].get("byte_fallback"):
        raise BitladderError(f"{what}; remove the one that does not belong to the model")
    progress.warn(f"{what}; tokenizer.json is taken, as in transformers")
    return False


def _texts(pieces: list[Message]) -> list[str]:
    texts = [piece[1][0].decode("utf-8") for piece in pieces]
    if any(len(text) > LONGEST for text in texts):
        raise ValueError("a piece is too long")
    return texts


def read_byte_fallback(folder: pathlib.Path, tokenizer: dict[str, Any], size: int, progress: Progress) -> Vocabulary:
    """The vocabulary of a tokenizer.json with a byte_fallback BPE.

    The score of a token is minus the rank of its first merge.

    Parameters:
        folder: directory of the checkpoint.
        tokenizer: content of tokenizer.json.
        size: tokens to which the vocabulary is padded.
        progress: gets warnings.

    Raises:
        BitladderError: the tokenizer does not treat spaces as SentencePiece does.
    """
    path = folder / "tokenizer.json"
    model = tokenizer["model"]
    by_id = base_tokens(model["vocab"], path)
    prefix = _prefix_of(tokenizer, path)
    merges = read_merges(model.get("merges", []), path)
    rank: dict[str, int] = {}
    for i, (first, second) in enumerate(merges):
        rank.setdefault(first + second, i)
    if not merges_are_all_splits(model["vocab"], merges):
        progress.warn("some tokens can be joined in ways no merge lists; llama.cpp may tokenize those differently")
    if tokenizer.get("pre_tokenizer"):
        progress.warn(
            "transformers puts a space before a text that has none, and only there; llama.cpp before every text and"
            " after every special token"
        )
    # A token beyond the embeddings is left out: its id can be any number.
    texts = [by_id.get(i) for i in range(min(max(by_id) + 1, size))]
    kinds = [int(_kind(text)) for text in texts]
    if int(Kind.BYTE) not in kinds:
        raise BitladderError(f"{path} has no byte tokens <0x00> … <0xFF>, which llama.cpp's llama tokenizer needs")
    unknown = model["vocab"].get(model.get("unk_token"))
    unknown = unknown if unknown is not None and unknown < len(texts) else None
    if unknown is not None:
        kinds[unknown] = int(Kind.UNKNOWN)
    tokens, types = _merge_added(size, by_id, kinds, folder=folder, progress=progress)
    scores = [float(-rank[text]) if text in rank else LOWEST for text in texts]
    return Vocabulary(
        "llama",
        "default",
        tokens,
        types,
        scores=(scores + [PADDING_SCORE] * size)[:size],
        add_space_prefix=_space_prefix(folder, prefix),
        ids={} if unknown is None else {"unk": unknown},
    )


def merges_are_all_splits(vocab: dict[str, int], merges: list[tuple[str, str]]) -> bool:
    """Whether every pair of tokens whose joined text is a token has a merge. llama.cpp joins any such pair."""
    known = set(merges)
    return all(
        (text[:cut], text[cut:]) in known
        for text in vocab
        if not BYTE.fullmatch(text)
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    )


def parse_message(data: bytes) -> Message:
    """The fields of a protocol buffer by number: varints as integers, others as bytes. Raises ValueError."""
    fields: Message = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError("cut short")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _merge_added(
    size: int,
    texts: dict[int, str],
    kinds: list[int],
    *,
    folder: pathlib.Path,
    progress: Progress,
) -> tuple[list[str], list[int]]:
    """As `lay_out`, but pieces keep their types, and user-defined tokens get spaces for U+2581."""
    added = added_tokens(folder)
    tokens, types = lay_out(size, texts, added, folder=folder, progress=progress)
    for i, kind in enumerate(kinds[:size]):
        # Pieces of the model that added tokens name again keep their types, the unknown piece among them.
        if i not in added or kind in (Kind.UNKNOWN, Kind.CONTROL):
            types[i] = kind
    for i, kind in enumerate(types):
        if kind == Kind.USER_DEFINED:
            tokens[i] = tokens[i].replace(META, " ")
    refuse_duplicates(tokens, folder)
    return tokens, types


def _trainer_ids(trainer: Message, count: int) -> dict[str, int]:
    """The special tokens of TrainerSpec (fields 40 to 43, with their defaults). −1 means none."""
    ids = {}
    for name, field, default in (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1)):
        value = trainer.get(field, [default])[0]
        if isinstance(value, int) and 0 <= value < count:
            ids[name] = value
    return ids


def _kind(text: str | None) -> Kind:
    if text is None:
        return Kind.UNUSED
    return Kind.BYTE if BYTE.fullmatch(text) else Kind.NORMAL


def _space_prefix(folder: pathlib.Path, default: bool) -> bool:
    """Whether a space goes before a text: what transformers takes of three places, or the default.

    Llama's class goes by `add_prefix_space` of tokenizer_config.json, other classes by tokenizer.json.
    """
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    described = folder / "tokenizer.json"
    flag, kind = config.get("add_prefix_space"), config.get("tokenizer_class")
    if isinstance(flag, bool) and (not described.is_file() or kind in (None, "LlamaTokenizer", "LlamaTokenizerFast")):
        return flag
    try:
        return _prefix_of(read_json(described), described) if described.is_file() else default
    except BitladderError:  # tokenizer.model is taken, whatever form tokenizer.json has
        return default


def _prefix_of(tokenizer: dict[str, Any], path: pathlib.Path) -> bool:
    """Whether a space goes before the text. Raises BitladderError if more is changed than spaces to U+2581."""
    steps = tokenizer.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = steps.get("normalizers", []) if steps.get("type") == "Sequence" else [steps]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": META}
    prepend = {"type": "Prepend", "prepend": META}
    before = tokenizer.get("pre_tokenizer")
    if before is None and steps in ([replace], [prepend, replace]):
        return prepend in steps
    if before is not None and before.get("type") == "Metaspace" and not steps:
        scheme = before.get("prepend_scheme", "always" if before.get("add_prefix_space", True) else "never")
        if before.get("replacement") == META and not before.get("split", True):
            return bool(scheme != "never")
    raise BitladderError(
        f"{path}: llama.cpp's llama tokenizer cannot reproduce the normalizer"
        f" {brief(tokenizer.get('normalizer'), 200)} with the pre-tokenizer {brief(before, 200)};"
        " --converter PATH runs llama.cpp's own convert_hf_to_gguf.py"
    )

"""A vocabulary as a GGUF holds it, and its added tokens."""

import dataclasses
import pathlib
from collections.abc import Set
from typing import Any

import gguf

from bitladder.convert.checkpoint_files import MAX_INTEGER, brief, read_json
from bitladder.errors import BitladderError
from bitladder.progress import Progress
from bitladder.units import number_of

Kind = gguf.TokenType
# Letters of a token. The longest of known vocabularies have some hundred.
LONGEST = 4096


@dataclasses.dataclass
class Vocabulary:
    """A vocabulary.

    Parameters:
        model: llama.cpp's tokenizer, "gpt2" for byte-level BPE or "llama" for SentencePiece BPE.
        pre: llama.cpp's pre-tokenizer.
        tokens: texts of the tokens, in the order of their ids.
        types: types of the tokens.
        scores: scores of the tokens, for SentencePiece BPE.
        merges: merges "a b", for byte-level BPE.
        add_space_prefix: whether a space goes before a text; None if the tokenizer does not say.
        before: tokens that go before each text, by the tokenizer; None leaves it to tokenizer_config.json.
        after: tokens that go after each text, likewise.
        ids: special tokens by role (bos, eos, …). tokenizer_config.json overrides them.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] = dataclasses.field(default_factory=list)
    add_space_prefix: bool | None = None
    before: list[int] | None = None
    after: list[int] | None = None
    ids: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Added:
    """A token that is matched in the text before all others.

    Parameters:
        id: its id.
        text: its text.
        special: whether it is a control token.
        strips: whether it takes in white space beside it, or matches whole words only.
    """

    id: int
    text: str
    special: bool
    strips: bool


def added_tokens(folder: pathlib.Path) -> dict[int, Added]:
    """The added tokens by id, from tokenizer.json, tokenizer_config.json and added_tokens.json.

    As in transformers, the id of tokenizer.json counts for a text that several of them have, and of the rest
    tokenizer_config.json's `added_tokens_decoder`; without it added_tokens.json.

    Raises BitladderError if one of the files is malformed.
    """
    tokens: dict[str, Added] = {}
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        listed = read_json(path).get("added_tokens") or []
        if not isinstance(listed, list):
            raise BitladderError(f"{path}: added_tokens should be a list, not {brief(listed)}")
        for entry in listed:
            token = _added(entry, entry.get("id") if isinstance(entry, dict) else None, path)
            tokens.setdefault(token.text, token)
    decoder = None
    if (folder / "tokenizer_config.json").is_file():
        path = folder / "tokenizer_config.json"
        decoder = read_json(path).get("added_tokens_decoder")
        if not isinstance(decoder, dict | None):
            raise BitladderError(f"{path}: added_tokens_decoder should be an object, not {brief(decoder)}")
        for number, entry in (decoder or {}).items():
            token = _added(entry, number, path)
            if token.text in tokens:
                token = dataclasses.replace(token, id=tokens[token.text].id)
            tokens[token.text] = token
    if decoder is None and (folder / "added_tokens.json").is_file():
        path = folder / "added_tokens.json"
        for text, number in read_json(path).items():
            token = _added({"content": text}, number, path)
            tokens.setdefault(token.text, token)
    return {token.id: token for token in sorted(tokens.values(), key=lambda token: token.id)}


def _added(entry: Any, number: Any, path: pathlib.Path) -> Added:
    """An added token of a file. Raises BitladderError if its text or id cannot be."""
    text = entry.get("content") if isinstance(entry, dict) else None
    if isinstance(number, str) and number.isdecimal() and len(number) < 10:
        number = int(number)
    if not isinstance(text, str) or type(number) is not int or not 0 <= number <= MAX_INTEGER or not encodes(text):
        raise BitladderError(f"{path}: an added token has the text {brief(text)} and the id {brief(number)}")
    strips = any(entry.get(key) for key in ("lstrip", "rstrip", "single_word"))
    return Added(number, text, bool(entry.get("special")), strips)


def base_tokens(vocab: Any, path: pathlib.Path) -> dict[int, str]:
    """The texts of a `vocab` {text: id} by id. Raises BitladderError if one cannot be, or two have the same id."""
    if not isinstance(vocab, dict) or not vocab:
        raise BitladderError(f"{path}: vocab should be an object with tokens, not {brief(vocab)}")
    tokens: dict[int, str] = {}
    for text, number in vocab.items():
        if type(number) is not int or not 0 <= number <= MAX_INTEGER or not encodes(text) or len(text) > LONGEST:
            raise BitladderError(f"{path}: the token {brief(text)} has the id {brief(number)}")
        if tokens.setdefault(number, text) != text:
            raise BitladderError(
                f"{path}: the tokens {brief(tokens[number])} and {brief(text)} both have the id {number}"
            )
    return tokens


def encodes(text: str) -> bool:
    """Whether a text can be written as UTF-8. JSON can hold half of a surrogate pair, which cannot."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def lay_out(
    size: int, base: dict[int, str], added: dict[int, Added], *, folder: pathlib.Path, progress: Progress
) -> tuple[list[str], list[int]]:
    """Tokens and types of the ids 0 … size−1.

    Base tokens are NORMAL. Added tokens are CONTROL if special, otherwise USER_DEFINED. Ids without a token are UNUSED,
    because the embedding matrix is often padded.

    Parameters:
        size: number of ids.
        base: texts of the base tokens by id.
        added: added tokens by id.
        folder: directory of the checkpoint, for errors.
        progress: gets warnings.

    Raises:
        BitladderError: two ids have the same text, with which llama.cpp fails.
    """
    ids = {text: i for i, text in base.items()}
    for i, token in added.items():
        if ids.get(token.text, i) != i:
            progress.warn(
                f"the token {brief(token.text)} has the ids {ids[token.text]} and {i}; transformers uses the first, and"
                " the second is written as unused"
            )
    added = {ids.get(token.text, i): token for i, token in added.items()}
    beyond = [i for i in (base.keys() | added.keys()) if i >= size]
    if beyond:
        progress.warn(
            f"left out: {number_of(len(beyond), 'token')} with ids beyond the model's {number_of(size, 'embedding')}"
        )
    if any(token.strips for token in added.values()):
        first = next(token.text for token in added.values() if token.strips)
        progress.warn(f"added tokens such as {first!r} take in the white space beside them; llama.cpp does not do that")
    texts = ids.keys() | {token.text for token in added.values()}
    tokens = [_placeholder(i, texts) for i in range(size)]
    types = [int(Kind.UNUSED)] * size
    for i, text in base.items():
        if i < size:
            tokens[i], types[i] = text, int(Kind.NORMAL)
    for i, token in added.items():
        if i < size:
            tokens[i], types[i] = token.text, int(Kind.CONTROL if token.special else Kind.USER_DEFINED)
    refuse_duplicates(tokens, folder)
    return tokens, types


def refuse_duplicates(tokens: list[str], folder: pathlib.Path) -> None:
    """Raises BitladderError if llama.cpp sees two tokens with the same text, which ends its process.

    It cuts a text at a zero character, and names an empty one [EMPTY_N].
    """
    seen: dict[str, int] = {}
    for i, text in enumerate(tokens):
        if seen.setdefault(text.partition("\0")[0] or f"[EMPTY_{i}]", i) != i:
            first = seen[text.partition("\0")[0] or f"[EMPTY_{i}]"]
            raise BitladderError(f"{folder}: the tokens {first} and {i} are both {brief(text)} to llama.cpp")


def _placeholder(number: int, texts: Set[str]) -> str:
    text = f"[PAD{number}]"
    while text in texts:
        text = f"[{text}]"
    return text

"""A vocabulary as a GGUF holds it, and its added tokens."""

import dataclasses
import pathlib
from typing import Any

import gguf

from bitladder.convert.checkpoint import read_json
from bitladder.errors import BitladderError
from bitladder.progress import Progress

Kind = gguf.TokenType


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
        add_bos: whether BOS goes before a text. tokenizer_config.json overrides it.
        ids: special tokens by role (bos, eos, …). tokenizer_config.json overrides them.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] = dataclasses.field(default_factory=list)
    add_space_prefix: bool | None = None
    add_bos: bool = False
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
    """The added tokens by id, from tokenizer.json, or from tokenizer_config.json and added_tokens.json.

    Raises BitladderError if one of the files is malformed.
    """
    entries: dict[int, dict[str, Any]] = {}
    try:
        if (folder / "added_tokens.json").is_file():
            entries |= {int(i): {"content": text} for text, i in read_json(folder / "added_tokens.json").items()}
        if (folder / "tokenizer_config.json").is_file():
            decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
            entries |= {int(i): entry for i, entry in decoder.items()}
        if (folder / "tokenizer.json").is_file():
            entries = {int(e["id"]): e for e in read_json(folder / "tokenizer.json").get("added_tokens") or []}
        return {
            i: Added(
                i,
                entry["content"],
                bool(entry.get("special")),
                any(entry.get(key) for key in ("lstrip", "rstrip", "single_word")),
            )
            for i, entry in sorted(entries.items())
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BitladderError(f"{folder}: the added tokens cannot be read: {error!r}") from error


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
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(Kind.UNUSED)] * size
    beyond = [i for i in (base.keys() | added.keys()) if i >= size]
    if beyond:
        progress.warn(f"{len(beyond)} tokens have ids beyond the model's {size} embeddings and are left out")
    if any(token.strips for token in added.values()):
        first = next(token.text for token in added.values() if token.strips)
        progress.warn(f"added tokens such as {first!r} take in the white space beside them; llama.cpp does not do that")
    for i, text in base.items():
        if i < size:
            tokens[i], types[i] = text, int(Kind.NORMAL)
    for i, token in added.items():
        if i < size:
            tokens[i], types[i] = token.text, int(Kind.CONTROL if token.special else Kind.USER_DEFINED)
    seen: dict[str, int] = {}
    for i, text in enumerate(tokens):
        if seen.setdefault(text, i) != i:
            raise BitladderError(f"{folder}: the tokens {seen[text]} and {i} are both {text!r}")
    return tokens, types


def write_vocabulary(vocabulary: Vocabulary, folder: pathlib.Path, writer: gguf.GGUFWriter, progress: Progress) -> None:
    """Writes tokenizer.* with the special tokens and the chat template of the checkpoint."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    special = gguf.SpecialVocab(folder, load_merges=False, n_vocab=len(vocabulary.tokens))
    special.merges = vocabulary.merges
    for name, token in vocabulary.ids.items():
        special.special_token_ids.setdefault(name, token)
    # The flags are always written, because llama.cpp's defaults depend on the name of the pre-tokenizer.
    special.add_special_token.setdefault("bos", vocabulary.add_bos)
    special.add_special_token.setdefault("eos", False)
    for name in ("bos", "eos", "sep"):
        if special.add_special_token.get(name) and name not in special.special_token_ids:
            progress.warn(f"the tokenizer adds a {name} token but does not say which; none will be added")
            special.add_special_token[name] = False
    special.add_to_gguf(writer, quiet=True)

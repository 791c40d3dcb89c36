"""A vocabulary on its way into a GGUF, whatever tokenizer it came from."""

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
    """Tokens in the order of their ids with their types, and what the model type needs besides.

    `model` is llama.cpp's tokenizer: "gpt2" for byte-level BPE (with merges), "llama" for SentencePiece's BPE (with
    scores). The flags and ids are what the tokenizer says by itself; tokenizer_config.json overrides them.
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
    """A token that is matched in the text before anything else."""

    id: int
    text: str
    special: bool
    strips: bool


def added_tokens(folder: pathlib.Path) -> dict[int, Added]:
    """The added tokens by id: of tokenizer.json, else of tokenizer_config.json and added_tokens.json.

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
    """Tokens and types for the ids 0 … size−1: base tokens NORMAL, added ones CONTROL if special, else USER_DEFINED.

    Ids that no token has (the embedding matrix is often padded) become UNUSED. Raises BitladderError if two ids have
    the same text, which llama.cpp does not survive.
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
    """Write tokenizer.* with the special tokens and the chat template of the checkpoint's files."""
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
    # llama.cpp's defaults depend on the pre-tokenizer's name, so the flags are always written.
    special.add_special_token.setdefault("bos", vocabulary.add_bos)
    special.add_special_token.setdefault("eos", False)
    for name in ("bos", "eos", "sep"):
        if special.add_special_token.get(name) and name not in special.special_token_ids:
            progress.warn(f"the tokenizer adds a {name} token but does not say which; none will be added")
            special.add_special_token[name] = False
    special.add_to_gguf(writer, quiet=True)

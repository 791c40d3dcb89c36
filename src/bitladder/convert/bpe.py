"""Byte-level BPE (GPT-2 and after): tokenizer.json → tokenizer.ggml.model "gpt2"."""

import itertools
import pathlib
from typing import Any

from bitladder.convert import pretokenizers
from bitladder.convert.config import brief
from bitladder.convert.vocabulary import Vocabulary, added_tokens, base_tokens, encodes, lay_out
from bitladder.errors import BitladderError
from bitladder.progress import Progress

# How byte-level BPE writes a space.
SPACE = "Ġ"


def read_bpe(folder: pathlib.Path, tokenizer: dict[str, Any], size: int, progress: Progress) -> Vocabulary:
    """The vocabulary of a byte-level BPE tokenizer.

    Warns where llama.cpp tokenizes some texts differently.

    Parameters:
        folder: directory of the checkpoint.
        tokenizer: content of tokenizer.json.
        size: tokens to which the vocabulary is padded.
        progress: gets the warnings.

    Raises:
        BitladderError: llama.cpp tokenizes most texts differently.
    """
    path = folder / "tokenizer.json"
    model = tokenizer["model"]
    if not model.get("merges"):
        raise BitladderError(f"{path}: the BPE model has no merges, which llama.cpp needs")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise BitladderError(f"{path}: a BPE model with {key} {brief(model[key])} is not supported by llama.cpp")
    _check_normalizer(tokenizer.get("normalizer"), path, progress)
    if pretokenizers.adds_prefix_space(tokenizer["pre_tokenizer"]):
        progress.warn("the tokenizer puts a space before the text; llama.cpp does not with this kind of vocabulary")
    base = base_tokens(model["vocab"], path)
    merges = read_merges(model.get("merges", []), path)
    pre = _choose(tokenizer, model["vocab"], merges, path)
    if pre.approximate:
        progress.warn(f"llama.cpp's pre-tokenizer {pre.name!r} differs from the original for letters beyond a–z, A–Z")
    tokens, types = lay_out(size, base, added_tokens(folder), folder=folder, progress=progress)
    return Vocabulary("gpt2", pre.name, tokens, types, merges=[" ".join(pair) for pair in merges])


def read_merges(merges: list[Any], path: pathlib.Path) -> list[tuple[str, str]]:
    """The merges as pairs, from "a b" strings or from ["a", "b"] lists (transformers 4.45 and later).

    Raises BitladderError for an entry that is neither.
    """
    pairs = []
    if not isinstance(merges, list):
        raise BitladderError(f"{path}: merges should be a list, not {brief(merges)}")
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) and p for p in parts):
            raise BitladderError(f"{path}: {brief(merge)} is not a merge of two tokens")
        if not encodes(parts[0] + parts[1]):
            raise BitladderError(f"{path}: the merge {brief(merge)} cannot be written as UTF-8")
        # GGUF writes a merge as "a b": a space inside a token would end it.
        pairs.append((parts[0].replace(" ", SPACE), parts[1].replace(" ", SPACE)))
    return pairs


def merges_reach_all(vocab: dict[str, int], merges: list[tuple[str, str]]) -> bool:
    """Whether merges make every token from its letters. Then `ignore_merges` changes nothing."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    results = {first + second for first, second in merges}
    return all(len(text) == 1 or (text in results and _count_tokens(text, ranks) == 1) for text in vocab)


def _count_tokens(text: str, ranks: dict[tuple[str, str], int]) -> int:
    """The number of tokens that BPE makes of a text: it joins the leftmost neighbours of the lowest rank."""
    parts = list(text)
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts)))
        if rank == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return len(parts)


def _choose(
    tokenizer: dict[str, Any], vocab: dict[str, int], merges: list[tuple[str, str]], path: pathlib.Path
) -> pretokenizers.PreTokenizer:
    """llama.cpp's pre-tokenizer that treats whole words as this tokenizer does, or one where that changes nothing."""
    candidates = pretokenizers.find(tokenizer["pre_tokenizer"], path)
    ignore = bool(tokenizer["model"].get("ignore_merges"))
    for candidate in candidates:
        if candidate.ignore_merges == ignore:
            return candidate
    added = {entry.get("content") for entry in tokenizer.get("added_tokens") or []}
    if merges_reach_all({text: i for text, i in vocab.items() if text not in added}, merges):
        return candidates[0]
    raise BitladderError(
        f"{path}: the tokenizer has ignore_merges = {ignore}, llama.cpp's pre-tokenizer {candidates[0].name!r} the"
        " opposite, and some tokens cannot be reached by merges; --converter PATH runs llama.cpp's own"
        " convert_hf_to_gguf.py"
    )


def _check_normalizer(normalizer: dict[str, Any] | None, path: pathlib.Path, progress: Progress) -> None:
    """Refuses a normalizer: llama.cpp has none before byte-level BPE. NFC gets a warning, as most text is NFC."""
    if normalizer is None:
        return
    if normalizer.get("type") == "Sequence":
        for part in normalizer.get("normalizers", []):
            _check_normalizer(part, path, progress)
    elif normalizer.get("type") == "NFC":
        progress.warn("the tokenizer brings text to Unicode NFC first, which llama.cpp does not: give it NFC text")
    else:
        raise BitladderError(f"{path}: the normalizer {brief(normalizer.get('type'))} is not supported by llama.cpp")

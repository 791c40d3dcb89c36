"""Byte-level BPE (GPT-2 and after): tokenizer.json → tokenizer.ggml.model "gpt2", and its pre-tokenizer.

The pre-tokenizer cuts text into words before BPE. llama.cpp does not read regexes from a GGUF. It has a list of names,
each with built-in regexes and with its own `ignore_merges`: whether a word that is in the vocabulary is one token
without merges. The description in tokenizer.json is therefore reduced to a list of regexes, applied one after the
other, and the list is looked up. Source: llama-vocab.cpp.
"""

import dataclasses
import itertools
import pathlib
from typing import Any

from bitladder.convert.checkpoint_files import brief, plain
from bitladder.convert.vocabulary import Vocabulary, added_tokens, base_tokens, encodes, lay_out
from bitladder.errors import BitladderError
from bitladder.progress import Progress

# How byte-level BPE writes a space.
SPACE = "Ġ"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tiktoken's spelling of the same. The possessive marks change nothing, because neighbouring classes are disjoint and
# \s* matches all line ends but the last one.
_TIKTOKEN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+SUFFIX|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*SUFFIX"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
SEED_CODER = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = _CASED.replace("SUFFIX", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}|" + _CASED_REST
TEKKEN = _CASED.replace("SUFFIX", "") + r"|\p{N}|" + _CASED_REST


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer of llama.cpp.

    Parameters:
        name: llama.cpp's name.
        ignore_merges: whether a word that is in the vocabulary is one token without merges.
        approximate: whether its regexes are only close to the original ones.
    """

    name: str
    ignore_merges: bool = False
    approximate: bool = False


KNOWN: dict[tuple[str, ...], tuple[PreTokenizer, ...]] = {
    (GPT2,): (PreTokenizer("gpt-2"),),
    (r"\p{N}", GPT2): (PreTokenizer("smollm"),),
    # OLMo 2's dolma2 is named dbrx, as in convert_hf_to_gguf.py: Llama 3's regex without its ignore_merges.
    (LLAMA3,): (PreTokenizer("dbrx"), PreTokenizer("llama-bpe", ignore_merges=True)),
    (_TIKTOKEN.replace("DIGITS", r"\p{N}{1,3}"),): (
        PreTokenizer("dbrx"),
        PreTokenizer("llama-bpe", ignore_merges=True),
    ),
    (QWEN2,): (PreTokenizer("qwen2"),),
    (_TIKTOKEN.replace("DIGITS", r"\p{N}"),): (PreTokenizer("bailingmoe"),),
    (SEED_CODER,): (PreTokenizer("seed-coder"),),
    # std::regex has no classes of upper and lower case. llama.cpp uses a–z and A–Z.
    (GPT4O,): (PreTokenizer("gpt-4o", approximate=True),),
    (TEKKEN,): (PreTokenizer("tekken", ignore_merges=True, approximate=True),),
}


def find_pretokenizers(description: dict[str, Any], path: pathlib.Path) -> tuple[PreTokenizer, ...]:
    """The pre-tokenizers of llama.cpp that have the regexes of a description, the best known first.

    Parameters:
        description: `pre_tokenizer` of tokenizer.json.
        path: tokenizer.json, for the error.

    Raises:
        BitladderError: there is none; the message shows the regexes.
    """
    regexes = split_regexes(description)
    if regexes is not None and regexes in KNOWN:
        return KNOWN[regexes]
    shown = " then ".join(regexes) if regexes else brief(description, 400)
    raise BitladderError(
        f"{path}: llama.cpp's pre-tokenizer for this description is not known: {plain(shown, 1000)} — --converter PATH"
        " runs llama.cpp's own convert_hf_to_gguf.py, which may know the tokenizer by its hash"
    )


def split_regexes(description: dict[str, Any]) -> tuple[str, ...] | None:
    """The regexes that cut the text, in order; None if the description has a step that is no such cut."""
    kind = description.get("type")
    if kind == "Sequence":
        all_regexes: tuple[str, ...] = ()
        for part in description.get("pretokenizers", []):
            regexes = split_regexes(part)
            if regexes is None:
                return None
            all_regexes += regexes
        return all_regexes
    if kind == "ByteLevel":
        return (GPT2,) if description.get("use_regex", True) else ()
    if kind == "Digits":
        return (r"\p{N}",) if description.get("individual_digits") else (r"\p{N}+",)
    if kind == "Split":
        regex = description.get("pattern", {}).get("Regex")
        # These regexes leave nothing between two matches, so it makes no difference whether that is dropped.
        way = (description.get("behavior"), bool(description.get("invert")))
        if isinstance(regex, str) and way in (("Isolated", False), ("Isolated", True), ("Removed", True)):
            return (regex,)
    return None


def is_byte_level(description: dict[str, Any] | None) -> bool:
    """Whether there is a ByteLevel step, which writes bytes as printable letters, as GPT-2 does."""
    if description is None:
        return False
    if description.get("type") == "Sequence":
        return any(is_byte_level(part) for part in description.get("pretokenizers", []))
    return description.get("type") == "ByteLevel"


def adds_prefix_space(description: dict[str, Any]) -> bool:
    """Whether a ByteLevel step puts a space before the text."""
    if description.get("type") == "Sequence":
        return any(adds_prefix_space(part) for part in description.get("pretokenizers", []))
    return description.get("type") == "ByteLevel" and bool(description.get("add_prefix_space", True))


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
    if adds_prefix_space(tokenizer["pre_tokenizer"]):
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
) -> PreTokenizer:
    """llama.cpp's pre-tokenizer that treats whole words as this tokenizer does, or one where that changes nothing."""
    candidates = find_pretokenizers(tokenizer["pre_tokenizer"], path)
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

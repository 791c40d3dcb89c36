"""The pre-tokenizer, which cuts text into words before BPE: tokenizer.json describes it, llama.cpp has a name for it.

llama.cpp does not read regexes from a GGUF. It has a list of names, each with built-in regexes and with its own
`ignore_merges`: whether a word that is in the vocabulary is one token without merges. The description is therefore
reduced to a list of regexes, applied one after the other, and the list is looked up. Source: llama-vocab.cpp.
"""

import dataclasses
import pathlib
from typing import Any

from bitladder.convert.config import brief, plain
from bitladder.errors import BitladderError

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


def find(description: dict[str, Any], path: pathlib.Path) -> tuple[PreTokenizer, ...]:
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

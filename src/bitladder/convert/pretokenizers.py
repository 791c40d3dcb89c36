"""How text is cut into words before BPE: from tokenizer.json's description to llama.cpp's name for it.

llama.cpp does not read regexes from a GGUF; it has a list of names, each with its regexes built in and with its own
view of `ignore_merges` (take a word that is in the vocabulary whole, without merging). So the description is brought
to a plain list of regexes, applied one after the other, and looked up. Checked against llama.cpp's llama-vocab.cpp.
"""

import dataclasses
import pathlib
from typing import Any

from bitladder.errors import BitladderError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tiktoken's own spelling of the same: the possessive marks change nothing, as the neighbouring classes are disjoint,
# and \s* takes in all line ends but the last one.
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
    """llama.cpp's `name`; whether it takes whole words from the vocabulary; whether its regexes are only close."""

    name: str
    ignore_merges: bool = False
    approximate: bool = False


KNOWN: dict[tuple[str, ...], tuple[PreTokenizer, ...]] = {
    (GPT2,): (PreTokenizer("gpt-2"),),
    (r"\p{N}", GPT2): (PreTokenizer("smollm"),),
    # OLMo 2's dolma2 goes by dbrx, as upstream: Llama 3's regex without Llama 3's ignore_merges.
    (LLAMA3,): (PreTokenizer("dbrx"), PreTokenizer("llama-bpe", ignore_merges=True)),
    (_TIKTOKEN.replace("DIGITS", r"\p{N}{1,3}"),): (
        PreTokenizer("dbrx"),
        PreTokenizer("llama-bpe", ignore_merges=True),
    ),
    (QWEN2,): (PreTokenizer("qwen2"),),
    (_TIKTOKEN.replace("DIGITS", r"\p{N}"),): (PreTokenizer("bailingmoe"),),
    (SEED_CODER,): (PreTokenizer("seed-coder"),),
    # std::regex knows no classes of upper and lower case, so llama.cpp takes a–z and A–Z for them.
    (GPT4O,): (PreTokenizer("gpt-4o", approximate=True),),
    (TEKKEN,): (PreTokenizer("tekken", ignore_merges=True, approximate=True),),
}


def find(description: dict[str, Any], path: pathlib.Path) -> tuple[PreTokenizer, ...]:
    """The pre-tokenizers of llama.cpp with the regexes of tokenizer.json's `pre_tokenizer`, best known first.

    Raises BitladderError showing the regexes if there is none.
    """
    regexes = split_regexes(description)
    if regexes is not None and regexes in KNOWN:
        return KNOWN[regexes]
    shown = " then ".join(regexes) if regexes else repr(description)
    raise BitladderError(
        f"{path}: llama.cpp's pre-tokenizer for this description is not known: {shown} — --converter PATH runs"
        " llama.cpp's own convert_hf_to_gguf.py, which may know the tokenizer by its hash"
    )


def split_regexes(description: dict[str, Any]) -> tuple[str, ...] | None:
    """The regexes that cut the text, in order; None if the description has anything that is not such a cut."""
    kind = description.get("type")
    if kind == "Sequence":
        found: tuple[str, ...] = ()
        for part in description.get("pretokenizers", []):
            regexes = split_regexes(part)
            if regexes is None:
                return None
            found += regexes
        return found
    if kind == "ByteLevel":
        return (GPT2,) if description.get("use_regex", True) else ()
    if kind == "Digits":
        return (r"\p{N}",) if description.get("individual_digits") else (r"\p{N}+",)
    if kind == "Split":
        regex = description.get("pattern", {}).get("Regex")
        # Keeping the matches and dropping what is between comes to the same: these regexes leave nothing between.
        way = (description.get("behavior"), bool(description.get("invert")))
        if isinstance(regex, str) and way in (("Isolated", False), ("Isolated", True), ("Removed", True)):
            return (regex,)
    return None


def is_byte_level(description: dict[str, Any] | None) -> bool:
    """Whether there is a ByteLevel step: bytes written as printable letters, as GPT-2 began it."""
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

"""The patterns of llama-quantize: exact names as patterns, and a user's patterns against names.

llama-quantize (tools/quantize/quantize.cpp, src/llama-quant.cpp) puts a pattern in lower case, compiles it as an
ECMAScript regular expression (std::regex) and searches it anywhere in a tensor's name. The first pattern that is found
decides. Patterns apply to embeddings and head too. They apply to no tensor if the preset's own type is not quantized,
and never to tensors that the library does not quantize.

std::regex has no time limit, and a pattern that backtracks without end would stop the library. So a user's patterns
are matched here by `regex`, which has a limit, and the library gets exact names. Patterns that the two could read
differently are refused.
"""

import collections
import dataclasses
import os
import pathlib
import re
import string
import time
from collections.abc import Mapping, Sequence

import regex

from bitladder.engine import (
    ALIASES,
    TensorType,
    all_types,
    pattern_error,
    plain_type,
    preset_number,
    presets,
    storable,
    type_by_name,
)
from bitladder.errors import BitladderError, UsageError, did_you_mean
from bitladder.gguf import around_block, reading_order
from bitladder.units import number_of

_NOT_MADE = {"NVFP4"}  # a name for converted files: llama_model_quantize refuses it
_PLAIN = set(string.ascii_lowercase + string.digits + "_-/")
SECONDS = 1.0  # for one pattern over all names; usual patterns take milliseconds
# Most characters, nested groups (std::regex compiles by recursion), and repetitions in {}.
LONGEST, DEEPEST, MOST = 20_000, 100, 255
_TOKEN = re.compile(
    r"(?P<class>\[(?:\[:[a-z]*:\]|\\.|[^\]\\])*\]?)|(?P<escape>\\(?:x[0-9a-f]{2}|.))"
    r"|(?P<repetition>[*+?]|\{\d+(?:,\d*)?\})|(?P<open>\((?:\?[:=!])?)|(?P<other>.)",
    re.DOTALL,
)
_ESCAPES = "bdswfnrtv"  # letters after a backslash that mean the same in both, once in lower case


def exact_patterns(types: Mapping[str, TensorType]) -> tuple[tuple[str, TensorType], ...]:
    """Patterns that give exactly the named tensors exactly their types. No tensor matches two of them.

    Tensors of a kind with the same type share a pattern, because std::regex takes seconds for a thousand patterns on a
    thousand tensors.

    Example:
        >>> names = ("blk.0.attn_v.weight", "blk.3.attn_v.weight")
        >>> [(pattern, kind.name) for pattern, kind in exact_patterns(dict.fromkeys(names, type_by_name("q6_K")))]
        [('^blk\\\\.(0|3)\\\\.attn_v\\\\.weight$', 'q6_K')]
    """
    groups: dict[tuple[str, str, TensorType], list[str]] = collections.defaultdict(list)
    for name in sorted(types, key=reading_order):
        before, layer, after = around_block(name) or (name, "", "")
        groups[before, after, types[name]].append(layer)
    return tuple((f"^{_pattern(before, layers, after)}$", kind) for (before, after, kind), layers in groups.items())


def preset_and_pairs(tensors: Mapping[str, str], preset: str | None) -> tuple[str, tuple[tuple[str, TensorType], ...]]:
    """The preset and patterns for llama-quantize, so that `preset` decides all tensors that are not named.

    A preset that does not quantize takes no patterns. Another one replaces it, and a last pattern gives all other
    tensors its type. Raises BitladderError for a type that the library does not know, and as `base_preset`.
    """
    rest = plain_type(preset) if preset is not None else None
    pairs = exact_patterns({name: type_by_name(kind) for name, kind in tensors.items()})
    return base_preset(tensors, preset), (*pairs, (".*", rest)) if rest is not None else pairs


def base_preset(tensors: Mapping[str, str], preset: str | None) -> str:
    """The preset for llama-quantize beside the patterns: `preset`, or one of the most frequent quantized type.

    Its own type must be quantized. It decides the types of tensors that match no pattern. Raises BitladderError if the
    library knows no preset, or no type, of that name.
    """
    if preset is not None and (own := preset_name(preset)) not in _NOT_MADE and plain_type(own) is None:
        return own
    for kind, _ in collections.Counter(map(type_by_name, tensors.values())).most_common():
        name = ALIASES.get(kind.name.upper(), kind.name.upper())
        if kind.quantized and name in presets() and name not in _NOT_MADE:
            return name
    return "Q8_0"


def preset_name(preset: str) -> str:
    """A preset as the library names it ("q4_k" → "Q4_K_M"). Raises BitladderError for an unknown name."""
    number = preset_number(preset)
    return next(name for name, known in presets().items() if known == number)


def _pattern(before: str, layers: list[str], after: str) -> str:
    middle = "" if layers == [""] else layers[0] if len(layers) == 1 else f"({'|'.join(layers)})"
    return _escaped(before) + middle + _escaped(after)


def _escaped(text: str) -> str:
    """A pattern for these characters that survives being put in lower case and cut at "=" and whitespace."""
    return "".join(
        char if char in _PLAIN or not char.isascii() else "\\." if char == "." else f"\\x{ord(char):02x}"
        for char in text
    )


def target_type(name: str, where: str) -> TensorType:
    """The type of that name, if weights can be stored as it. Raises UsageError that begins with `where`."""
    try:
        kind = type_by_name(name)
    except BitladderError:
        kind = None
    if kind is None or not storable(kind):
        known = [candidate.name for candidate in all_types().values() if storable(candidate)]
        close = did_you_mean(name, known, "the library has")
        raise UsageError(f"{where}: weights cannot be stored as {name!r}{close}")
    return kind


def parse_tensor_type(text: str) -> tuple[str, str]:
    """PATTERN=TYPE as (pattern, type), cut at the first "=" as llama-quantize cuts it. Raises UsageError."""
    pattern, equals, kind = text.partition("=")
    if not pattern or not equals or not kind:
        raise UsageError(f"--tensor-type {text}: write PATTERN=TYPE, such as attn_v=q6_k")
    if "=" in kind:
        raise UsageError(
            f'--tensor-type {text}: a pattern cannot hold "=" (no look-ahead), as the type follows the first one'
        )
    target_type(kind, f"--tensor-type {text}")
    return pattern, kind


def read_tensor_types(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The entries PATTERN=TYPE of a --tensor-type-file: words separated by spaces or newlines.

    Raises UsageError that names the file, and the entry that is wrong.
    """
    try:
        words = pathlib.Path(path).read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise UsageError(f"--tensor-type-file {path} is not a text file") from error
        raise UsageError(f"--tensor-type-file {path}: {getattr(error, 'strerror', None) or error}") from error
    for word in words:
        try:
            parse_tensor_type(word)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
    return tuple(words)


@dataclasses.dataclass(frozen=True)
class PatternMatch:
    """The tensors that a pattern matches: all (`names`), and those that no earlier pattern matches (`first`)."""

    pattern: str
    type: TensorType
    names: tuple[str, ...]
    first: tuple[str, ...]


def match_patterns(
    path: str | os.PathLike[str], tensor_types: Sequence[tuple[str, str]], names: Sequence[str]
) -> tuple[PatternMatch, ...]:
    """Matches every pattern with every name.

    Parameters:
        path: a model that the library can open. The library judges the patterns' syntax.
        tensor_types: pairs (pattern, type).
        names: names of tensors.

    Raises:
        UsageError: a pattern matches no tensor, has a syntax error, or takes longer than a second.
    """
    targets = [target_type(kind, f"--tensor-type {pattern}={kind}") for pattern, kind in tensor_types]
    compiled = _compiled(path, [pattern for pattern, _ in tensor_types])
    matched: set[str] = set()
    matches = []
    for (pattern, kind), target in zip(tensor_types, targets, strict=True):
        hits = _search(compiled[pattern], pattern, names)
        if not hits:
            raise UsageError(f"--tensor-type {pattern}={kind}: the pattern matches no tensor of {os.fspath(path)}")
        matches.append(PatternMatch(pattern, target, hits, tuple(name for name in hits if name not in matched)))
        matched.update(hits)
    return tuple(matches)


def _compiled(path: str | os.PathLike[str], patterns: Sequence[str]) -> "dict[str, regex.Pattern[bytes]]":
    """Compiles the patterns after the library has accepted them. Raises UsageError for the first that is wrong."""
    lower = {}
    for pattern in patterns:
        if len(pattern) > LONGEST:
            raise UsageError(
                f"{_named(pattern)} has {number_of(len(pattern), 'character')}, more than {LONGEST:,}: use several "
                "patterns"
            )
        lower[pattern] = pattern.encode().lower()  # of bytes, so that only ASCII letters change, as in llama-quantize
        _refuse_dialects(lower[pattern].decode(), _named(pattern))
    _refuse_syntax(path, lower)
    compiled = {}
    for pattern, text in lower.items():
        try:
            # Bytes, as std::regex sees them; version 0 is the behaviour of Python's re.
            compiled[pattern] = regex.compile(text, regex.VERSION0)
        except (regex.error, RecursionError) as error:
            raise UsageError(f"{_named(pattern)} is not a regular expression: {error}") from error
    return compiled


def _named(pattern: str) -> str:
    return f"--tensor-type pattern {pattern[:200]!r}"


def _refuse_syntax(path: str | os.PathLike[str], lower: Mapping[str, bytes]) -> None:
    suspects = list(lower)

    def error_in(patterns: list[str]) -> str | None:
        return pattern_error(path, [lower[pattern].decode() for pattern in patterns])

    if not suspects or error_in(suspects) is None:
        return
    while len(suspects) > 1:  # halved until the wrong one is left
        half = suspects[: len(suspects) // 2]
        suspects = half if error_in(half) is not None else suspects[len(half) :]
    raise UsageError(f"{_named(suspects[0])} is not an ECMAScript regular expression: {error_in(suspects)}")


def _search(compiled: "regex.Pattern[bytes]", pattern: str, names: Sequence[str]) -> tuple[str, ...]:
    end = time.monotonic() + SECONDS
    hits = []
    for name in names:
        try:
            if compiled.search(name.encode(), timeout=max(end - time.monotonic(), 1e-3)):
                hits.append(name)
        except (TimeoutError, MemoryError) as error:
            raise UsageError(
                f"--tensor-type pattern {pattern!r} backtracks too long on {name}; write it without nested repetition"
            ) from error
    return tuple(hits)


def _refuse_dialects(pattern: str, where: str) -> None:
    """Raises UsageError for a pattern that the dialects may read differently, or that exhausts stack or memory.

    Different are escapes that only Python knows, an empty class, collating elements, and a repeated repetition ("a++").
    """
    depth, before = 0, ""
    for token in _TOKEN.finditer(pattern):
        kind, text = token.lastgroup or "", token[0]
        depth += (kind == "open") - (text == ")")
        if depth > DEEPEST:
            raise UsageError(f"{where} has more than {DEEPEST} nested groups")
        if kind == "repetition":
            kind = _repetition(text, before, where)
        elif kind in ("class", "escape"):
            _refuse_odd(text, where)
        before = kind


def _repetition(text: str, before: str, where: str) -> str:
    """The state after a repetition. "?" after a repetition makes it lazy, and no further repetition may follow."""
    if any(int(count) > MOST for count in re.findall(r"\d+", text)):
        raise UsageError(f"{where}: {text} has more than {MOST} repetitions")
    if before == "lazy" or (before == "repetition" and text != "?"):
        raise UsageError(f"{where}: a repetition of a repetition needs parentheses, (?:a+)+")
    return "lazy" if before == "repetition" else "repetition"


def _refuse_odd(text: str, where: str) -> None:
    """Raises UsageError for a class [...] or an escape that the dialects read differently."""
    if text in ("[]", "[^]"):
        raise UsageError(f"{where}: an empty class [] is not supported")
    if "[." in text or "[=" in text:
        raise UsageError(f"{where}: collating elements such as [.a.] are not supported")
    for letter in re.findall(r"\\(?:x[0-9a-f]{2}|(.))", text):
        if letter.isalpha() and letter not in _ESCAPES:
            raise UsageError(f"{where}: \\{letter} has no certain meaning; write the character itself")

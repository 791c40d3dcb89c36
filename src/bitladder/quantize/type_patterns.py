"""--tensor-type patterns against tensor names.

llama-quantize compiles a pattern, put in lower case, as an ECMAScript regular expression (std::regex) and searches it
anywhere in the name; the first pattern found decides. std::regex has no time limit, and a pattern that backtracks
without end would hang the library. So names are matched here, by `regex`, which has one, and the library is handed
exact names (`recipe.patterns`). Patterns that the two could read differently are refused (`_refuse_dialects`).
"""

import dataclasses
import os
import re
import time
from collections.abc import Mapping, Sequence

import regex

from bitladder.engine.presets import pattern_error
from bitladder.engine.types import TensorType
from bitladder.errors import UsageError
from bitladder.quantize.quantize_options import target_type

SECONDS = 1.0  # for one pattern over all names; ordinary ones take milliseconds
# Of characters, of groups in each other (std::regex compiles by recursion), of repetitions asked for with {}.
LONGEST, DEEPEST, MOST = 20_000, 100, 255
_TOKEN = re.compile(
    r"(?P<class>\[(?:\[:[a-z]*:\]|\\.|[^\]\\])*\]?)|(?P<escape>\\(?:x[0-9a-f]{2}|.))"
    r"|(?P<repetition>[*+?]|\{\d+(?:,\d*)?\})|(?P<open>\((?:\?[:=!])?)|(?P<other>.)",
    re.DOTALL,
)
_ESCAPES = "bdswfnrtv"  # letters after a backslash that mean the same in both, once in lower case


@dataclasses.dataclass(frozen=True)
class PatternMatch:
    """What a pattern found: `names` all tensors, `first` those that no earlier pattern found."""

    pattern: str
    type: TensorType
    names: tuple[str, ...]
    first: tuple[str, ...]


def match_patterns(
    path: str | os.PathLike[str], tensor_types: Sequence[tuple[str, str]], names: Sequence[str]
) -> tuple[PatternMatch, ...]:
    """Match every (pattern, type) with every name.

    `path` is a model that the library can open: it judges the patterns' syntax. Raises UsageError that names the
    pattern if it finds nothing, has a syntax error, or takes longer than a second.
    """
    wanted_types = [target_type(kind, f"--tensor-type {pattern}={kind}") for pattern, kind in tensor_types]
    compiled = _compiled(path, [pattern for pattern, _ in tensor_types])
    taken: set[str] = set()
    matches = []
    for (pattern, kind), wanted in zip(tensor_types, wanted_types, strict=True):
        found = _search(compiled[pattern], pattern, names)
        if not found:
            raise UsageError(f"--tensor-type {pattern}={kind}: the pattern matches no tensor of {os.fspath(path)}")
        matches.append(PatternMatch(pattern, wanted, found, tuple(name for name in found if name not in taken)))
        taken.update(found)
    return tuple(matches)


def _compiled(path: str | os.PathLike[str], patterns: Sequence[str]) -> "dict[str, regex.Pattern[bytes]]":
    """Each pattern compiled, once the library has taken all of them. Raises UsageError for the first that is wrong."""
    lower = {}
    for pattern in patterns:
        if len(pattern) > LONGEST:
            raise UsageError(
                f"{_named(pattern)} has {len(pattern)} characters, more than {LONGEST}: use several patterns"
            )
        lower[pattern] = pattern.encode().lower()  # bytes: only ASCII letters change, as with llama-quantize
        _refuse_dialects(lower[pattern].decode(), _named(pattern))
    _refuse_syntax(path, lower)
    try:
        # Bytes, as std::regex sees them; version 0 is the behaviour of Python's re.
        return {pattern: regex.compile(text, regex.VERSION0) for pattern, text in lower.items()}
    except (regex.error, RecursionError) as error:
        odd = getattr(error, "pattern", b"").decode()
        raise UsageError(f"{_named(odd)} is no regular expression: {error}") from error


def _named(pattern: str) -> str:
    return f"--tensor-type pattern {pattern[:200]!r}"


def _refuse_syntax(path: str | os.PathLike[str], lower: Mapping[str, bytes]) -> None:
    suspects = list(lower)

    def error_in(patterns: list[str]) -> str | None:
        return pattern_error(path, [lower[pattern].decode() for pattern in patterns])

    if not suspects or error_in(suspects) is None:
        return
    while len(suspects) > 1:  # halved until the one is found
        half = suspects[: len(suspects) // 2]
        suspects = half if error_in(half) is not None else suspects[len(half) :]
    raise UsageError(f"{_named(suspects[0])} is no ECMAScript regular expression: {error_in(suspects)}")


def _search(compiled: "regex.Pattern[bytes]", pattern: str, names: Sequence[str]) -> tuple[str, ...]:
    end = time.monotonic() + SECONDS
    found = []
    for name in names:
        try:
            if compiled.search(name.encode(), timeout=max(end - time.monotonic(), 1e-3)):
                found.append(name)
        except (TimeoutError, MemoryError) as error:
            raise UsageError(
                f"--tensor-type pattern {pattern!r} backtracks too long on {name}; write it without nested repetition"
            ) from error
    return tuple(found)


def _refuse_dialects(pattern: str, where: str) -> None:
    """Raise UsageError for what is valid in both dialects, or in one, with different meanings.

    These are escapes that only Python knows, an empty class, collating elements, and a repetition repeated ("a++");
    and what would exhaust stack or memory before anything is matched.
    """
    depth, before = 0, ""
    for token in _TOKEN.finditer(pattern):
        kind, text = token.lastgroup or "", token[0]
        depth += (kind == "open") - (text == ")")
        if depth > DEEPEST:
            raise UsageError(f"{where} has more than {DEEPEST} groups in each other")
        if kind == "repetition":
            kind = _repetition(text, before, where)
        elif kind in ("class", "escape"):
            _refuse_odd(text, where)
        before = kind


def _repetition(text: str, before: str, where: str) -> str:
    """What a repetition leaves: after one, "?" makes it lazy, and nothing more may follow."""
    if any(int(count) > MOST for count in re.findall(r"\d+", text)):
        raise UsageError(f"{where}: {text} asks for more than {MOST} repetitions")
    if before == "lazy" or (before == "repetition" and text != "?"):
        raise UsageError(f"{where}: a repetition of a repetition needs parentheses, (?:a+)+")
    return "lazy" if before == "repetition" else "repetition"


def _refuse_odd(text: str, where: str) -> None:
    """Raise UsageError for a class [...] or an escape that the dialects read differently."""
    if text in ("[]", "[^]"):
        raise UsageError(f"{where}: an empty class [] is not supported")
    if "[." in text or "[=" in text:
        raise UsageError(f"{where}: collating elements such as [.a.] are not supported")
    for letter in re.findall(r"\\(?:x[0-9a-f]{2}|(.))", text):
        if letter.isalpha() and letter not in _ESCAPES:
            raise UsageError(f"{where}: \\{letter} has no meaning that is sure; write the character itself")

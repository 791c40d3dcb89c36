"""Sizes as people write them, one grammar for every option; and durations as people read them."""

import decimal
import math
import re
from collections.abc import Sequence

from bitladder.errors import UsageError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str, option: str = "--size") -> int:
    """The bytes of a size.

    KiB, MiB, GiB and TiB are powers of 1024. K, M, G and T, with or without a B, are powers of 1000, as in
    llama-gguf-split. Case does not matter. A fraction of a byte is dropped, because sizes are limits.

    Parameters:
        text: the size.
        option: the option that has it, for the error.

    Raises:
        UsageError: the text is no size, or less than a byte.

    Example:
        >>> parse_size("2G"), parse_size("1.5KiB"), parse_size("123456")
        (2000000000, 1536, 123456)
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*(?:([KMGT]?)B?|([KMGT])IB)", text.strip().upper(), re.ASCII)
    size = 0
    if match:
        unit = 1024 ** _POWERS[match[3]] if match[3] else 1000 ** _POWERS[match[2]]
        with decimal.localcontext(prec=60):
            size = int(decimal.Decimal(match[1]) * unit)
    if size < 1:
        raise UsageError(f"{option} is {text!r}; give bytes, or a number and a unit, such as 3.7GiB, 3.7G or 900MB")
    return size


def bpw_bytes(bpw: float, weights: int, other_bytes: int = 0, option: str = "--bpw") -> int:
    """The bytes of a file.

    Parameters:
        bpw: bits per weight.
        weights: number of weights.
        other_bytes: bytes of header and padding.
        option: the option that has `bpw`, for the error.

    Raises:
        UsageError: `bpw` is no number above 0.
    """
    if not (math.isfinite(bpw) and bpw > 0):
        raise UsageError(f"{option} is {bpw}; give bits per weight, such as 4.5")
    return math.floor(bpw * weights / 8) + other_bytes


def size_text(nbytes: int) -> str:
    """A size for people, such as "3.70 GiB (3,972,844,748 bytes)"; a small one in bytes only."""
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if nbytes >= 1024**power:
            return f"{nbytes / 1024**power:.2f} {unit} ({number_of(nbytes, 'byte')})"
    return number_of(nbytes, "byte")


def duration(seconds: float) -> str:
    """About how long: in minutes, from an hour on in hours and minutes; below a minute in tens of seconds."""
    if seconds < 55:
        return f"about {max(10, 10 * round(seconds / 10))} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 60 else f"about {minutes // 60} h {minutes % 60} min"


def number_of(count: int, thing: str, things: str = "") -> str:
    """So many of a thing: "1 chunk", "1,024 chunks".

    Parameters:
        count: how many.
        thing: the word for one.
        things: the word for several, if it is not `thing` and an s.
    """
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def listed(names: Sequence[str]) -> str:
    """All of some names: "a", "a and b", "a, b and c"."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def some_of(names: Sequence[str], thing: str, things: str = "") -> str:
    """Things by the first of their names: "tensor a", "3 tensors (a, …)".

    Parameters:
        names: their names; at least one.
        thing: the word for one.
        things: the word for several, if it is not `thing` and an s.
    """
    return f"{thing} {names[0]}" if len(names) == 1 else f"{number_of(len(names), thing, things)} ({names[0]}, …)"

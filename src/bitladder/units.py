"""Sizes as people write them."""

import decimal
import math
import re

from bitladder.errors import UsageError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str, option: str = "--size") -> int:
    """Bytes of "3.7GiB", "3.7G", "900MB" or "123456".

    KiB, MiB, GiB and TiB are powers of 1024; K, M, G and T, with or without a B, are powers of 1000, as
    llama-gguf-split counts. Case does not matter. A fraction of a byte is dropped, since sizes are limits.
    Raises UsageError that names the option.
    """
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*(?:([KMGT]?)B?|([KMGT])IB)", text.strip().upper(), re.ASCII)
    size = 0
    if found:
        unit = 1024 ** _POWERS[found[3]] if found[3] else 1000 ** _POWERS[found[2]]
        with decimal.localcontext(prec=60):
            size = int(decimal.Decimal(found[1]) * unit)
    if size < 1:
        raise UsageError(f"{option} is {text!r}; give bytes, or a number and a unit, such as 3.7GiB, 3.7G or 900MB")
    return size


def bpw_bytes(bpw: float, weights: int, other_bytes: int = 0, option: str = "--bpw") -> int:
    """Bytes of a file with `bpw` bits for each of `weights` weights, and `other_bytes` (header, padding) beside them.

    Raises UsageError if `bpw` is no number above 0.
    """
    if not (math.isfinite(bpw) and bpw > 0):
        raise UsageError(f"{option} is {bpw}; give bits per weight, such as 4.5")
    return math.floor(bpw * weights / 8) + other_bytes


def size_text(nbytes: int) -> str:
    """ "3.70 GiB (3,972,844,748 bytes)"; small sizes in bytes only."""
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if nbytes >= 1024**power:
            return f"{nbytes / 1024**power:.2f} {unit} ({nbytes:,} bytes)"
    return f"{nbytes:,} bytes"

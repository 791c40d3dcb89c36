"""Changes of a file that byte-wise mutation hardly finds: other values within JSON and TOML, other numbers in a header.

An input may be JSON, JSON behind a length (safetensors, the base file), or anything else.
"""

import json
import random
import struct
from typing import Any

# What a value may be replaced by: other types, and numbers at the limits of those that are read.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**32, -(2**63), 2**63, 2**64, 10**30, 0.5, -0.0, 1e308),
    *("", " ", "\0", "\x1b[31m", "a\nb", "\ud800", "../x", "/etc/passwd", "é" * 40, "x" * 5000, "<s>", "0", "NaN"),
    *([], {}, [[]], [None], {"": None}, [0] * 100, {"a": {"a": {"a": []}}}),
)
RAW = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\xff", b"\0")
NUMBERS = (0, 1, 2, 7, 8, 31, 32, 127, 128, 255, 256, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**64 - 1)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A file with one to three changes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = _structured(data, rng) or _plain(data, rng)
    return data


def structured(data: bytes, rng: random.Random) -> bytes | None:
    """A change of a JSON value; None if the file is neither JSON nor JSON behind a length."""
    return _structured(data, rng)


def _structured(data: bytes, rng: random.Random) -> bytes | None:
    for start in (0, 8, 16):  # plain JSON, safetensors, the base file
        stop = len(data)
        if start:
            stop = start + int.from_bytes(data[start - 8 : start], "little")
            if stop > len(data) or data[start : start + 1] != b"{":
                continue
        try:
            value = json.loads(data[start:stop])
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict | list) and value:
            text = _changed(value, rng)
            before = data[: start - 8] + struct.pack("<Q", len(text)) if start else b""
            return before + text + data[stop:]
    lines = data.split(b"\n")
    if len(lines) > 1 and rng.random() < 0.7:  # a line of JSON lines, or of a table
        at = rng.randrange(len(lines))
        lines[at] = _structured(lines[at], rng) or _plain(lines[at], rng)
        return b"\n".join(lines)
    return None


def _changed(value: Any, rng: random.Random) -> bytes:
    """The JSON of a value with another value, key or piece of text somewhere in it."""
    places: list[tuple[Any, Any]] = []
    _collect(value, places)
    holder, key = rng.choice(places)
    action = rng.randrange(6)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "\0", f"{key} ", str(key) * 50])] = holder.pop(key)
    elif action == 2:
        other = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[0][other[1]]))
    elif action == 3 and isinstance(holder[key], int | float):
        holder[key] = rng.choice([holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2, str(holder[key])])
    elif action == 4:
        holder[key] = "@RAW@"
    else:
        holder[key] = rng.choice(ODD)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return text.replace(b'"@RAW@"', rng.choice(RAW), 1)


def _collect(value: Any, places: list[tuple[Any, Any]], depth: int = 0) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        places.append((value, key))
        if isinstance(inner, dict | list) and depth < 50:
            _collect(inner, places, depth + 1)


def _plain(data: bytes, rng: random.Random) -> bytes:
    """Another byte or number, a piece that is cut, doubled or moved."""
    at = rng.randrange(len(data) + 1)
    size = min(rng.choice((1, 2, 4, 8, 16, 64, 512)), max(len(data) - at, 0))
    action = rng.randrange(6)
    if action == 0:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if action == 1:
        form = rng.choice(["<I", "<Q", "<H", "<i"])
        number = rng.choice(NUMBERS) & (256 ** struct.calcsize(form) - 1)
        raw = number.to_bytes(struct.calcsize(form), "little")
        return data[:at] + raw + data[at + len(raw) :]
    if action == 2:
        return data[:at] + data[at + size :]
    if action == 3:
        return data[: at + size] + data[at : at + size] * rng.choice((1, 2, 50)) + data[at + size :]
    if action == 4:
        to = rng.randrange(len(data) + 1)
        return data[:to] + data[at : at + size] + data[to:]
    return data[:at]

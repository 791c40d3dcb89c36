"""Measurements kept as they are made, so that work that was cut short goes on, and nothing is measured twice."""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError

Doubles = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A recipe's divergence. `chunks` and `squares` are the means of the KLD (nats) and of its square in each chunk.

    `tokens` were scored in each. The standard error takes tokens as independent.
    """

    types: Mapping[str, str]
    chunks: tuple[float, ...]
    squares: tuple[float, ...]
    tokens: int
    label: str = ""

    @property
    def kld(self) -> float:
        """Mean KLD, nats per token."""
        return float(np.mean(self.chunks))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        variance = max(float(np.mean(self.squares)) - self.kld**2, 0.0)
        return math.sqrt(variance / max(len(self.chunks) * self.tokens - 1, 1))

    def part(self, first: int, last: int) -> "Measurement":
        """What was measured on the chunks first … last−1."""
        return dataclasses.replace(self, chunks=self.chunks[first:last], squares=self.squares[first:last])


class Measures(Protocol):
    """What measures a recipe (candidate.Candidate, or a test's own)."""

    def kld(self, types: Mapping[str, str], chunks: int) -> Doubles:
        """float64 [chunks, scored], nats per token."""


class Journal:
    """Measurements in a file, one line each.

    Parameters: `path` (None: in memory only); `context` what all of them depend on (model, importance, text, rounding,
    library), as a hash: lines of another context are left alone. `tokens_per_chunk` for the count of what was spent.
    """

    def __init__(self, path: pathlib.Path | None, context: str, tokens_per_chunk: int) -> None:
        self.path, self._context, self.tokens_per_chunk = path, context, tokens_per_chunk
        self.found: dict[str, Measurement] = {}
        self.made = 0  # measurements by this process
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: pathlib.Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry: dict[str, Any] = json.loads(line)
                if entry["context"] == self._context:
                    self.found[entry["key"]] = Measurement(
                        entry["types"],
                        tuple(entry["kld"]),
                        tuple(entry["squares"]),
                        entry["tokens"],
                        entry["label"],
                    )
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a process that was killed

    @property
    def tokens(self) -> int:
        """Tokens decoded for all measurements of this context."""
        return sum(len(one.chunks) for one in self.found.values()) * self.tokens_per_chunk

    def measure(self, model: Measures, types: Mapping[str, str], chunks: int, label: str = "") -> Measurement:
        """The divergence of a recipe over the first `chunks` chunks; measured only if it is not known."""
        key = recipe_key(types)
        known = self.found.get(key)
        if known is not None and len(known.chunks) >= chunks:
            return known.part(0, chunks)
        tokens = model.kld(types, chunks)
        means, squares = (tuple(map(float, one.mean(axis=1))) for one in (tokens, tokens**2))
        made = Measurement(dict(types), means, squares, tokens.shape[1], label)
        self.found[key] = made
        self.made += 1
        self._write(key, made)
        return made

    def _write(self, key: str, made: Measurement) -> None:
        if self.path is None:
            return
        entry = {
            "context": self._context,
            "key": key,
            "label": made.label,
            "kld": made.chunks,
            "squares": made.squares,
            "tokens": made.tokens,
            "types": made.types,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write of the whole line: several processes may share the file.
            with self.path.open("ab", buffering=0) as stream:
                stream.write((json.dumps(entry) + "\n").encode())
        except OSError as error:
            raise BitladderError(f"cannot write {self.path}: {error.strerror}") from error


def recipe_key(types: Mapping[str, str]) -> str:
    """The hash of the tensors that have another type than full precision."""
    return hashlib.sha256(json.dumps(sorted(types.items())).encode()).hexdigest()

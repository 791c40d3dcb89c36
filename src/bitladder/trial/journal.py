"""Measurements, kept one by one: work that was cut short continues, and nothing is measured twice."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pydantic

from bitladder.errors import BitladderError
from bitladder.keys import key_of

Doubles = npt.NDArray[np.float64]
Wanted = tuple[Mapping[str, str], int, str]  # types of tensors, chunks, label: as of `Journal.measure`


@dataclasses.dataclass(frozen=True)
class MeasuredRecipe:
    """The divergence of a recipe.

    Parameters:
        types: type of each tensor that differs from full precision, by name.
        chunks: mean KLD of each chunk, nats per token.
        squares: mean squared KLD of each chunk.
        tokens: scored tokens of a chunk.
        label: how the recipe came about.
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
        """Standard error of the mean; it takes tokens as independent."""
        variance = max(float(np.mean(self.squares)) - self.kld**2, 0.0)
        return math.sqrt(variance / max(len(self.chunks) * self.tokens - 1, 1))

    def part(self, first: int, last: int) -> "MeasuredRecipe":
        """The measurement of the chunks first … last−1."""
        return dataclasses.replace(self, chunks=self.chunks[first:last], squares=self.squares[first:last])


class Measures(Protocol):
    """What measures a recipe: `SwappedModel`, or a formula in a test."""

    def kld(self, types: Mapping[str, str], chunks: int) -> Doubles:
        """KLD of each token, nats, float64 [chunks, scored]."""


class _Line(pydantic.BaseModel):
    """A line of the file. A line that lacks something, or holds what no measurement gives, does not count."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)

    context: str
    key: str
    check: str
    label: str
    kld: tuple[float, ...] = pydantic.Field(min_length=1)
    squares: tuple[float, ...]
    tokens: int = pydantic.Field(ge=1)
    types: dict[str, str]

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "_Line":
        if len(self.kld) != len(self.squares) or min(self.kld) < 0:
            raise ValueError("no measurement")
        if self.check != _check(self.kld, self.squares, self.tokens):
            raise ValueError("damaged")
        return self


class Journal:
    """Measurements in a file, a line for each.

    Parameters:
        path: the file; None keeps measurements in memory only.
        context: hash of all that measurements depend on beside the recipe (`measurement_inputs`). Lines of another
            context are ignored, and stay in the file.
        tokens_per_chunk: tokens decoded for a chunk, to count what was spent.
    """

    def __init__(self, path: pathlib.Path | None, context: str, tokens_per_chunk: int) -> None:
        self.path, self._context, self.tokens_per_chunk = path, context, tokens_per_chunk
        self.measurements: dict[str, MeasuredRecipe] = {}
        self.new = 0  # measurements by this process
        self._torn = False  # whether the last line has no end
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: pathlib.Path) -> None:
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise BitladderError(f"cannot read {path}: {error.strerror}") from error
        self._torn = bool(lines[-1])
        for line in lines:
            try:
                entry = _Line.model_validate_json(line)
            except pydantic.ValidationError:
                continue  # damaged, or the last line of a process that was killed: it is measured again
            if entry.context == self._context and recipe_key(entry.types) == entry.key:
                self.measurements[entry.key] = MeasuredRecipe(
                    entry.types, entry.kld, entry.squares, entry.tokens, entry.label
                )

    @property
    def tokens(self) -> int:
        """Tokens decoded for all measurements of this context."""
        return sum(len(measurement.chunks) for measurement in self.measurements.values()) * self.tokens_per_chunk

    def measure(self, model: Measures, types: Mapping[str, str], chunks: int, label: str = "") -> MeasuredRecipe:
        """The divergence of a recipe over the first chunks; it is decoded only if it is not known yet.

        Parameters:
            model: what measures it.
            types: type of each tensor that differs from full precision, by name.
            chunks: how many chunks.
            label: how the recipe came about.
        """
        key = recipe_key(types)
        if self.knows(types, chunks):
            return self.measurements[key].part(0, chunks)
        tokens = model.kld(types, chunks)
        means, squares = (tuple(map(float, values.mean(axis=1))) for values in (tokens, tokens**2))
        measurement = MeasuredRecipe(dict(types), means, squares, tokens.shape[1], label)
        self.measurements[key] = measurement
        self.new += 1
        self._write(key, measurement)
        return measurement

    def knows(self, types: Mapping[str, str], chunks: int) -> bool:
        """Whether a recipe was measured on so many chunks."""
        known = self.measurements.get(recipe_key(types))
        return known is not None and len(known.chunks) >= chunks

    def learn(self, measurement: MeasuredRecipe) -> None:
        """Takes a measurement that another process made, and wrote into the file."""
        if not self.knows(measurement.types, len(measurement.chunks)):
            self.measurements[recipe_key(measurement.types)] = measurement

    def _write(self, key: str, measurement: MeasuredRecipe) -> None:
        if self.path is None:
            return
        entry = {
            "context": self._context,
            "key": key,
            "check": _check(measurement.chunks, measurement.squares, measurement.tokens),
            "label": measurement.label,
            "kld": measurement.chunks,
            "squares": measurement.squares,
            "tokens": measurement.tokens,
            "types": measurement.types,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write of the whole line: several processes may share the file.
            with self.path.open("ab", buffering=0) as stream:
                stream.write(b"\n" * self._torn + (json.dumps(entry) + "\n").encode())
            self._torn = False
        except OSError as error:
            raise BitladderError(f"cannot write {self.path}: {error.strerror}") from error


def _check(kld: tuple[float, ...], squares: tuple[float, ...], tokens: int) -> str:
    """The hash of the figures of a line: a digit that was damaged would change a plan unnoticed."""
    return key_of({"kld": kld, "squares": squares, "tokens": tokens})


def recipe_key(types: Mapping[str, str]) -> str:
    """The hash of a recipe: of the types of tensors that differ from full precision, by name.

    Example:
        >>> recipe_key({"a": "q4_K", "b": "q6_K"}) == recipe_key({"b": "q6_K", "a": "q4_K"})
        True
    """
    return key_of({"types": types})


class Measurements:
    """The recipes that were asked for here, in this order.

    The journal is a cache. What else lies in it has no influence on what is made of these measurements.

    Parameters:
        journal: where measurements are kept.
        model: what measures a recipe that the journal does not have.
        expect: gets recipes that will be asked for, so that they can be measured side by side; None does nothing.
    """

    def __init__(
        self,
        journal: Journal,
        model: Measures,
        expect: Callable[[Sequence[Wanted]], None] | None = None,
    ) -> None:
        self._journal, self._model, self._expect = journal, model, expect
        self._by_recipe: dict[str, MeasuredRecipe] = {}

    def measure(self, types: Mapping[str, str], chunks: int, label: str = "") -> MeasuredRecipe:
        """The divergence of a recipe on the first chunks of the text.

        Parameters:
            types: tensor → type, for the tensors that are not in full precision.
            chunks: number of chunks.
            label: what the journal calls the recipe.
        """
        measurement = self._journal.measure(self._model, types, chunks, label)
        key = recipe_key(types)
        known = self._by_recipe.get(key)
        if known is None or len(known.chunks) < chunks:
            self._by_recipe[key] = measurement
        return measurement

    def expect(self, wanted: Iterable[Wanted]) -> None:
        """Says that recipes will be asked for, whatever is measured of them. Each stays to be asked for (`measure`)."""
        if self._expect is not None:
            self._expect(list(wanted))

    def all(self) -> list[MeasuredRecipe]:
        """Every recipe once, on the most chunks that were asked for."""
        return list(self._by_recipe.values())

    @property
    def tokens(self) -> int:
        """Tokens that these recipes were decoded on."""
        return sum(len(measurement.chunks) for measurement in self._by_recipe.values()) * self._journal.tokens_per_chunk

"""What is known of each tensor: its types in every file, its price, and what the importance matrix says of it."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.calibrate.statistics import TensorStatistics
from bitladder.engine.types import type_by_name
from bitladder.errors import BitladderError
from bitladder.gguf.names import block_of, kind_of, reading_order
from bitladder.report.rundir import Measured, Run, read_importance, read_shapes

# Field of the statistics, its heading, and whether it is shown in percent.
STATISTICS = (
    ("sum", "Σ(Act²)", False),
    ("entropy_norm", "E(norm)", True),
    ("zd", "ZD", True),
    ("cossim", "CosSim", False),
)


@dataclasses.dataclass(frozen=True)
class Tensors:
    """`tensors` in reading order; `files` label → types in that order ("" where a file lacks the tensor).

    `bpw` has the bits per weight of every type that occurs; `priced` the types that any tensor has a price for.
    """

    tensors: list[dict[str, Any]]
    files: dict[str, list[str]]
    presets: dict[str, str]
    bpw: dict[str, float]
    priced: list[str]
    statistics: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """For the page's script."""
        return dataclasses.asdict(self)


def read_tensors(run: Run) -> Tensors:
    """Gather what the directory has. Raises BitladderError if the importance matrix or a GGUF is damaged."""
    models = [one for one in run.quants if one.recipe]
    names = sorted({name for one in models if one.recipe for name in one.recipe.tensors}, key=reading_order)
    shapes, statistics = read_shapes(run), {one.tensor: one for one in read_importance(run)}
    prices = run.sensitivity.tensors if run.sensitivity else {}
    kinds = {kind for one in models if one.recipe for kind in one.recipe.tensors.values()}
    priced = {kind for name in names if name in prices for kind in prices[name].kld}
    known = bits(kinds | priced)
    return Tensors(
        tensors=[
            _tensor(name, shapes, statistics.get(name), dict(prices[name].kld) if name in prices else {})
            for name in names
        ],
        files={one.label: _types(one, names) for one in models},
        presets={rung: naive.label for rung, naive in run.naive.items() if naive.recipe},
        bpw=known,
        priced=sorted(set(map(canonical, priced)), key=lambda kind: (known.get(kind, 0.0), kind)),
        statistics=[
            {"key": key, "title": title, "percent": percent}
            for key, title, percent in STATISTICS
            if any(getattr(one, key) is not None for one in statistics.values())
        ],
    )


def bits(kinds: set[str]) -> dict[str, float]:
    """Bits per weight of types; those that this library does not know are left out."""
    found = {}
    for kind in sorted(map(canonical, kinds)):
        with contextlib.suppress(BitladderError):
            found[kind] = type_by_name(kind).bpw
    return found


def canonical(kind: str) -> str:
    """A type's name as ggml spells it, such as "q4_K"; one that this library does not know in lower case."""
    try:
        return type_by_name(kind).name
    except BitladderError:
        return kind.lower()


def _types(model: Measured, names: Sequence[str]) -> list[str]:
    tensors: Mapping[str, str] = model.recipe.tensors if model.recipe else {}
    return [canonical(tensors[name]) if name in tensors else "" for name in names]


def _tensor(
    name: str, shapes: Mapping[str, tuple[int, ...]], statistics: TensorStatistics | None, prices: Mapping[str, float]
) -> dict[str, Any]:
    shape = shapes.get(name)
    made: dict[str, Any] = {"name": name, "layer": block_of(name), "kind": kind_of(name)}
    if shape:
        elements = 1
        for length in shape:
            elements *= length
        made |= {"shape": " × ".join(map(str, shape)), "elements": elements}
    if statistics:
        made["statistics"] = {key: getattr(statistics, key) for key, _, _ in STATISTICS}
    if prices:
        made["prices"] = {canonical(kind): price for kind, price in prices.items()}
    return made

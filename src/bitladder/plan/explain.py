"""A plan's reasons: where the bytes and the loss are, what a byte is worth, what moved against the preset and why."""

import collections
import dataclasses
from collections.abc import Mapping

from bitladder.engine.types import type_by_name
from bitladder.plan.planner import PlanResult

Places = Mapping[str, tuple[str, int | None]]


@dataclasses.dataclass(frozen=True)
class Share:
    """A kind or a layer: its bytes, the predicted KLD (nats) of its types and the fraction of the whole, its types."""

    name: str
    tensors: int
    bytes: int
    kld: float
    share: float
    types: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Moved:
    """Tensors of a kind that have another type than in the preset.

    `bytes` more than there, `kld` the predicted change in nats; `rate` nats saved per MB spent (up), or lost per MB
    saved (down).
    """

    kind: str
    before: str
    after: str
    layers: tuple[int, ...]
    count: int
    bytes: int
    kld: float | None

    @property
    def direction(self) -> str:
        """up, down or level, in bits per weight."""
        change = type_by_name(self.after).bpw - type_by_name(self.before).bpw
        return "up" if change > 0 else "down" if change < 0 else "level"

    @property
    def rate(self) -> float | None:
        """Nats per MB."""
        return None if self.kld is None or not self.bytes else abs(self.kld / (self.bytes / 1e6))


def shares(result: PlanResult, places: Places, by: str) -> list[Share]:
    """By "kind" or "layer", in the model's order; outside of layers a tensor stands for itself."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name, (kind, layer) in places.items():
        found[kind if by == "kind" or layer is None else f"layer {layer}"].append(name)
    options = {name: {o.type: o for o in menu} for name, menu in result.problem.options.items()}
    costs = {name: _cost(options[name], result.types[name]) for name in places}
    total = sum(costs.values()) or 1.0
    rows = []
    for label, names in found.items():
        kld = sum(costs[name] for name in names)
        types = collections.Counter(result.types[name] for name in names)
        nbytes = sum(options[n][result.types[n]].nbytes for n in names if result.types[n] in options[n])
        rows.append(Share(label, len(names), nbytes, kld, kld / total, dict(types.most_common())))
    return rows


def moves(result: PlanResult, places: Places) -> list[Moved]:
    """What is other than in the preset, the largest predicted change first."""
    if result.preset is None:
        return []
    groups: dict[tuple[str, str, str], list[str]] = collections.defaultdict(list)
    for name, (kind, _) in places.items():
        before, after = result.preset.types[name], result.types[name]
        if before != after:
            groups[kind, before, after].append(name)
    options = {name: {o.type: o for o in menu} for name, menu in result.problem.options.items()}
    rows = []
    for (kind, before, after), names in groups.items():
        known = all({before, after} <= options[name].keys() for name in names)
        bytes_ = sum(options[n][after].nbytes - options[n][before].nbytes for n in names) if known else 0
        kld = sum(options[n][after].cost - options[n][before].cost for n in names) if known else None
        layers = tuple(sorted(layer for name in names if (layer := places[name][1]) is not None))
        rows.append(Moved(kind, before, after, layers, len(names), bytes_, kld))
    return sorted(rows, key=lambda row: -abs(row.kld or 0.0))


def _cost(menu: Mapping[str, object], kind: str) -> float:
    option = menu.get(kind)
    return float(getattr(option, "cost", 0.0))

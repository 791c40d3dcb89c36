"""What comes out of a plan: the recipe, where its bytes and its loss are, and what moved against the preset."""

import collections
import dataclasses
from collections.abc import Mapping

from bitladder.engine import type_by_name, versions
from bitladder.plan.allocate.problem import Allocation, Problem, TypeOption
from bitladder.plan.corrections import Places
from bitladder.plan.feedback import FeedbackResult
from bitladder.plan.prices.menu import TypePrices
from bitladder.plan.subject import Preset, Subject
from bitladder.plan.target import Target
from bitladder.recipe import FileUsed, ImatrixUsed, Recipe


@dataclasses.dataclass(frozen=True)
class PlanResult:
    """What comes out of a plan.

    Parameters:
        types: type of every tensor of the model.
        bytes: exact size of the file.
        allocation: the recipe as an allocation of `problem`.
        problem: menus with the prices that were used last.
        prices: prices before any correction.
        preset: the preset that the plan is compared with, or None.
        feedback: recipes that were measured; None without feedback.
        text: name of the text that was measured on.
        tokens: tokens that the recipes of this plan were decoded on.
        seconds: time that planning took.
    """

    types: dict[str, str]
    bytes: int
    allocation: Allocation
    problem: Problem
    prices: TypePrices
    preset: Preset | None
    feedback: FeedbackResult | None
    text: str
    tokens: int
    seconds: float

    @property
    def predicted_kld(self) -> float:
        """The predicted KLD of the recipe, nats per token."""
        offset = self.feedback.correction.offset if self.feedback is not None else 0.0
        return self.allocation.cost + offset


def planned_recipe(subject: Subject, result: PlanResult, target: Target) -> Recipe:
    """The recipe with what is known of how it was made."""
    origin = result.prices.made
    imatrix = None
    if subject.imatrix_path is not None and subject.imatrix is not None:
        imatrix = ImatrixUsed(
            name=subject.imatrix_path.name,
            sha256=subject.imatrix_sha256,
            entries=len(subject.imatrix.entries),
            chunks=subject.imatrix.chunk_count,
            n_ctx=subject.imatrix.chunk_size,
        )
    way = result.feedback.best.name if result.feedback is not None else "exact, not measured"
    return Recipe(
        model=str(subject.file.get("general.name") or subject.path.stem),
        budget=target.text,
        bytes=result.bytes,
        bpw=bits_per_weight(subject, result.types),
        made=f"bitladder plan: {way}; {result.prices.method} prices on {origin.text}",
        source=FileUsed(name=origin.model, sha256=origin.model_sha256),
        imatrix=imatrix,
        versions=versions(),
        tensors=result.types,
    )


def bits_per_weight(subject: Subject, types: Mapping[str, str]) -> float:
    """Bits per weight over all weights, tensor bytes only; `types` has every tensor of the model."""
    return 8 * sum(subject.plain_bytes(name, kind) for name, kind in types.items()) / subject.weights()


@dataclasses.dataclass(frozen=True)
class Share:
    """A kind or a layer.

    Parameters:
        name: of the kind, or "layer N".
        tensors: number of tensors.
        bytes: of these tensors.
        kld: predicted KLD of their types, nats per token.
        share: that KLD as a fraction of the whole.
        types: type → number of tensors.
    """

    name: str
    tensors: int
    bytes: int
    kld: float
    share: float
    types: dict[str, int]


@dataclasses.dataclass(frozen=True)
class MovedTensors:
    """Tensors of a kind that have another type than in the preset.

    Parameters:
        kind: such as attn_v.
        before: the preset's type.
        after: the planned type.
        layers: their layers.
        count: number of tensors.
        bytes: change of bytes.
        kld: predicted change of KLD, nats per token; None where a type has no price.
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
        """Up, down or level, by bits per weight."""
        change = type_by_name(self.after).bpw - type_by_name(self.before).bpw
        return "up" if change > 0 else "down" if change < 0 else "level"

    @property
    def rate(self) -> float | None:
        """Nats saved per MB spent (up), or lost per MB saved (down)."""
        return None if self.kld is None or not self.bytes else abs(self.kld / (self.bytes / 1e6))


def shares(result: PlanResult, places: Places, by: str) -> list[Share]:
    """Bytes and predicted KLD by "kind" or "layer", in the model's order. A kind outside of layers has its own row."""
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name, (kind, layer) in places.items():
        groups[kind if by == "kind" or layer is None else f"layer {layer}"].append(name)
    options = {name: {o.type: o for o in menu} for name, menu in result.problem.options.items()}
    costs = {name: _cost(options[name], result.types[name]) for name in places}
    total = sum(costs.values()) or 1.0
    rows = []
    for label, names in groups.items():
        kld = sum(costs[name] for name in names)
        types = collections.Counter(result.types[name] for name in names)
        nbytes = sum(options[n][result.types[n]].nbytes for n in names if result.types[n] in options[n])
        rows.append(Share(label, len(names), nbytes, kld, kld / total, dict(types.most_common())))
    return rows


def moved_tensors(result: PlanResult, places: Places) -> list[MovedTensors]:
    """The tensors that have another type than in the preset, the largest predicted change first."""
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
        rows.append(MovedTensors(kind, before, after, layers, len(names), bytes_, kld))
    return sorted(rows, key=lambda row: -abs(row.kld or 0.0))


def _cost(menu: Mapping[str, TypeOption], kind: str) -> float:
    return menu[kind].cost if kind in menu else 0.0

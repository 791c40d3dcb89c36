"""Pricing a model: rendered errors, probes, whole kinds, the law through them, and a check."""

import collections
import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np

from bitladder.engine.types import TensorType
from bitladder.plan.prices.design import first_groups, held_out, probe_type, spaced, split
from bitladder.plan.prices.document import Check, GroupPrice, Made, Sensitivity, TensorPrices
from bitladder.plan.prices.law import Probe, fit
from bitladder.plan.prices.menu import pruned
from bitladder.progress import SILENT, Progress, Task
from bitladder.trial.journal import Journal, Measurement, Measures
from bitladder.trial.render import Renderer
from bitladder.trial.render_many import render_all

Menus = Mapping[str, Sequence[TensorType]]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much to measure: `tokens` to decode for all prices, `chunks` for each probe, `pairs` to check with."""

    tokens: int = 120_000
    chunks: int = 1
    pairs: int = 20
    group_share: float = 0.4  # of the tokens


def rendered_errors(renderer: Renderer, menus: Menus, progress: Progress = SILENT) -> dict[str, dict[str, float]]:
    """Σ w (ŵ − w)² of each tensor at each type of its menu: tensor → type → error. Renders what is not cached."""
    pairs = [(name, kind.name) for name, menu in menus.items() for kind in menu]
    found = render_all(renderer, pairs, label="render every tensor in every type", progress=progress)
    return {name: {kind.name: found[name, kind.name] for kind in menu} for name, menu in menus.items()}


def price(
    renderer: Renderer,
    model: Measures,
    menus: Menus,
    places: Mapping[str, tuple[str, int | None]],
    journal: Journal,
    made: Made,
    effort: Effort,
    progress: Progress = SILENT,
) -> Sensitivity:
    """Price every type on the tensors' menus by swapping rendered weights into a loaded model.

    Parameters: `menus` tensor → types; `places` tensor → (kind, layer); `journal` keeps what is measured, so that work
    that was cut short goes on. Raises BitladderError if a tensor cannot be rendered or the model cannot be decoded.
    """
    began, spent = time.monotonic(), journal.tokens
    errors = rendered_errors(renderer, menus, progress)
    work = _Work(menus, places, errors, model, journal, effort)
    probes, groups = work.probes(progress), work.groups(progress)
    law = fit(
        errors,
        {name: places[name][0] for name in menus},
        [Probe(types, found.kld) for types, found in probes],
        {key: found.kld for key, found in groups.items()},
    )
    used = {name: probe_type(menu).name for name, menu in menus.items()}
    check = check_swaps(law.kld, used, model, journal, effort, progress)
    return Sensitivity(
        made=made,
        probe_types=sorted({kind for types, _ in probes for kind in types.values()}),
        tokens=max(journal.tokens, spent),
        seconds=time.monotonic() - began,
        exponents=law.exponent,
        groups=[
            GroupPrice(kind=kind, type=one, kld=found.kld, error=found.error, predicted=law.predicted[kind, one])
            for (kind, one), found in groups.items()
        ],
        check=check,
        tensors=table(renderer, menus, places, errors, law.kld, law.probe),
    )


def table(
    renderer: Renderer,
    menus: Menus,
    places: Mapping[str, tuple[str, int | None]],
    errors: Mapping[str, dict[str, float]],
    kld: Mapping[str, dict[str, float]],
    probe: Mapping[str, float] | None = None,
) -> dict[str, TensorPrices]:
    """Prices as sensitivity.json has them."""
    tensors, probe = renderer.file.tensors, probe or {}
    return {
        name: TensorPrices(
            kind=places[name][0],
            layer=places[name][1],
            weights=tensors[name].elements,
            bytes={kind.name: kind.row_bytes(tensors[name].width) * tensors[name].rows for kind in menu},
            error=errors[name],
            kld=kld[name],
            probe=probe.get(name),
        )
        for name, menu in menus.items()
    }


def check_swaps(
    kld: Mapping[str, Mapping[str, float]],
    used: Mapping[str, str],
    model: Measures,
    journal: Journal,
    effort: Effort,
    progress: Progress = SILENT,
) -> Check | None:
    """Single swaps that nothing was fitted to, against their prices; None for fewer than three.

    `used` tensor → the type that was measured for it alone.
    """
    pairs = held_out({name: list(menu) for name, menu in kld.items()}, used, effort.pairs)
    if len(pairs) < 3:
        return None
    measured = []
    with progress.task("check single swaps", len(pairs)) as task:
        for name, kind in pairs.items():
            task.note(f"{name} {kind}")
            measured.append(journal.measure(model, {name: kind}, effort.chunks, "check").kld)
            task.advance()
    predicted = [kld[name][kind] for name, kind in pairs.items()]
    ratios = np.array(measured) / np.maximum(predicted, 1e-12)
    return Check(
        pairs=len(pairs),
        rank_correlation=rank_correlation(measured, predicted),
        median_ratio=float(np.median(ratios)),
    )


@dataclasses.dataclass(frozen=True)
class _Work:
    menus: Menus
    places: Mapping[str, tuple[str, int | None]]
    errors: Mapping[str, Mapping[str, float]]
    model: Measures
    journal: Journal
    effort: Effort

    def by_kind(self) -> dict[str, list[str]]:
        """Kind → its tensors, by layer."""
        found: dict[str, list[str]] = collections.defaultdict(list)
        for name in sorted(self.menus, key=lambda one: (self.places[one][1] or 0, one)):
            found[self.places[name][0]].append(name)
        return found

    def affordable(self, share: float) -> int:
        """How many probes a share of the tokens pays for."""
        return max(1, int(self.effort.tokens * share / (self.effort.chunks * self.journal.tokens_per_chunk)))

    def probes(self, progress: Progress) -> list[tuple[dict[str, str], Measurement]]:
        """Every tensor at its probe type, alone or with its neighbours."""
        budget = self.affordable(1 - self.effort.group_share)
        types = {name: probe_type(menu).name for name, menu in self.menus.items()}
        found: dict[tuple[str, ...], Measurement] = {}

        def measure(group: tuple[str, ...], task: Task) -> None:
            task.note(group[0])
            swapped = {name: types[name] for name in group}
            found[group] = self.journal.measure(self.model, swapped, self.effort.chunks, "probe")
            task.advance()

        groups = first_groups(self.by_kind(), budget)
        with progress.task("probe tensors", max(budget if len(groups) < len(self.menus) else 0, len(groups))) as task:
            for group in groups:
                measure(group, task)
            left = budget - len(groups)
            while left >= 2 and (wide := split({group: one.kld for group, one in found.items()})):
                del found[wide]
                middle = len(wide) // 2
                measure(wide[:middle], task)
                measure(wide[middle:], task)
                left -= 2
        return [({name: types[name] for name in group}, one) for group, one in found.items()]

    def groups(self, progress: Progress) -> dict[tuple[str, str], Measurement]:
        """Every kind as a whole, at the types that its rendered errors leave in the race."""
        kinds = self.by_kind()
        each = max(2, self.affordable(self.effort.group_share) // len(kinds))
        wanted: list[tuple[str, str]] = []
        for kind, names in kinds.items():
            common = [one for one in self.menus[names[0]] if all(one in self.menus[name] for name in names)]
            sums = {one.name: sum(self.errors[name][one.name] for name in names) for one in common}
            wanted += [(kind, one) for one in spaced([one.name for one in pruned(common, sums)], each)]
        found = {}
        with progress.task("whole kinds at each type", len(wanted)) as task:
            for kind, one in wanted:
                task.note(f"{kind} {one}")
                types = dict.fromkeys(kinds[kind], one)
                found[kind, one] = self.journal.measure(self.model, types, self.effort.chunks, f"kind {kind}")
                task.advance()
        return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's ρ: Pearson's correlation of the ranks (ties share theirs); 0 if either is constant."""
    ranks = [_ranks(np.asarray(one, np.float64)) for one in (a, b)]
    if any(one.std() == 0 for one in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.typing.NDArray[np.float64]) -> np.typing.NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place], np.float64)

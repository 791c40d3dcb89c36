"""Prices of types, from forward passes or from gradients.

From forward passes: rendered errors, probes, whole kinds, the law through them, and a check. What the price of a
(tensor, type) depends on besides this tensor and type: the type that the tensor is probed at is the one of its menu
nearest to `probe_bpw`; the exponent and the factors of its kind are fitted to the types at which the whole kind was
measured, which are spread over what the kind's menus have in common; and the tokens are shared by all tensors. So other
menus may give other prices of the same type. Rendered errors depend on nothing else.

From gradients (extra: torch): the second-order term of every rendered error, from one backward pass. A look-up in the
embeddings is no multiplication by a block's weight and has no such term. The few tensors outside of blocks are swapped
into the loaded model at every type instead, where a tied embedding counts for both its uses. The price of a
(tensor, type) depends on no other tensor or type.
"""

import collections
import dataclasses
import functools
import random
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate import FISHER, fisher_costs
from bitladder.engine import TensorType, Tokens
from bitladder.keys import Algorithm
from bitladder.plan.options import PriceOptions
from bitladder.plan.prices.law import FLOOR, Probe, first_groups, fit, probe_type, pruned, spaced, split
from bitladder.plan.prices.menu import GroupPrice, Menus, PriceCheck, PricedFrom, TensorPrices, TypePrices
from bitladder.progress import SILENT, Bar, Progress
from bitladder.text import EXCERPTS
from bitladder.trial import RENDERING, SWAPPED_KLD, Helpers, MeasuredRecipe, Measurements, Renderer, render_all

PRICES = Algorithm(
    "prices",
    (
        "a law through measured swaps",
        "types with minimums are a family of their own in the law",
        "a type that was not measured takes the larger factor of its neighbours",
        "rounded blocks of few passes are priced",
        "matrices that no calibration text reaches are not planned",
    ),
    uses=(EXCERPTS, RENDERING, SWAPPED_KLD),
)
Floats = npt.NDArray[np.float32]
FISHER_PRICES = Algorithm(
    "prices from gradients",
    ("the second-order term of every rendered error; embeddings and head by swaps",),
    uses=(EXCERPTS, FISHER, RENDERING, SWAPPED_KLD),
)


@dataclasses.dataclass(frozen=True)
class PriceSource:
    """What prices are made from.

    Parameters:
        renderer: renders tensors in types.
        places: tensor → (kind, layer).
        measurements: what measures swaps.
        options: how, and how much.
        key: hash of everything that decides the prices.
        made: the same for a reader.
        helpers: other machines that render; None renders here.
    """

    renderer: Renderer
    places: Mapping[str, tuple[str, int | None]]
    measurements: Measurements
    options: PriceOptions
    key: str
    made: PricedFrom
    helpers: Helpers | None = None

    def rendered_errors(self, menus: Menus, progress: Progress = SILENT) -> dict[str, dict[str, float]]:
        """Renders each tensor in each type of its menu: tensor → type → Σ w (ŵ − w)²."""
        pairs = [(name, kind.name) for name, menu in menus.items() for kind in menu]
        label = "render every tensor in every type"
        if self.helpers is not None:
            self.helpers.render(self.renderer, pairs, label, progress)
        errors = render_all(self.renderer, pairs, label=label, progress=progress)
        return {name: {kind.name: errors[name, kind.name] for kind in menu} for name, menu in menus.items()}

    def table(
        self,
        menus: Menus,
        errors: Mapping[str, dict[str, float]],
        kld: Mapping[str, dict[str, float]],
        probe: Mapping[str, float] | None = None,
    ) -> dict[str, TensorPrices]:
        """Prices as sensitivity.json has them."""
        tensors, probe = self.renderer.file.tensors, probe or {}
        return {
            name: TensorPrices(
                kind=self.places[name][0],
                layer=self.places[name][1],
                weights=tensors[name].elements,
                bytes={kind.name: kind.row_bytes(tensors[name].width) * tensors[name].rows for kind in menu},
                error=errors[name],
                kld=kld[name],
                probe=probe.get(name),
            )
            for name, menu in menus.items()
        }


@PRICES.entry
def price(source: PriceSource, menus: Menus, progress: Progress = SILENT) -> TypePrices:
    """Prices every type on the tensors' menus by swapping rendered weights into a loaded model.

    Parameters:
        source: what prices are made from.
        menus: tensor → types.
        progress: where work is shown.

    Raises:
        BitladderError: a tensor cannot be rendered, or the model cannot be decoded.
    """
    errors = source.rendered_errors(menus, progress)
    work = _Swaps(source, menus, errors)
    probes, groups = work.probes(progress), work.groups(progress)
    law = fit(
        errors,
        {name: source.places[name][0] for name in menus},
        [Probe(types, measured.kld) for types, measured in probes],
        {key: measured.kld for key, measured in groups.items()},
        source.options.law,
    )
    check = check_swaps(law.kld, work.probe_types, source.measurements, source.options, progress)
    return TypePrices(
        key=source.key,
        made=source.made,
        probe_types=sorted({kind for types, _ in probes for kind in types.values()}),
        tokens=source.measurements.tokens,
        exponents=law.exponent,
        groups=[
            GroupPrice(
                kind=kind, type=name, kld=measured.kld, error=measured.error, predicted=law.predicted[kind, name]
            )
            for (kind, name), measured in groups.items()
        ],
        check=check,
        tensors=source.table(menus, errors, law.kld, law.probe),
    )


class _Swaps:
    """The swaps that are measured for the law."""

    def __init__(self, source: PriceSource, menus: Menus, errors: Mapping[str, Mapping[str, float]]) -> None:
        self._menus, self._errors = menus, errors
        self._measurements, self._options = source.measurements, source.options
        self._tokens_per_chunk = source.made.n_ctx
        self.probe_types = {name: probe_type(menu, source.options.probe_bpw).name for name, menu in menus.items()}
        self._by_kind: dict[str, list[str]] = collections.defaultdict(list)
        for name in sorted(menus, key=lambda tensor: (source.places[tensor][1] or 0, tensor)):
            self._by_kind[source.places[name][0]].append(name)

    def _affordable(self, share: float) -> int:
        """How many swaps a share of the tokens pays for."""
        options = self._options
        return max(1, int(options.probe_tokens * share / (options.probe_chunks * self._tokens_per_chunk)))

    def _measure(self, types: Mapping[str, str], label: str) -> MeasuredRecipe:
        return self._measurements.measure(types, self._options.probe_chunks, label)

    def probes(self, progress: Progress) -> list[tuple[dict[str, str], MeasuredRecipe]]:
        """Every tensor at its probe type, alone or with its neighbours."""
        budget = self._affordable(1 - self._options.group_share)
        measured: dict[tuple[str, ...], MeasuredRecipe] = {}

        def measure(group: tuple[str, ...], task: Bar) -> None:
            task.note(group[0])
            measured[group] = self._measure(self._probe(group), "probe")
            task.advance()

        def expect(groups: Sequence[tuple[str, ...]]) -> None:
            self._measurements.expect((self._probe(group), self._options.probe_chunks, "probe") for group in groups)

        groups = first_groups(self._by_kind, budget)
        expect(groups)
        total = max(budget if len(groups) < len(self._menus) else 0, len(groups))
        with progress.task("probe tensors", total) as task:
            for group in groups:
                measure(group, task)
            left = budget - len(groups)
            while left >= 2 and (wide := split({group: measurement.kld for group, measurement in measured.items()})):
                del measured[wide]
                halves = wide[: len(wide) // 2], wide[len(wide) // 2 :]
                expect(halves)
                for half in halves:
                    measure(half, task)
                left -= 2
        return [(self._probe(group), swap) for group, swap in measured.items()]

    def _probe(self, group: tuple[str, ...]) -> dict[str, str]:
        return {name: self.probe_types[name] for name in group}

    def groups(self, progress: Progress) -> dict[tuple[str, str], MeasuredRecipe]:
        """Every kind as a whole, at types that its rendered errors do not rule out: (kind, type) → measurement."""
        each = max(2, self._affordable(self._options.group_share) // len(self._by_kind))
        pairs: list[tuple[str, str]] = []
        for kind, names in self._by_kind.items():
            menus = [self._menus[name] for name in names]
            common = [type_ for type_ in menus[0] if all(type_ in menu for menu in menus)]
            sums = {type_.name: sum(self._errors[name][type_.name] for name in names) for type_ in common}
            left = [type_.name for type_ in pruned(common, sums, self._options.prune_slack)]
            pairs += [(kind, type_name) for type_name in spaced(left, each)]
        recipes = {(kind, type_name): dict.fromkeys(self._by_kind[kind], type_name) for kind, type_name in pairs}
        chunks = self._options.probe_chunks
        self._measurements.expect((types, chunks, f"kind {kind}") for (kind, _), types in recipes.items())
        measured = {}
        with progress.task("whole kinds at each type", len(pairs)) as task:
            for (kind, type_name), types in recipes.items():
                task.note(f"{kind} {type_name}")
                measured[kind, type_name] = self._measure(types, f"kind {kind}")
                task.advance()
        return measured


def check_swaps(
    kld: Mapping[str, Mapping[str, float]],
    used: Mapping[str, str],
    measurements: Measurements,
    options: PriceOptions,
    progress: Progress = SILENT,
) -> PriceCheck | None:
    """Measures single swaps that no price was fitted to.

    Parameters:
        kld: tensor → type → price, nats per token.
        used: tensor → the type at which it was measured alone.
        measurements: what measures.
        options: how many swaps, and on how much text.
        progress: where the swaps are shown.

    Returns:
        The comparison; None for fewer than three swaps.
    """
    pairs = held_out({name: list(menu) for name, menu in kld.items()}, used, options.check_pairs, options.check_seed)
    if len(pairs) < 3:
        return None
    measured = []
    measurements.expect(({name: kind}, options.probe_chunks, "check") for name, kind in pairs.items())
    with progress.task("check single swaps", len(pairs)) as task:
        for name, kind in pairs.items():
            task.note(f"{name} {kind}")
            measured.append(measurements.measure({name: kind}, options.probe_chunks, "check").kld)
            task.advance()
    predicted = [kld[name][kind] for name, kind in pairs.items()]
    ratios = np.array(measured) / np.maximum(predicted, 1e-12)
    return PriceCheck(
        pairs=len(pairs),
        rank_correlation=rank_correlation(measured, predicted),
        median_ratio=float(np.median(ratios)),
    )


def held_out(menus: Mapping[str, Sequence[str]], used: Mapping[str, str], count: int, seed: int) -> dict[str, str]:
    """Draws `count` pairs tensor → type, none of which is in `used`."""
    draw = random.Random(seed)
    names = [name for name in sorted(menus) if any(kind != used.get(name) for kind in menus[name])]
    chosen = draw.sample(names, min(count, len(names)))
    return {name: draw.choice([kind for kind in menus[name] if kind != used.get(name)]) for name in chosen}


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's ρ: Pearson's correlation of the ranks (equal values share a rank); 0 if either is constant.

    Example:
        >>> round(rank_correlation([1, 2, 3], [10, 30, 20]), 3)
        0.5
    """
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (a, b)]
    if any(rank.std() == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place], np.float64)


@FISHER_PRICES.entry
def price_by_gradients(
    source: PriceSource, menus: Menus, chunks: Tokens, *, threads: int | None = None, progress: Progress = SILENT
) -> TypePrices:
    """Prices every type on the tensors' menus.

    Parameters:
        source: what prices are made from.
        menus: tensor → types.
        chunks: tokens for the backward pass, int32, shape [chunks, n_ctx].
        threads: of the CPU; None for all.
        progress: where work is shown.

    Raises:
        BitladderError: torch is not installed, or does not know the architecture.
    """
    options = source.options
    errors = source.rendered_errors(menus, progress)
    inner = [name for name in menus if source.places[name][1] is not None]
    candidates = {
        name: {kind.name: functools.partial(_gap, source.renderer, name, kind) for kind in menus[name]}
        for name in inner
    }
    path = source.renderer.file.path
    costs = fisher_costs(path, chunks, candidates, options=options.fisher, threads=threads, progress=progress)
    kld = {name: {kind: max(cost.sequence, FLOOR) for kind, cost in costs[name].items()} for name in inner}
    outer = [(name, kind.name) for name in menus if name not in kld for kind in menus[name]]
    outside = "outside of the blocks"
    source.measurements.expect(({name: kind}, options.probe_chunks, outside) for name, kind in outer)
    with progress.task("swap embeddings and head", len(outer)) as task:
        for name, kind in outer:
            task.note(f"{name} {kind}")
            measured = source.measurements.measure({name: kind}, options.probe_chunks, outside)
            kld.setdefault(name, {})[kind] = max(measured.kld, FLOOR)
            task.advance()
    check = check_swaps(kld, {}, source.measurements, options, progress)
    return TypePrices(
        method="fisher",
        key=source.key,
        made=source.made,
        tokens=source.measurements.tokens + chunks.size * options.fisher.draws,
        check=check,
        tensors=source.table(menus, errors, kld),
    )


def _gap(renderer: Renderer, name: str, kind: TensorType) -> Floats:
    """The error of a rendered tensor, float32, shape [n_out, n_in]."""
    gap: Floats = renderer.values(name, kind) - renderer.weights(name)
    return gap

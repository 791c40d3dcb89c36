"""Recipes are measured, prices corrected by the measurements, and the problem solved again, until nothing improves."""

import collections
import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from bitladder.keys import Algorithm
from bitladder.plan.allocate.allocation import ALLOCATION, neighbours
from bitladder.plan.allocate.problem import Allocation, Problem
from bitladder.plan.corrections import Correction, Places, correct
from bitladder.plan.options import FeedbackOptions
from bitladder.plan.subject import Prices
from bitladder.plan.target import Target
from bitladder.progress import SILENT, Bar, Progress
from bitladder.text import EXCERPTS
from bitladder.trial import SWAPPED_KLD, MeasuredRecipe, Measurements

PLANNING = Algorithm(
    "planning",
    (
        "recipes are measured, prices corrected, and the problem solved again",
        "rivals compete, and text to which nothing was fitted decides",
        "corrections are fitted to the recipes of the plan itself, not to all that the journal holds",
        "matrices that no calibration text reaches are not planned",
        "a preset's own recipe fits into its size, with the key of our version, so that it can win",
        "where the file needs room for metadata, rivals leave it, and the preset with its cheapest step down competes",
    ),
    uses=(ALLOCATION, EXCERPTS, SWAPPED_KLD),
)


@dataclasses.dataclass(frozen=True)
class TriedRecipe:
    """A recipe that was tried.

    Parameters:
        name: how it came about.
        types: tensor → type.
        bytes: size of its file.
        predicted: predicted KLD, nats per token; None for a recipe that was not predicted.
        measured: its measurement on the text that prices are corrected on.
        judged: its measurement on the text that decides; None if it was no finalist.
    """

    name: str
    types: dict[str, str]
    bytes: int
    predicted: float | None
    measured: MeasuredRecipe
    judged: MeasuredRecipe | None = None

    @property
    def figure(self) -> MeasuredRecipe:
        """The measurement to report: on the text that decides if there is one."""
        return self.judged or self.measured


@dataclasses.dataclass(frozen=True)
class FeedbackResult:
    """The best recipe and the way to it.

    Parameters:
        best: the recipe that was chosen.
        tried: all recipes that might have been.
        allocation: the best recipe as an allocation of the last problem.
        problem: the problem that the last corrected prices make.
        correction: the last correction.
    """

    best: TriedRecipe
    tried: tuple[TriedRecipe, ...]
    allocation: Allocation
    problem: Problem
    correction: Correction


@dataclasses.dataclass(frozen=True)
class PlanProblem:
    """What is planned.

    Parameters:
        prices: tensor → type → nats per token, before any correction.
        places: tensor → (kind, layer).
        target: a size or a KLD.
        build: makes a problem of prices.
        full: tensor → its type in full precision.
        tensor_bytes: bytes of a (tensor, type) in the file.
    """

    prices: Prices
    places: Places
    target: Target
    build: Callable[[Prices], Problem]
    full: Mapping[str, str]
    tensor_bytes: Callable[[str, str], int]


class Feedback:
    """The loop.

    Parameters:
        planned: prices, target and problem.
        measurements: what measures recipes. Prices are corrected by what is measured here, and by nothing else.
        options: how many recipes, and on how much text.
    """

    def __init__(self, planned: PlanProblem, measurements: Measurements, options: FeedbackOptions) -> None:
        self._planned, self._measurements, self._options = planned, measurements, options
        self._target = planned.target
        self._overhead = planned.build(planned.prices).fixed_bytes
        self._tried: list[TriedRecipe] = []

    @PLANNING.entry
    def run(self, rivals: Mapping[str, Mapping[str, str]], progress: Progress = SILENT) -> FeedbackResult:
        """Plans. The best recipe of all is returned, rivals included.

        Parameters:
            rivals: name → types of recipes to compete with, such as the preset.
            progress: where recipes are shown.
        """
        options, places = self._options, self._planned.places
        total = len(rivals) + 1 + 2 * len({kind for kind, _ in places.values()}) + options.random_recipes
        with progress.task("measure recipes, correct prices", total + options.rounds + options.exchanges) as task:
            self._expect(rivals.items(), options.chunks)
            for name, types in rivals.items():
                self._try(name, types, None, task)
            problem = self._planned.build(self._planned.prices)
            allocation = self._target.solve(problem)
            self._try("exact", allocation.types, allocation.cost, task)
            self._teach("kind by kind", kind_moves(problem, allocation.types, places), task)
            for turn in range(options.rounds):
                if turn == 1:
                    near = random_moves(problem, self._best().types, places, options.random_recipes, seed=turn)
                    self._teach("parts of kinds", near, task)
                correction, problem, allocation = self._again()
                seen = any(tried.types == allocation.types for tried in self._tried)
                predicted = allocation.cost + correction.offset
                self._try(f"corrected, round {turn + 1}", allocation.types, predicted, task)
                if seen and turn > 1:
                    break
            self._exchange(task)
            best = self._judge(set(rivals), task) if options.judging_chunks else self._best()
        correction, problem, _ = self._again()
        return FeedbackResult(best, tuple(self._tried), self._allocation(problem, best.types), problem, correction)

    def _again(self) -> tuple[Correction, Problem, Allocation]:
        """Corrects prices by what is measured so far, and solves."""
        prices, options = self._planned.prices, self._options
        correction = correct(
            prices, self._planned.places, self._whole_recipes(), self._best().measured, options.correction
        )
        problem = self._planned.build(correction.apply(prices))
        return correction, problem, self._target.solve(problem, correction.offset)

    def _whole_recipes(self) -> list[MeasuredRecipe]:
        """Recipes of nearly all tensors. A single swap from full precision is another regime.

        The text that decides teaches nothing: its chunks are left out.
        """
        least = self._options.whole_share * len(self._planned.places)
        recipes = [recipe for recipe in self._measurements.all() if len(recipe.types) >= least]
        return [recipe.part(0, self._options.chunks) for recipe in recipes]

    def _ranked(self) -> list[TriedRecipe]:
        return sorted(self._tried, key=lambda recipe: self._target.rank(recipe.measured, recipe.bytes))

    def _best(self) -> TriedRecipe:
        return self._ranked()[0]

    def _judge(self, rivals: set[str], task: Bar) -> TriedRecipe:
        """The best of finalists and rivals on text to which nothing was fitted."""
        options, ranked = self._options, self._ranked()
        finalists = ranked[: options.finalists]
        finalists += [recipe for recipe in ranked[options.finalists :] if recipe.name in rivals]
        judged = []
        self._expect([(finalist.name, finalist.types) for finalist in finalists], options.text_chunks)
        for finalist in finalists:
            task.note(f"judge {finalist.name}")
            whole = self._measure(finalist.types, options.text_chunks, finalist.name)
            recipe = dataclasses.replace(finalist, judged=whole.part(options.chunks, options.text_chunks))
            self._tried[self._tried.index(finalist)] = recipe
            judged.append(recipe)
        target = self._target
        if target.max_kld is not None:
            # The text that decides may be harder or easier than the text that the goal is stated on.
            ratios = [finalist.figure.kld / finalist.measured.kld for finalist in judged if finalist.measured.kld > 0]
            target = dataclasses.replace(
                target, max_kld=target.max_kld * float(np.mean(ratios)) if ratios else target.max_kld
            )
        return min(judged, key=lambda finalist: target.rank(finalist.figure, finalist.bytes))

    def _measure(self, types: Mapping[str, str], chunks: int, label: str) -> MeasuredRecipe:
        return self._measurements.measure(self._swapped(types), chunks, label)

    def _expect(self, recipes: Iterable[tuple[str, Mapping[str, str]]], chunks: int) -> None:
        self._measurements.expect((self._swapped(types), chunks, label) for label, types in recipes)

    def _swapped(self, types: Mapping[str, str]) -> dict[str, str]:
        return {name: kind for name, kind in types.items() if kind != self._planned.full[name]}

    def _try(self, name: str, types: Mapping[str, str], predicted: float | None, task: Bar) -> TriedRecipe:
        task.note(name)
        measured = self._measure(types, self._options.chunks, name)
        recipe = TriedRecipe(name, dict(types), self._bytes(types), predicted, measured)
        if all(tried.types != recipe.types for tried in self._tried):
            self._tried.append(recipe)
        task.note(f"{name}: KLD {measured.kld:.5f}")
        task.advance()
        return recipe

    def _teach(self, label: str, recipes: Sequence[Mapping[str, str]], task: Bar) -> None:
        """Measures recipes that only correct prices."""
        self._expect([(label, types) for types in recipes], self._options.teaching_chunks)
        for types in recipes:
            task.note(label)
            self._measure(types, self._options.teaching_chunks, label)
            task.advance()

    def _bytes(self, types: Mapping[str, str]) -> int:
        return self._overhead + sum(self._planned.tensor_bytes(name, kind) for name, kind in types.items())

    def _allocation(self, problem: Problem, types: Mapping[str, str]) -> Allocation:
        menus = {name: {option.type: option for option in menu} for name, menu in problem.options.items()}
        used = [menus[name][kind] for name, kind in types.items() if kind in menus[name]]
        solved = self._target.solve(problem)
        cost = float(sum(option.cost for option in used))
        return dataclasses.replace(solved, types=dict(types), bytes=self._bytes(types), cost=cost)

    def _exchange(self, task: Bar) -> None:
        """Tries exchanges with a predicted cost near 0. One that measures better by its error replaces the best."""
        options, best, failed = self._options, self._best(), 0
        for turn in range(options.exchanges):
            _, problem, _ = self._again()
            if any(kind not in {o.type for o in problem.options[n]} for n, kind in best.types.items()):
                return  # a rival leads whose types have no price
            allocation = self._allocation(problem, best.types)
            near = neighbours(problem, allocation, options.exchange_candidates, self._target.max_bytes)
            recipes = (best.types | exchange.types for exchange in near)
            types = next((types for types in recipes if all(types != tried.types for tried in self._tried)), None)
            if types is None:
                return
            recipe = self._try(f"exchange {turn + 1}", types, None, task)
            gaps = np.array(recipe.measured.chunks) - np.array(best.measured.chunks)
            error = float(gaps.std() / np.sqrt(max(len(gaps) - 1, 1)))
            if self._best().types == recipe.types and float(gaps.mean()) < -error:
                best, failed = recipe, 0
            else:
                failed += 1
            if failed >= options.failed_exchanges:
                return


def step(problem: Problem, name: str, kind: str, direction: int) -> str:
    """The next type of a tensor on the lower hull of its (bytes, cost): up (+1) or down (−1). At the end its own type.

    Example:
        >>> from bitladder.plan.allocate.problem import TypeOption
        >>> menu = (TypeOption("q3_K", 10, 5.0), TypeOption("q4_0", 12, 4.9), TypeOption("q4_K", 14, 1.0))
        >>> step(Problem({"attn_v": menu}), "attn_v", "q3_K", 1)
        'q4_K'
    """
    here = next(option for option in problem.options[name] if option.type == kind)
    if direction > 0:
        menu = [o for o in problem.options[name] if o.nbytes > here.nbytes and o.cost < here.cost]
        # Most nats saved for each byte.
        return max(menu, key=lambda o: (here.cost - o.cost) / (o.nbytes - here.nbytes)).type if menu else kind
    menu = [o for o in problem.options[name] if o.nbytes < here.nbytes]
    # Fewest nats lost for each byte saved.
    return min(menu, key=lambda o: (o.cost - here.cost) / (here.nbytes - o.nbytes)).type if menu else kind


def kind_moves(problem: Problem, types: Mapping[str, str], places: Places) -> list[dict[str, str]]:
    """The recipe with each kind in turn one step down, and one step up."""
    by_kind: dict[str, list[str]] = collections.defaultdict(list)
    for name in types:
        by_kind[places[name][0]].append(name)
    recipes = []
    for names in by_kind.values():
        for direction in (-1, 1):
            moved = dict(types) | {name: _step(problem, name, types[name], direction) for name in names}
            if moved != dict(types):
                recipes.append(moved)
    return recipes


def random_moves(
    problem: Problem, types: Mapping[str, str], places: Places, count: int, seed: int
) -> list[dict[str, str]]:
    """Recipes in which each third of the layers of each kind goes one step up or down at random.

    As many thirds go up as down, so that the size stays near the recipe's.
    """
    draw = random.Random(seed)
    layers = max((layer for _, layer in places.values() if layer is not None), default=0) + 1
    parts: dict[tuple[str, int], list[str]] = collections.defaultdict(list)
    for name in types:
        kind, layer = places[name]
        parts[kind, -1 if layer is None else 3 * layer // layers].append(name)
    recipes = []
    for _ in range(count):
        signs = [1, -1] * (len(parts) // 2 + 1)
        draw.shuffle(signs)
        moved = dict(types)
        for names, sign in zip(parts.values(), signs, strict=False):
            moved |= {name: _step(problem, name, types[name], sign) for name in names}
        recipes.append(moved)
    return recipes


def _step(problem: Problem, name: str, kind: str, direction: int) -> str:
    return kind if name in problem.pins else step(problem, name, kind, direction)

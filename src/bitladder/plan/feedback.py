"""Recipes are measured, prices corrected by what was measured, and the problem solved again, until nothing improves."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bitladder.plan.allocate import Allocation, Problem, neighbours
from bitladder.plan.corrections import Correction, correct
from bitladder.plan.moves import kind_moves, random_moves
from bitladder.plan.priced_problem import Prices
from bitladder.plan.target import Target
from bitladder.progress import SILENT, Progress, Task
from bitladder.trial.journal import Journal, Measurement, Measures

Places = Mapping[str, tuple[str, int | None]]


@dataclasses.dataclass(frozen=True)
class FeedbackEffort:
    """How much to measure.

    `chunks` for a recipe that may be returned, `move_chunks` for one that only teaches; `rounds` of correcting and
    solving; `random` recipes to learn parts of kinds from; `exchanges` to try at the end. With `judge_chunks`, so many
    chunks that come after the others and that nothing was fitted to decide among the best `finalists` and the rivals.
    """

    chunks: int = 12
    move_chunks: int = 6
    rounds: int = 4
    random: int = 10
    exchanges: int = 6
    judge_chunks: int = 0
    finalists: int = 3

    @property
    def text_chunks(self) -> int:
        """Chunks of text that are needed."""
        return self.chunks + self.judge_chunks


@dataclasses.dataclass(frozen=True)
class Tried:
    """A recipe that was tried: `name` says how it came about; `predicted` nats, None for what was not predicted.

    `judged` is its measurement on the chunks that decide, if it came so far.
    """

    name: str
    types: dict[str, str]
    bytes: int
    predicted: float | None
    measured: Measurement
    judged: Measurement | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """The best recipe and the way to it. `price` is nats per byte at the end, `correction` the last one."""

    best: Tried
    tried: tuple[Tried, ...]
    allocation: Allocation
    problem: Problem
    correction: Correction
    prices: dict[str, dict[str, float]]


class Feedback:
    """The loop.

    `build` makes a problem of prices; `places` are tensor → (kind, layer), `full` the full precision of each tensor,
    `tensor_bytes` what (tensor, type) takes in the file.
    """

    def __init__(
        self,
        prices: Prices,
        places: Places,
        target: Target,
        build: Callable[[Prices], Problem],
        journal: Journal,
        model: Measures,
        effort: FeedbackEffort,
        full: Mapping[str, str],
        tensor_bytes: Callable[[str, str], int],
    ) -> None:
        self.prices, self.places, self.target, self.build = prices, places, target, build
        self.journal, self.model, self.effort, self.full = journal, model, effort, full
        self._tensor_bytes, self._overhead = tensor_bytes, build(prices).fixed_bytes
        self.tried: list[Tried] = []

    def run(self, rivals: Mapping[str, Mapping[str, str]], progress: Progress = SILENT) -> Found:
        """Plan, with `rivals` (name → types, such as the preset) measured too: the best of all is returned."""
        effort = self.effort
        total = len(rivals) + 1 + 2 * len({kind for kind, _ in self.places.values()}) + effort.random
        with progress.task("measure recipes, correct prices", total + effort.rounds + effort.exchanges) as task:
            for name, types in rivals.items():
                self._try(name, types, None, task)
            problem = self.build(self.prices)
            allocation = self.target.solve(problem)
            self._try("exact", allocation.types, allocation.cost, task)
            self._teach("kind by kind", kind_moves(problem, allocation.types, self.places), task)
            for turn in range(effort.rounds):
                best = self._best()
                if turn == 1:
                    near = random_moves(problem, best.types, self.places, effort.random, seed=turn)
                    self._teach("parts of kinds", near, task)
                correction, problem, allocation = self._again()
                seen = any(one.types == allocation.types for one in self.tried)
                predicted = allocation.cost + correction.offset
                self._try(f"corrected, round {turn + 1}", allocation.types, predicted, task)
                if seen and turn > 1:
                    break
            self._exchange(task)
            best = self._judge(set(rivals), task) if effort.judge_chunks else self._best()
        correction, problem, _ = self._again()
        return Found(
            best,
            tuple(self.tried),
            self._allocation(problem, best.types),
            problem,
            correction,
            correction.apply(self.prices),
        )

    def _again(self) -> tuple[Correction, Problem, Allocation]:
        correction = correct(self.prices, self.places, self._measured(), self._best().measured)
        problem = self.build(correction.apply(self.prices))
        return correction, problem, self.target.solve(problem, correction.offset)

    def _measured(self) -> list[Measurement]:
        """Recipes of nearly all tensors: single swaps from full precision are another regime."""
        least = 0.8 * len(self.places)
        count = self.effort.chunks  # what comes after them in the text is for others to judge by
        return [one.part(0, count) for one in self.journal.found.values() if len(one.types) >= least]

    def _best(self) -> Tried:
        return min(self.tried, key=lambda one: self.target.rank(one.measured, one.bytes))

    def _judge(self, rivals: set[str], task: Task) -> Tried:
        """The best on text that taught nothing, among the finalists and the rivals."""
        ranked = sorted(self.tried, key=lambda one: self.target.rank(one.measured, one.bytes))
        chosen = ranked[: self.effort.finalists]
        chosen += [one for one in ranked[self.effort.finalists :] if one.name in rivals]
        judged = []
        for one in chosen:
            task.note(f"judge {one.name}")
            whole = self._measure(one.types, self.effort.text_chunks, one.name)
            made = dataclasses.replace(one, judged=whole.part(self.effort.chunks, self.effort.text_chunks))
            self.tried[self.tried.index(one)] = made
            judged.append(made)
        target = self.target
        if target.max_kld is not None:
            # The text that decides may be harder or easier than the one that the goal is stated on.
            scale = np.mean(
                [one.judged.kld / one.measured.kld for one in judged if one.judged and one.measured.kld > 0]
            )
            target = dataclasses.replace(target, max_kld=float(target.max_kld * scale))
        return min(judged, key=lambda one: target.rank(one.judged or one.measured, one.bytes))

    def _measure(self, types: Mapping[str, str], chunks: int, label: str) -> Measurement:
        swapped = {name: kind for name, kind in types.items() if kind != self.full[name]}
        return self.journal.measure(self.model, swapped, chunks, label)

    def _try(self, name: str, types: Mapping[str, str], predicted: float | None, task: Task) -> Tried:
        task.note(name)
        measured = self._measure(types, self.effort.chunks, name)
        made = Tried(name, dict(types), self._bytes(types), predicted, measured)
        if all(one.types != made.types for one in self.tried):
            self.tried.append(made)
        task.note(f"{name}: KLD {measured.kld:.5f}")
        task.advance()
        return made

    def _teach(self, label: str, recipes: Sequence[Mapping[str, str]], task: Task) -> None:
        for types in recipes:
            task.note(label)
            self._measure(types, self.effort.move_chunks, label)
            task.advance()

    def _bytes(self, types: Mapping[str, str]) -> int:
        return self._overhead + sum(self._tensor_bytes(name, kind) for name, kind in types.items())

    def _allocation(self, problem: Problem, types: Mapping[str, str]) -> Allocation:
        menus = {name: {option.type: option for option in menu} for name, menu in problem.options.items()}
        used = [menus[name][kind] for name, kind in types.items() if kind in menus[name]]
        solved = self.target.solve(problem)
        return dataclasses.replace(
            solved, types=dict(types), bytes=self._bytes(types), cost=float(sum(one.cost for one in used))
        )

    def _exchange(self, task: Task) -> None:
        """Swaps that are predicted to cost about nothing: one that measures better by its error is taken."""
        best, missed = self._best(), 0
        for turn in range(self.effort.exchanges):
            _, problem, _ = self._again()
            if any(kind not in {o.type for o in problem.options[n]} for n, kind in best.types.items()):
                return  # a rival won whose types have no price
            allocation = self._allocation(problem, best.types)
            candidates = (best.types | one.types for one in neighbours(problem, allocation, 40, self.target.max_bytes))
            types = next((one for one in candidates if all(one != tried.types for tried in self.tried)), None)
            if types is None:
                return
            made = self._try(f"exchange {turn + 1}", types, None, task)
            gaps = np.array(made.measured.chunks) - np.array(best.measured.chunks)
            error = float(gaps.std() / np.sqrt(max(len(gaps) - 1, 1)))
            if self._best().types == made.types and float(gaps.mean()) < -error:
                best, missed = made, 0
            else:
                missed += 1
            if missed >= 3:
                return

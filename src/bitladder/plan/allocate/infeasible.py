"""The error for constraints that cannot all be kept: which of them, and by how much."""

import numpy as np

from bitladder.errors import BitladderError
from bitladder.plan.allocate.choices import Choices, time_limits, total
from bitladder.plan.allocate.problem import Problem
from bitladder.plan.allocate.solve import solve
from bitladder.units import size_text


def no_size(problem: Problem, choices: Choices, max_bytes: int) -> BitladderError:
    """Why no allocation fits into `max_bytes`: the smallest possible file, and the constraints behind its size."""
    smallest = solve(choices, choices.nbytes, time_limits(problem, choices), problem.max_types)
    if smallest is None:
        return no_allocation(problem, choices)
    nbytes = int(total(choices.nbytes, smallest.chosen)) + problem.fixed_bytes
    return BitladderError(
        f"no allocation fits into {size_text(max_bytes)}: the smallest possible file has"
        f" {size_text(nbytes)}{_blame(problem, choices, nbytes)}"
    )


def no_cost(problem: Problem, choices: Choices, max_cost: float) -> BitladderError:
    """Why no allocation reaches `max_cost`: the lowest possible cost."""
    lowest = solve(choices, choices.cost, time_limits(problem, choices), problem.max_types)
    if lowest is None:
        return no_allocation(problem, choices)
    return BitladderError(
        f"no allocation is predicted to reach a KLD of {max_cost:g}: the lowest is"
        f" {total(choices.cost, lowest.chosen):.6g}{_with(problem)}"
    )


def no_allocation(problem: Problem, choices: Choices) -> BitladderError:
    """Why there is no allocation of any size: the limit on types or the limit on time cannot be kept."""
    if problem.max_types is not None and solve(choices, choices.cost, [], problem.max_types) is None:
        return BitladderError(
            f"no allocation uses only {problem.max_types} different types{_with(problem)};"
            f" {_fewest_types(choices)} are needed"
        )
    fastest = solve(choices, choices.seconds, [], problem.max_types)
    assert fastest is not None and problem.max_seconds is not None  # without a limit on time there is an allocation
    return BitladderError(
        f"no allocation is predicted to take at most {problem.max_seconds:.4g} s per token: the fastest takes"
        f" {total(choices.seconds, fastest.chosen):.4g} s{_with(problem)}"
    )


def _fewest_types(choices: Choices) -> int:
    return next(k for k in range(1, len(choices.kinds) + 1) if solve(choices, choices.cost, [], k) is not None)


def _with(problem: Problem) -> str:
    """The constraints, as text behind a figure."""
    parts = [f"{len(problem.pins)} pinned"] if problem.pins else []
    parts += [f"{len(problem.floors)} with a floor"] if problem.floors else []
    parts += [f"{sum(map(len, problem.ties))} tied"] if problem.ties else []
    text = f" (tensors: {', '.join(parts)})" if parts else ""
    return text + (f" and at most {problem.max_types} types" if problem.max_types is not None else "")


def _blame(problem: Problem, choices: Choices, nbytes: int) -> str:
    """How many bytes of the smallest file each kind of constraint costs, and which tensor costs most."""
    alone = {name: min(option.nbytes for option in menu) for name, menu in problem.options.items()}
    starts = np.flatnonzero(np.diff(choices.group, prepend=-1))
    kept = np.minimum.reduceat(choices.nbytes, starts)
    extra = {
        names: int(least) - sum(alone[name] for name in names)
        for names, least in zip(choices.groups, kept, strict=True)
    }
    parts = []
    if (menus := sum(extra.values())) > 0:
        most = max(extra, key=lambda names: extra[names])
        why = " and ".join(
            word
            for word, constraint in (("pins", problem.pins), ("floors", problem.floors), ("ties", problem.ties))
            if constraint
        )
        parts.append(f"{size_text(menus)} of it because of {why}, {size_text(extra[most])} for {_named(problem, most)}")
    if (others := nbytes - problem.fixed_bytes - menus - sum(alone.values())) > 0:
        parts.append(f"{size_text(others)} because of limits on types or time")
    return f" ({'; '.join(parts)})" if parts else ""


def _named(problem: Problem, names: tuple[str, ...]) -> str:
    """The tensors of a group, with their pin or floor."""
    name = next((name for name in names if name in problem.pins or name in problem.floors), names[0])
    what = f" (pinned to {problem.pins[name]})" if name in problem.pins else ""
    if not what and name in problem.floors:
        what = f" (floor {problem.floors[name]:g} bpw)"
    return f"{name}{what}" + (f" and {len(names) - 1} tied to it" if len(names) > 1 else "")

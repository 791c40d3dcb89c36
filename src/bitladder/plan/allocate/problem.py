"""What is to be allocated, and the same as arrays: ties are one group, pins and floors shorten menus, limits."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError
from bitladder.units import number_of


@dataclasses.dataclass(frozen=True)
class TypeOption:
    """One type that a tensor may have.

    Parameters:
        type: name of the type.
        nbytes: bytes in the file, with the padding to the file's alignment.
        cost: predicted KLD that it adds, nats per token. It comes from measurements and may be slightly negative.
        seconds: predicted time to read the tensor for one token.
        bpw: bits per weight of the type. Only tensors with a floor need it.
    """

    type: str
    nbytes: int
    cost: float
    seconds: float = 0.0
    bpw: float | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Tensors with their menus, and what every allocation must respect.

    Parameters:
        options: tensor → its menu.
        fixed_bytes: bytes of header, metadata and tensors that have no menu.
        pins: tensor → the one type it may have.
        ties: sets of tensors that must have equal types. Sets that overlap are joined.
        floors: tensor → fewest bits per weight.
        max_types: how many types may be used among these tensors; None for no limit.
        max_seconds: largest sum of `seconds`; None for no limit. The caller subtracts what else a token costs.
    """

    options: Mapping[str, tuple[TypeOption, ...]]
    fixed_bytes: int = 0
    pins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ties: tuple[frozenset[str], ...] = ()
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    max_types: int | None = None
    max_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A type for every tensor, in the problem's order.

    Parameters:
        types: tensor → type.
        bytes: size of the file, fixed bytes included.
        cost: predicted KLD, nats per token.
        seconds: predicted time to read the tensors for one token.
        objective: what is minimized.
        bound: no allocation that respects the limits has a smaller objective.
        price: nats that one more byte saves (the dual of the size limit in the linear relaxation), 0 where more bytes
            save nothing.
    """

    types: dict[str, str]
    bytes: int
    cost: float
    seconds: float
    objective: Literal["cost", "bytes"]
    bound: float
    price: float

    @property
    def gap(self) -> float:
        """Largest possible distance of the objective from the optimum, as a fraction of it; 0 if proved optimal."""
        value = self.cost if self.objective == "cost" else self.bytes
        distance = max(0.0, value - self.bound)
        return distance / abs(value) if distance else 0.0


Index = npt.NDArray[np.intp]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Values = Integers | Floats  # one per item; sums of integers are exact
# Limits on floating-point sums hold to this fraction: a limit that is itself such a sum must allow what it came from.
TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class Choices:
    """Groups of tensors, and for each its items: a type that all tensors of the group may have.

    Groups are ordered by name and items by group and type, so that nothing depends on the order of a dict.

    Parameters:
        groups: the tensors of each group.
        kinds: the types that occur.
        group: the group of each item, ascending, shape [items].
        kind: the type of each item, as an index into `kinds`, shape [items].
        nbytes: bytes of the group's tensors as that type, shape [items].
        cost: their predicted KLD, nats per token, shape [items].
        seconds: the predicted time to read them for one token, shape [items].
    """

    groups: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]
    group: Index
    kind: Index
    nbytes: Integers
    cost: Floats
    seconds: Floats

    def types(self, chosen: Index) -> dict[str, str]:
        """Tensor → type, for one item per group."""
        pairs = zip(self.groups, chosen, strict=True)
        return {name: self.kinds[self.kind[item]] for names, item in pairs for name in names}

    def items_of(self, types: Mapping[str, str]) -> Index:
        """The item of each group that has these types. Raises BitladderError if a tensor's type is not on its menu."""
        place = {(int(g), self.kinds[k]): item for item, (g, k) in enumerate(zip(self.group, self.kind, strict=True))}
        chosen = []
        for number, names in enumerate(self.groups):
            items = {place.get((number, types.get(name, ""))) for name in names}
            if len(items) != 1 or None in items:
                pairs = ", ".join(f"{name}: {types.get(name, 'no type')}" for name in names)
                raise BitladderError(f"the problem does not allow {pairs}")
            chosen.append(items.pop())
        return np.array(chosen, np.intp)


def choices_of(problem: Problem) -> Choices:
    """Checks a problem and lays it out. Raises BitladderError that names the tensor and the type."""
    _check(problem)
    groups = _joined(problem.options, problem.ties)
    menus = [_group_menu(problem, names) for names in groups]
    kinds = tuple(sorted({kind for menu in menus for kind in menu}))
    number = {kind: index for index, kind in enumerate(kinds)}
    rows = [(g, kind, options) for g, menu in enumerate(menus) for kind, options in sorted(menu.items())]
    return Choices(
        groups,
        kinds,
        group=np.array([g for g, _, _ in rows], np.intp),
        kind=np.array([number[kind] for _, kind, _ in rows], np.intp),
        nbytes=np.array([sum(o.nbytes for o in options) for _, _, options in rows], np.int64),
        cost=np.array([math.fsum(o.cost for o in options) for _, _, options in rows], np.float64),
        seconds=np.array([math.fsum(o.seconds for o in options) for _, _, options in rows], np.float64),
    )


def _check(problem: Problem) -> None:
    if not problem.options:
        raise BitladderError("there is no tensor to choose a type for")
    for name, menu in problem.options.items():
        if not menu:
            raise BitladderError(f"{name}: there is no type to choose from")
        for option in menu:
            _check_option(name, option)
        twice = {option.type for option in menu if [o.type for o in menu].count(option.type) > 1}
        if twice:
            raise BitladderError(f"{name}: {min(twice)} is on the menu twice")
    _check_names("a pin", problem.pins, problem)
    _check_names("a floor", problem.floors, problem)
    _check_names("a tie", (name for tie in problem.ties for name in tie), problem)
    if problem.max_types is not None and problem.max_types < 1:
        raise BitladderError(f"at most {number_of(problem.max_types, 'different type')}: there must be at least one")
    if problem.max_seconds is not None and not problem.max_seconds > 0:
        raise BitladderError(f"at most {problem.max_seconds} s per token: the limit must be above 0")


def _check_option(name: str, option: TypeOption) -> None:
    if not math.isfinite(option.cost):
        raise BitladderError(f"{name} as {option.type}: its predicted cost is {option.cost}")
    if not (math.isfinite(option.seconds) and option.seconds >= 0):
        raise BitladderError(f"{name} as {option.type}: its predicted time is {option.seconds} s")
    if option.nbytes < 0:
        raise BitladderError(f"{name} as {option.type}: its size is {number_of(option.nbytes, 'byte')}")


def _check_names(what: str, names: Iterable[str], problem: Problem) -> None:
    for name in names:
        if name not in problem.options:
            raise BitladderError(f"{what} names {name}, which is not among the tensors to choose for")


def _joined(names: Iterable[str], ties: Sequence[frozenset[str]]) -> tuple[tuple[str, ...], ...]:
    """Names in groups. A chain of ties joins its tensors. Groups and names are in alphabetical order."""
    group_of = {name: frozenset([name]) for name in names}
    for tie in ties:
        merged = frozenset().union(*(group_of[name] for name in tie))
        group_of.update(dict.fromkeys(merged, merged))
    return tuple(sorted({tuple(sorted(group)) for group in group_of.values()}))


def _group_menu(problem: Problem, names: tuple[str, ...]) -> dict[str, list[TypeOption]]:
    """Type → the option of each tensor of the group, for the types that all of them may have."""
    menus = [{option.type: option for option in _menu(problem, name)} for name in names]
    common = set(menus[0]).intersection(*menus[1:])
    if not common:
        each = "; ".join(f"{name}: {', '.join(sorted(menu))}" for name, menu in zip(names, menus, strict=True))
        raise BitladderError(f"tensors that need equal types have no type in common: {each}")
    return {kind: [menu[kind] for menu in menus] for kind in common}


def _menu(problem: Problem, name: str) -> Sequence[TypeOption]:
    """A tensor's menu after its pin and its floor."""
    menu = problem.options[name]
    if name in problem.pins:
        pin = problem.pins[name]
        kept = [option for option in menu if option.type == pin]
        if not kept:
            known = ", ".join(option.type for option in menu)
            raise BitladderError(f"{name} is pinned to {pin}, which is not among its types ({known})")
        menu = tuple(kept)
    if name in problem.floors:
        floor = problem.floors[name]
        for option in menu:
            if option.bpw is None:
                raise BitladderError(f"{name} has a floor, but the bits per weight of {option.type} are not given")
        kept = [option for option in menu if option.bpw is not None and option.bpw >= floor]
        if not kept:
            best = max(menu, key=lambda option: option.bpw or 0.0)
            pinned = "its pin" if name in problem.pins else "the largest of its types"
            raise BitladderError(f"{name} has a floor of {floor:g} bpw, but {pinned} ({best.type}) has {best.bpw:g}")
        menu = tuple(kept)
    return menu


@dataclasses.dataclass(frozen=True)
class Limit:
    """The chosen items' `values` (shape [items]) sum to at most `most`. For integers this is exact."""

    values: Values
    most: float

    def holds(self, chosen: Index) -> bool:
        """Whether one item per group keeps the limit."""
        return self.room(self.values[chosen]) >= 0

    def room(self, values: Values) -> float:
        """What `values`, one per group, leave of the limit: an exact int if the values are integers."""
        return int(self.most) - int(values.sum()) if self.integral else self.slackened - math.fsum(values)

    @property
    def integral(self) -> bool:
        """Whether sums are exact."""
        return self.values.dtype.kind == "i"

    @property
    def slackened(self) -> float:
        """`most`, and a little more for rounding."""
        return self.most + TOLERANCE * abs(self.most)


def total(values: Values, chosen: Index) -> float:
    """The sum over chosen items: an exact int of integers, the correctly rounded sum of floats."""
    return int(values[chosen].sum()) if values.dtype.kind == "i" else math.fsum(values[chosen])


def size_limits(problem: Problem, choices: Choices, max_bytes: int | None) -> list[Limit]:
    """The limit on the size of the file, if there is one, and then the limit on time."""
    size = [] if max_bytes is None else [Limit(choices.nbytes, max_bytes - problem.fixed_bytes)]
    return size + time_limits(problem, choices)


def time_limits(problem: Problem, choices: Choices) -> list[Limit]:
    """The limit on time, if there is one."""
    return [] if problem.max_seconds is None else [Limit(choices.seconds, problem.max_seconds)]

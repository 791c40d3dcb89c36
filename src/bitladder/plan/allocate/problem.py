"""What is to be allocated, and what comes out: values only."""

import dataclasses
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Option:
    """One type that a tensor may have.

    `nbytes` is what it takes in the file, padding to the file's alignment included. `cost` is the predicted KLD it
    adds, in nats; as it comes from measurements it may be slightly negative. `seconds` is the predicted time that
    reading it takes per generated token. `bpw` is the type's bits per weight; only tensors with a floor need it.
    """

    type: str
    nbytes: int
    cost: float
    seconds: float = 0.0
    bpw: float | None = None


@dataclasses.dataclass(frozen=True)
class Cap:
    """A limit on the bytes of some of the tensors, for example of those that a graphics card has to hold.

    `label` is what error messages call it.
    """

    label: str
    tensors: frozenset[str]
    max_bytes: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """Tensors with their menus, and what every allocation must respect.

    options: tensor → its menu. fixed_bytes: header, metadata and tensors that are not chosen.
    pins: tensor → the one type it may have. ties: tensors that must have equal types (sets that overlap are joined).
    floors: tensor → fewest bits per weight. max_types: how many different types may be used among these tensors.
    max_seconds: longest sum of `seconds`; what a token costs beside these tensors is for the caller to subtract.
    """

    options: Mapping[str, tuple[Option, ...]]
    fixed_bytes: int = 0
    pins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ties: tuple[frozenset[str], ...] = ()
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    max_types: int | None = None
    max_seconds: float | None = None
    caps: tuple[Cap, ...] = ()


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A type for every tensor, in the problem's order.

    bytes: of the file, fixed bytes included. cost: predicted KLD in nats. seconds: per token.
    objective: what was made small. bound: no allocation that respects the limits has an objective below it.
    price: nats that one more byte would save (the dual of the size limit in the linear relaxation); 0 where more bytes
    would save nothing.
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
        """How far the objective may be from the best possible, as a fraction of itself; 0 if proved optimal."""
        value = self.cost if self.objective == "cost" else self.bytes
        distance = max(0.0, value - self.bound)
        return distance / abs(value) if distance else 0.0

    @property
    def optimal(self) -> bool:
        """Whether this is proved to be the best, within the precision of floating-point sums."""
        return self.gap <= 1e-9

"""What is to be allocated, and what comes out: values only."""

import dataclasses
from collections.abc import Mapping
from typing import Literal


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

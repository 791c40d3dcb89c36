"""Prices and limits as a problem for the solver."""

from collections.abc import Mapping

from bitladder.plan.allocate import Problem, TypeOption
from bitladder.plan.constraints import Constraints, bpw_of, floored, pinned, seconds_of, tied
from bitladder.plan.prices.document import Sensitivity
from bitladder.plan.subject import Subject

Prices = Mapping[str, Mapping[str, float]]  # tensor → type → nats per token


def prices_of(sensitivity: Sensitivity) -> dict[str, dict[str, float]]:
    """Tensor → type → predicted KLD."""
    return {name: dict(tensor.kld) for name, tensor in sensitivity.tensors.items()}


def options_of(
    subject: Subject, prices: Prices, speeds: Mapping[str, float] | None = None
) -> dict[str, tuple[TypeOption, ...]]:
    """Every tensor's menu: its priced types, and its full precision, which costs nothing.

    `speeds` (type → bytes/s) give each option the seconds that reading it takes.
    """
    speeds = speeds or {}
    options: dict[str, tuple[TypeOption, ...]] = {}
    for name in subject.tensors:
        menu = {**prices.get(name, {}), subject.file.tensors[name].type.name: 0.0}
        made = []
        for kind, cost in menu.items():
            nbytes = subject.tensor_bytes(name, kind)
            made.append(TypeOption(kind, nbytes, cost, seconds_of(nbytes, kind, speeds), bpw_of(kind)))
        options[name] = tuple(made)
    return options


def limits_of(subject: Subject, constraints: Constraints) -> Problem:
    """A problem without options: fixed bytes and constraints.

    Raises UsageError for constraints that name what the model has not.
    """
    return Problem(
        {},
        fixed_bytes=subject.overhead(),
        pins=pinned(subject, constraints.pins),
        floors=floored(subject, constraints.floors),
        ties=tied(subject, constraints.ties),
        max_types=constraints.max_types,
        max_seconds=1 / constraints.min_speed if constraints.min_speed else None,
    )

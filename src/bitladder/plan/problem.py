"""Prices and constraints as a problem for the solver."""

from collections.abc import Iterable, Mapping

from bitladder.engine import type_by_name
from bitladder.errors import UsageError, did_you_mean
from bitladder.plan.allocate.problem import Problem, TypeOption
from bitladder.plan.options import Constraints
from bitladder.plan.subject import Subject
from bitladder.recipe import match_patterns, parse_tensor_type, target_type

Prices = Mapping[str, Mapping[str, float]]  # tensor → type → nats per token


def limits_of(subject: Subject, constraints: Constraints) -> Problem:
    """A problem without menus: fixed bytes and constraints.

    Raises UsageError for constraints that cannot be read, or that name what the model does not have.
    """
    return Problem(
        {},
        fixed_bytes=subject.overhead(),
        pins=pinned(subject, constraints.pins),
        floors=floored(subject, constraints.floors),
        ties=tied(subject, constraints.ties),
        max_types=constraints.max_types,
        max_seconds=None if constraints.min_speed is None else 1 / constraints.min_speed,
    )


def menus_of(
    subject: Subject, prices: Prices, speeds: Mapping[str, float] | None = None
) -> dict[str, tuple[TypeOption, ...]]:
    """Every tensor's menu: its priced types, and its full precision, which costs no KLD.

    Parameters:
        subject: the model.
        prices: tensor → type → nats per token.
        speeds: type → bytes per second, for the predicted time to read a tensor; None for no time.
    """
    speeds = speeds or {}
    menus: dict[str, tuple[TypeOption, ...]] = {}
    for name in subject.tensors:
        costs = {**prices.get(name, {}), subject.file.tensors[name].type.name: 0.0}
        options = []
        for kind, cost in costs.items():
            nbytes = subject.tensor_bytes(name, kind)
            seconds = nbytes / speeds[kind] if kind in speeds else 0.0
            options.append(TypeOption(kind, nbytes, cost, seconds, type_by_name(kind).bpw))
        menus[name] = tuple(options)
    return menus


def pinned(subject: Subject, pins: Iterable[str]) -> dict[str, str]:
    """Tensor → type, of PATTERN=TYPE as for --tensor-type.

    Raises UsageError for a pattern that matches no tensor, or a type that a width cannot hold.
    """
    types: dict[str, str] = {}
    pairs = tuple(parse_tensor_type(text) for text in pins)
    for match in match_patterns(subject.path, pairs, subject.tensors):
        for name in match.first:
            width = subject.file.tensors[name].width
            if width % match.type.block:
                raise UsageError(
                    f"--tensor-type {match.pattern}={match.type.name}: rows of {width} weights of {name} cannot be "
                    f"{match.type.name} (blocks of {match.type.block})"
                )
            types[name] = match.type.name
    return types


def floored(subject: Subject, floors: Iterable[str]) -> dict[str, float]:
    """Tensor → fewest bits per weight, of KIND=TYPE or KIND=BITS.

    Raises UsageError for a kind that the model does not have, or a floor that is neither a type nor a number.
    """
    floor: dict[str, float] = {}
    kinds = _kinds(subject)
    for text in floors:
        kind, equals, value = text.partition("=")
        if not (kind and equals and value):
            raise UsageError(f"--floor {text}: write KIND=TYPE or KIND=BITS, such as attn_v=q5_K or ffn_down=4.5")
        if kind not in kinds:
            close = did_you_mean(kind, sorted(kinds), "it has")
            raise UsageError(f"--floor {text}: the model has no such kind{close}")
        bpw = _floor_bpw(text, value)
        floor |= {name: bpw for name, (own, _) in subject.places.items() if own == kind}
    return floor


def tied(subject: Subject, ties: Iterable[str]) -> tuple[frozenset[str], ...]:
    """Sets of tensors that need equal types, of KIND,KIND. Raises UsageError for a kind that is not in the model."""
    kinds = _kinds(subject)
    sets: list[frozenset[str]] = []
    for text in ties:
        tie = [kind.strip() for kind in text.split(",")]
        unknown = [kind for kind in tie if kind not in kinds]
        if unknown:
            close = did_you_mean(unknown[0], sorted(kinds), "the model has")
            raise UsageError(f"--tie {text}: no kind {unknown[0]}{close}")
        for layer in {layer for _, layer in subject.places.values()}:
            members = frozenset(name for name, (kind, at) in subject.places.items() if kind in tie and at == layer)
            if len(members) > 1:
                sets.append(members)
    return tuple(sets)


def _kinds(subject: Subject) -> set[str]:
    return {kind for kind, _ in subject.places.values()}


def _floor_bpw(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return target_type(value, f"--floor {text}").bpw

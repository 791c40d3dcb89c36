"""What a recipe must respect besides its size, as the command line says it, and as the solver takes it."""

import dataclasses
from collections.abc import Iterable, Mapping

from bitladder.engine.types import type_by_name
from bitladder.errors import UsageError
from bitladder.plan.subject import Subject
from bitladder.quantize.quantize_options import target_type
from bitladder.quantize.type_patterns import match_patterns


@dataclasses.dataclass(frozen=True)
class Constraints:
    """`pins` (pattern, type) as for --tensor-type, the first that matches decides; `floors` kind → type or bpw.

    `ties` are lists of kinds whose tensors must have equal types within each layer; `max_types` the most different
    types; `min_speed` tokens/s of generation on this machine's CPU, as predicted.
    """

    pins: tuple[tuple[str, str], ...] = ()
    floors: tuple[tuple[str, str], ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    max_types: int | None = None
    min_speed: float | None = None


def parse_floor(text: str) -> tuple[str, str]:
    """KIND=TYPE or KIND=BPW as two words. Raises UsageError."""
    kind, equals, value = text.partition("=")
    if not (kind and equals and value):
        raise UsageError(f"--floor {text}: write KIND=TYPE or KIND=BITS, such as attn_v=q5_K or ffn_down=4.5")
    floor_bpw(text, value)
    return kind, value


def floor_bpw(where: str, value: str) -> float:
    """Bits per weight of a type's name or a number. Raises UsageError."""
    try:
        return float(value)
    except ValueError:
        return target_type(value, f"--floor {where}").bpw


def pinned(subject: Subject, pins: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Tensor → type. Raises UsageError for a pattern that finds nothing, or a type that a width cannot hold."""
    found: dict[str, str] = {}
    for match in match_patterns(subject.path, tuple(pins), subject.tensors):
        for name in match.first:
            width = subject.file.tensors[name].width
            if width % match.type.block:
                raise UsageError(
                    f"--tensor-type {match.pattern}={match.type.name}: rows of {width} weights of {name} cannot be "
                    f"{match.type.name} (blocks of {match.type.block})"
                )
            found[name] = match.type.name
    return found


def floored(subject: Subject, floors: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Tensor → fewest bits per weight. Raises UsageError for a kind that the model has not."""
    found: dict[str, float] = {}
    kinds = {kind for kind, _ in subject.places.values()}
    for kind, value in floors:
        if kind not in kinds:
            raise UsageError(f"--floor {kind}={value}: the model has no such kind; it has {', '.join(sorted(kinds))}")
        bpw = floor_bpw(f"{kind}={value}", value)
        found |= {name: bpw for name, (own, _) in subject.places.items() if own == kind}
    return found


def tied(subject: Subject, ties: Iterable[tuple[str, ...]]) -> tuple[frozenset[str], ...]:
    """Sets of tensors that need equal types. Raises UsageError for a kind that the model has not."""
    kinds = {kind for kind, _ in subject.places.values()}
    found: list[frozenset[str]] = []
    for tie in ties:
        unknown = [kind for kind in tie if kind not in kinds]
        if unknown:
            raise UsageError(f"--tie {','.join(tie)}: no kind {unknown[0]}; the model has {', '.join(sorted(kinds))}")
        layers = {layer for _, layer in subject.places.values()}
        for layer in layers:
            members = frozenset(name for name, (kind, at) in subject.places.items() if kind in tie and at == layer)
            if len(members) > 1:
                found.append(members)
    return tuple(found)


def bpw_of(kind: str) -> float:
    """Bits per weight of a type."""
    return type_by_name(kind).bpw


def seconds_of(bytes_: int, kind: str, speeds: Mapping[str, float]) -> float:
    """Predicted seconds that reading a tensor takes per token: `speeds` type → bytes/s."""
    return bytes_ / speeds[kind] if kind in speeds else 0.0

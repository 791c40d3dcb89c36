"""The types that tensors may get."""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from bitladder.engine.matvec import bytes_per_second
from bitladder.engine.presets import kernel_needs_importance, storable
from bitladder.engine.types import TensorType, all_types, type_by_name
from bitladder.errors import BitladderError, UsageError
from bitladder.gguf.reader import TensorInfo

# Bits per weight below and above a target's average that a tensor of its recipe may have.
BELOW, ABOVE = 1.5, 4.5
SLACK = 0.9  # of the speed of a K-quant as large


def menu_types(menu: str, fast: Iterable[TensorType] | None = None) -> tuple[TensorType, ...]:
    """The types of `--menu`, ascending in bits per weight.

    "k": K-quants; "iq": I-quants and K-quants; "all": every quantized type that the library writes; "fast": `fast`;
    or type names with commas. Where blocks of 32 only divide a row, the older types with such blocks stand in for
    K-quants ("k", "iq"). Raises UsageError for an unknown word.
    """
    every = [kind for kind in all_types().values() if kind.quantized and storable(kind)]
    words = menu.strip().lower()
    if words == "all":
        found = every
    elif words == "fast" and fast is not None:
        found = list(fast)
    elif words in ("k", "iq"):
        older = [kind for kind in every if kind.block == 32 and kind.name[0] == "q"]
        found = older + [kind for kind in every if kind.name.lower().endswith("_k")]
        found += [kind for kind in every if kind.name.startswith("iq")] if words == "iq" else []
    else:
        found = [_named(word.strip()) for word in menu.split(",") if word.strip()]
    if not found:
        raise UsageError(f"--menu {menu!r}: write k, iq, all, fast, or types with commas")
    return tuple(sorted(dict.fromkeys(found), key=lambda kind: (kind.bpw, kind.name)))


def _named(word: str) -> TensorType:
    try:
        kind = type_by_name(word)
    except BitladderError as error:
        raise UsageError(f"--menu {word}: no such type (or write k, iq, all, fast)") from error
    if not (storable(kind) and kind.quantized):
        raise UsageError(f"--menu {word}: weights cannot be quantized to it")
    return kind


@dataclasses.dataclass(frozen=True)
class Window:
    """Bits per weight that are worth a look; everything by default."""

    low: float = 0.0
    high: float = 99.0

    @classmethod
    def around(cls, bpw: float) -> "Window":
        """What tensors of a recipe of so many bits per weight may have."""
        return cls(bpw - BELOW, bpw + ABOVE)

    def holds(self, kind: TensorType) -> bool:
        """Whether a type is inside."""
        return self.low <= kind.bpw <= self.high


def tensor_menu(
    tensor: TensorInfo, types: Iterable[TensorType], window: Window, *, k_menu: bool, weighted: bool, needy: set[str]
) -> tuple[TensorType, ...]:
    """The types that one tensor may get, ascending in bits per weight; its own type is not among them.

    `k_menu` leaves out the older types where 256 divides the row; `weighted` says that there is importance for the
    tensor, and `needy` names the types that the library refuses without.
    """
    found = []
    for kind in types:
        if tensor.width % kind.block or not window.holds(kind) or kind.bpw >= tensor.type.bpw:
            continue
        if k_menu and tensor.width % 256 == 0 and kind.block == 32 and kind.name not in ("q8_0", "iq4_nl"):
            continue
        if not weighted and (kind.name in needy or kernel_needs_importance(kind)):
            continue
        found.append(kind)
    return tuple(found)


def pruned(menu: Iterable[TensorType], errors: Mapping[str, float], slack: float = 1.3) -> tuple[TensorType, ...]:
    """The menu without types that lose to a smaller one, or one as large, whose error is `slack` times smaller.

    The slack leaves what the weighted square cannot tell to the measurement.
    """
    kept = []
    menu = list(menu)
    for kind in menu:
        beaten = any(
            other.bpw <= kind.bpw and other != kind and errors[other.name] * slack < errors[kind.name] for other in menu
        )
        if not beaten:
            kept.append(kind)
    return tuple(kept)


def measured_speeds(threads: int | None = None) -> dict[str, float]:
    """Type → bytes/s that matrix–vector products on this machine's CPU go through; takes some seconds.

    Raises BitladderError if the library has no CPU kernels to time.
    """
    found = {}
    for kind in all_types().values():
        if storable(kind) and (speed := bytes_per_second(kind, threads)) is not None:
            found[kind.name] = speed
    return found


def within_speed(speeds: Mapping[str, float]) -> tuple[TensorType, ...]:
    """The quantized types that are at least SLACK as fast as a K-quant of their bits per weight.

    Between two K-quants the time per weight is interpolated; K-quants and q8_0 are always among them.
    """
    scale = [kind for kind in menu_types("k") if kind.name.endswith("_K") and kind.name in speeds]
    known = sorted([*scale, type_by_name("q8_0")], key=lambda kind: kind.bpw)
    bits, times = [kind.bpw for kind in known], [kind.bpw / speeds[kind.name] for kind in known]
    found = []
    for kind in menu_types("all"):
        if kind.name in speeds:
            usual = float(np.interp(kind.bpw, bits, times))
            if kind in known or kind.bpw / speeds[kind.name] <= usual / SLACK:
                found.append(kind)
    return tuple(found)

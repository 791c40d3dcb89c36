"""The types that tensors may get."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bitladder.engine import TensorType, all_types, bytes_per_second, kernel_needs_importance, storable, type_by_name
from bitladder.errors import BitladderError, UsageError, did_you_mean
from bitladder.gguf import TensorInfo

MENUS = ("k", "iq", "all", "fast")  # menus with a name
Menus = Mapping[str, Sequence[TensorType]]  # tensor → types, ascending in bits per weight


def menu_types(menu: str, fast: Iterable[TensorType] | None = None) -> tuple[TensorType, ...]:
    """The types of `--menu`, ascending in bits per weight.

    Where only blocks of 32 divide a row, the older types with such blocks stand in for K-quants ("k", "iq").

    Parameters:
        menu: "k" (K-quants), "iq" (I-quants and K-quants), "all" (every quantized type that the library writes),
            "fast", or names of types with commas.
        fast: the types of "fast".

    Raises:
        UsageError: a word is not known.

    Example:
        >>> [kind.name for kind in menu_types("q6_K,q4_K")]
        ['q4_K', 'q6_K']
    """
    every = [kind for kind in all_types().values() if kind.quantized and storable(kind)]
    words = menu.strip().lower()
    if words == "all":
        types = every
    elif words == "fast" and fast is not None:
        types = list(fast)
    elif words in ("k", "iq"):
        types = [kind for kind in every if kind.block == 32 and kind.name[0] == "q"]
        types += [kind for kind in every if kind.name.lower().endswith("_k")]
        types += [kind for kind in every if kind.name.startswith("iq")] if words == "iq" else []
    else:
        types = [_named(word.strip()) for word in menu.split(",") if word.strip()]
    if not types:
        raise UsageError(f"--menu {menu!r}: write k, iq, all, fast, or types with commas")
    return tuple(sorted(dict.fromkeys(types), key=in_order))


def in_order(kind: TensorType) -> tuple[float, str]:
    """The key that menus are sorted by."""
    return kind.bpw, kind.name


def _named(word: str) -> TensorType:
    try:
        kind = type_by_name(word)
    except BitladderError as error:
        names = (*MENUS, *(kind.name for kind in all_types().values() if storable(kind)))
        raise UsageError(f"--menu {word}: no such type{did_you_mean(word, names, 'write one of')}") from error
    if not (storable(kind) and kind.quantized):
        raise UsageError(f"--menu {word}: weights cannot be quantized to it")
    return kind


@dataclasses.dataclass(frozen=True)
class Window:
    """A range of bits per weight; everything by default."""

    low: float = 0.0
    high: float = 99.0

    def holds(self, kind: TensorType) -> bool:
        """Whether a type is inside."""
        return self.low <= kind.bpw <= self.high


def tensor_menu(
    tensor: TensorInfo, types: Iterable[TensorType], window: Window, *, k_menu: bool, weighted: bool, needy: set[str]
) -> tuple[TensorType, ...]:
    """The types that one tensor may get, in the order of `types`; its own type is not among them.

    Parameters:
        tensor: the full-precision tensor.
        types: the types of the menu.
        window: bits per weight that the types may have.
        k_menu: leave out the older types where 256 divides the row.
        weighted: there is importance for the tensor.
        needy: names of the types that the library refuses without importance.
    """
    menu = []
    for kind in types:
        if tensor.width % kind.block or not window.holds(kind) or kind.bpw >= tensor.type.bpw:
            continue
        if k_menu and tensor.width % 256 == 0 and kind.block == 32 and kind.name not in ("q8_0", "iq4_nl"):
            continue
        if not weighted and (kind.name in needy or kernel_needs_importance(kind)):
            continue
        menu.append(kind)
    return tuple(menu)


def measured_speeds(threads: int | None = None) -> dict[str, float]:
    """Times matrix–vector products of every type on this CPU for some seconds: type → bytes per second.

    Raises BitladderError if the library has no CPU kernels to time.
    """
    speeds = {}
    for kind in all_types().values():
        if storable(kind) and (speed := bytes_per_second(kind, threads)) is not None:
            speeds[kind.name] = speed
    return speeds


def within_speed(speeds: Mapping[str, float], share: float) -> tuple[TensorType, ...]:
    """The quantized types that are nearly as fast as a K-quant of their bits per weight.

    Between two K-quants the time per weight is interpolated. K-quants and q8_0 are always among the types.

    Parameters:
        speeds: type → bytes per second.
        share: least fraction of a K-quant's speed.
    """
    scale = [kind for kind in menu_types("k") if kind.name.endswith("_K") and kind.name in speeds]
    known = sorted([*scale, type_by_name("q8_0")], key=lambda kind: kind.bpw)
    bits, times = [kind.bpw for kind in known], [kind.bpw / speeds[kind.name] for kind in known]
    fast = []
    for kind in menu_types("all"):
        if kind.name in speeds:
            usual = float(np.interp(kind.bpw, bits, times))
            if kind in known or kind.bpw / speeds[kind.name] <= usual / share:
                fast.append(kind)
    return tuple(fast)

"""The types that tensors may get, and sensitivity.json: the price of each, and what the prices were made from."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pydantic

from bitladder.engine import TensorType, all_types, bytes_per_second, kernel_needs_importance, storable, type_by_name
from bitladder.errors import BitladderError, UsageError, did_you_mean
from bitladder.files import PathLike, write_json
from bitladder.gguf import TensorInfo
from bitladder.plan.options import MENUS

Menus = Mapping[str, Sequence[TensorType]]  # tensor → types, ascending in bits per weight


def menu_types(menu: str, speeds: Mapping[str, float] | None = None, share: float = 1.0) -> tuple[TensorType, ...]:
    """The types of `--menu`, ascending in bits per weight.

    Where only blocks of 32 divide a row, the older types with such blocks stand in for K-quants ("k", "iq").

    Parameters:
        menu: "k" (K-quants), "iq" (I-quants and K-quants), "all" (every quantized type that the library writes),
            "fast", or names of types with commas.
        speeds: type → bytes per second, which "fast" needs.
        share: least fraction of a K-quant's speed, of "fast".

    Raises:
        UsageError: a word is not known.

    Example:
        >>> [kind.name for kind in menu_types("q6_K,q4_K")]
        ['q4_K', 'q6_K']
    """
    every = [kind for kind in all_types().values() if kind.quantized and storable(kind)]
    if menu == "all":
        types = every
    elif menu == "fast" and speeds is not None:
        types = list(within_speed(speeds, share))
    elif menu in ("k", "iq"):
        types = [kind for kind in every if kind.block == 32 and kind.name[0] == "q"]
        types += [kind for kind in every if kind.name.lower().endswith("_k")]
        types += [kind for kind in every if kind.name.startswith("iq")] if menu == "iq" else []
    else:
        types = [_named(word.strip()) for word in menu.split(",") if word.strip()]
    if not types:
        raise UsageError(f"--menu {menu!r}: write k, iq, all, fast, or types with commas")
    return tuple(sorted(dict.fromkeys(types), key=menu_order))


def menu_order(kind: TensorType) -> tuple[float, str]:
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


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


class PricedFrom(_Part):
    """What the prices were made from, for a reader: contents by SHA-256, names without folders.

    Whether prices are valid is said by `TypePrices.key` alone.
    """

    model: str
    model_sha256: str
    imatrix: str | None = None
    imatrix_sha256: str | None = None
    text: str
    text_sha256: str
    n_ctx: int
    rounding: str
    versions: dict[str, str] = {}


class TensorPrices(_Part):
    """One tensor.

    Attributes:
        kind: such as attn_v.
        layer: number of its block; None outside of blocks.
        weights: number of weights.
        bytes: type → bytes in the file, without padding.
        error: type → Σ w (ŵ − w)² of the rendered tensor, w the mean squared input of the column.
        kld: type → predicted mean KLD that it adds, nats per token.
        probe: measured KLD of this tensor alone, or its share of a group's, nats per token.
    """

    kind: str
    layer: int | None
    weights: int
    bytes: dict[str, int]
    error: dict[str, float]
    kld: dict[str, float]
    probe: float | None = None


class GroupPrice(_Part):
    """All tensors of a kind as one type: the measured KLD with its standard error, and the probes' prediction."""

    kind: str
    type: str
    kld: float
    error: float
    predicted: float


class PriceCheck(_Part):
    """Measured against predicted KLD of single swaps that no price was fitted to.

    Attributes:
        pairs: number of swaps.
        rank_correlation: Spearman's ρ.
        median_ratio: median of measured / predicted.
    """

    pairs: int
    rank_correlation: float
    median_ratio: float


class TypePrices(_Part):
    """The whole file.

    Attributes:
        method: forward (measured swaps) or fisher (gradients).
        key: hash of everything that decides the prices.
        made: what they were made from.
        rungs: presets whose types are priced; empty if they are those of no preset.
        probe_types: types that single tensors were measured at.
        tokens: tokens that the measured recipes were decoded on.
        exponents: kind → p of KLD ∝ error^p.
        groups: whole kinds that were measured.
        check: held-out swaps; None for fewer than three.
        tensors: tensor → its prices.
    """

    schema_version: Literal[1] = 1
    method: Literal["forward", "fisher"] = "forward"
    key: str
    made: PricedFrom
    rungs: list[str] = []
    probe_types: list[str] = []
    tokens: int = 0
    exponents: dict[str, float] = {}
    groups: list[GroupPrice] = []
    check: PriceCheck | None = None
    tensors: dict[str, TensorPrices]

    def save(self, path: PathLike) -> None:
        """Writes the file in one step."""
        write_json(path, self.model_dump(mode="json"))

    def predicted(self) -> dict[str, dict[str, float]]:
        """Tensor → type → predicted KLD, nats per token."""
        return {name: dict(tensor.kld) for name, tensor in self.tensors.items()}

    def covers(self, names: dict[str, list[str]]) -> bool:
        """Whether every one of these types (tensor → names of types) has a price."""
        return all(
            name in self.tensors and set(kinds) <= self.tensors[name].kld.keys() for name, kinds in names.items()
        )


def load_prices(path: PathLike) -> TypePrices:
    """Reads a sensitivity.json. Raises BitladderError that names the file and what is wrong with it."""
    try:
        return TypePrices.model_validate_json(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except pydantic.ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise BitladderError(f"{path} is not a sensitivity.json of this bitladder ({where}: {first['msg']})") from error

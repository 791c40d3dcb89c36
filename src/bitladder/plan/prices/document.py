"""sensitivity.json: the price of each type of each tensor, and what the prices were made from."""

import pathlib
from typing import Any, Literal

import pydantic

from bitladder.errors import BitladderError
from bitladder.files import PathLike, write_json


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

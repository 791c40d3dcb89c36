"""sensitivity.json: what each type of each tensor costs, and what that was found from."""

import pathlib
from typing import Any, Literal

import pydantic

from bitladder.errors import BitladderError
from bitladder.files import PathLike, write_json


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


class Made(_Part):
    """What the prices depend on: contents by SHA-256, names without folders."""

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

    `bytes` in the file (padding left out), `error` Σ w (ŵ − w)² of the rendered tensor and `kld` the predicted mean KLD
    it adds, nats per token: all by type. `probe` is the KLD that was measured with this tensor (or its group) alone.
    """

    kind: str
    layer: int | None
    weights: int
    bytes: dict[str, int]
    error: dict[str, float]
    kld: dict[str, float]
    probe: float | None = None


class GroupPrice(_Part):
    """All tensors of a kind as one type: the KLD measured (±), and what the single tensors' probes predict."""

    kind: str
    type: str
    kld: float
    error: float
    predicted: float


class Check(_Part):
    """Predicted against measured KLD of single swaps that were not used: `pairs` of them, Spearman's ρ."""

    pairs: int
    rank_correlation: float
    median_ratio: float


class Sensitivity(_Part):
    """The whole file. `exponents`: KLD ∝ error^p, by kind. `tokens` were decoded to find all this."""

    schema_version: Literal[1] = 1
    method: Literal["forward", "fisher", "error"] = "forward"
    made: Made
    probe_types: list[str] = []
    tokens: int = 0
    seconds: float = 0.0
    exponents: dict[str, float] = {}
    groups: list[GroupPrice] = []
    check: Check | None = None
    tensors: dict[str, TensorPrices]

    def save(self, path: PathLike) -> None:
        """Write it in one step."""
        write_json(path, self.model_dump(mode="json"))

    def types(self) -> list[str]:
        """Every type that has a price anywhere."""
        return sorted({kind for tensor in self.tensors.values() for kind in tensor.kld})


def load_sensitivity(path: PathLike) -> Sensitivity:
    """Read a sensitivity.json. Raises BitladderError that names the file and what is wrong with it."""
    try:
        return Sensitivity.model_validate_json(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except pydantic.ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise BitladderError(f"{path} is no sensitivity.json of this bitladder ({where}: {first['msg']})") from error

"""What a file of moments holds, checked when it is opened: names, types, shapes, counts, and what belongs together."""

import dataclasses
import pathlib
import re
from collections.abc import Set
from typing import Any, NoReturn

import numpy as np

from bitladder.calibrate.moments.triangles import triangle, width_of
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, TensorInfo, describe_kind
from bitladder.units import listed, number_of

INPUTS, INPUT_DIAGONALS, COUNTS = ".moments", ".diagonal", ".counts"
OUTPUTS, OUTPUT_FACTORS, OUTPUT_DIAGONALS = ".outputs", ".outputs.factors", ".outputs.diagonal"
_TYPES = {INPUTS: "f16", INPUT_DIAGONALS: "f32", COUNTS: "f32"}
_TYPES |= {OUTPUTS: "f16", OUTPUT_FACTORS: "f16", OUTPUT_DIAGONALS: "f32"}
_PARTS = re.compile("(.+?)(" + "|".join(re.escape(part) for part in sorted(_TYPES, key=len, reverse=True)) + ")")
WEIGHTINGS = ("tokens", "positions", "gradients")


@dataclasses.dataclass(frozen=True)
class MomentShape:
    """How large an entry is.

    Parameters:
        matrices: experts, or 1.
        n_in: numbers of an input.
        n_out: numbers of an output; 0 if moments of outputs are not kept.
        blocks: equal diagonal blocks of the moments of outputs; what is outside of them is not kept.
        rank: columns of a factor that is kept in place of the moments of outputs; 0 if they are kept themselves.
    """

    matrices: int
    n_in: int
    n_out: int = 0
    blocks: int = 1
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where moments come from.

    Parameters:
        datasets: names of the texts.
        chunk_count: chunks that were read.
        chunk_size: tokens of a chunk.
        weighting: what a token counts by: "tokens" (all alike), "positions" or "gradients".
        model_sha256: hash of the file whose inputs these are.
    """

    datasets: list[str]
    chunk_count: int
    chunk_size: int
    weighting: str = "tokens"
    model_sha256: str = ""


@dataclasses.dataclass(frozen=True)
class Contents:
    """A file of moments whose header is consistent.

    Parameters:
        provenance: where the moments come from.
        shared: the weight whose entry it has, by the name of a weight without its own.
        shapes: sizes of the entries, by weight. Of one that shares an entry, only moments of outputs are its own.
    """

    provenance: Provenance
    shared: dict[str, str]
    shapes: dict[str, MomentShape]


def read_contents(file: GgufFile, path: pathlib.Path) -> Contents:
    """Reads the header of a file of moments. Raises BitladderError that names what is wrong."""
    if file.get("general.type") != "moments":
        raise BitladderError(
            f"{path} holds no second moments, but is {describe_kind(file)}; make them with bitladder calibrate"
        )
    return _Reading(file, path).contents()


class _Reading:
    def __init__(self, file: GgufFile, path: pathlib.Path) -> None:
        self._file, self._path = file, path

    def fail(self, what: str) -> NoReturn:
        raise BitladderError(
            f"{self._path}: {what}: the moments are damaged, or of another version; collect them again"
        )

    def contents(self) -> Contents:
        parts: dict[str, dict[str, TensorInfo]] = {}
        for name, tensor in self._file.tensors.items():
            match = _PARTS.fullmatch(name)
            if match is None:
                self.fail(f"{name} is no part of an entry")
            if tensor.type.name != _TYPES[match[2]] or len(tensor.shape) > 2:
                self.fail(f"{name} is not {_TYPES[match[2]].upper()} of two dimensions")
            parts.setdefault(match[1], {})[match[2]] = tensor
        own = {name: self._inputs(name, tensors) for name, tensors in parts.items() if INPUTS in tensors}
        if not own:
            self.fail("there are no entries")
        shared = self._shared(own.keys())
        strange = sorted(parts.keys() - own.keys() - shared.keys())
        if strange:
            self.fail(f"{strange[0]} has no inputs")
        shapes = {}
        for name in [*own, *shared]:
            outputs = self._outputs(name, parts.get(name, {}))
            shapes[name] = dataclasses.replace(own[shared.get(name, name)], **outputs)
        return Contents(self._provenance(), shared, shapes)

    def _inputs(self, name: str, parts: dict[str, TensorInfo]) -> MomentShape:
        if INPUT_DIAGONALS not in parts or COUNTS not in parts:
            self.fail(f"{name} has no diagonal, or no counts")
        n_in, matrices = self._pair(name, parts[INPUTS], parts[INPUT_DIAGONALS])
        if (parts[COUNTS].width, parts[COUNTS].rows) != (1, matrices):
            self.fail(
                f"{name} has {number_of(matrices, 'matrix', 'matrices')}, but "
                f"{number_of(parts[COUNTS].elements, 'count')}"
            )
        counts = self._file.read(parts[COUNTS]).view(np.float32)
        if not (np.isfinite(counts).all() and (counts >= 0).all() and (counts < 2**53).all()):
            self.fail(f"{name} has counts that are no numbers of tokens")
        return MomentShape(matrices, n_in)

    def _outputs(self, name: str, parts: dict[str, TensorInfo]) -> dict[str, int]:
        kept = [part for part in (OUTPUTS, OUTPUT_FACTORS, OUTPUT_DIAGONALS) if part in parts]
        if not kept:
            return {}
        if len(kept) != 2 or kept[1] != OUTPUT_DIAGONALS:
            self.fail(f"{name} has {listed(kept)}, which do not belong together")
        if kept[0] == OUTPUTS:
            width, blocks = self._pair(name, parts[OUTPUTS], parts[OUTPUT_DIAGONALS])
            return {"n_out": width * blocks, "blocks": blocks}
        factors, diagonal = parts[OUTPUT_FACTORS], parts[OUTPUT_DIAGONALS]
        if (diagonal.width, diagonal.rows) != (factors.rows, 1):
            self.fail(f"{name} has factors of {number_of(factors.rows, 'output')}, and a diagonal of {diagonal.width}")
        return {"n_out": factors.rows, "rank": factors.width}

    def _pair(self, name: str, values: TensorInfo, diagonals: TensorInfo) -> tuple[int, int]:
        """(width, number) of packed matrices."""
        width = width_of(values.width)
        if triangle(width) != values.width or (diagonals.width, diagonals.rows) != (width, values.rows):
            self.fail(
                f"{name} has {number_of(values.rows, 'triangle')} of {values.width}, and diagonals of {diagonals.width}"
            )
        return width, values.rows

    def _provenance(self) -> Provenance:
        head = Provenance(
            self._strings("moments.datasets"),
            self._get("moments.chunk_count", int),
            self._get("moments.chunk_size", int),
            self._get("moments.weighting", str),
            self._get("moments.model_sha256", str),
        )
        if head.weighting not in WEIGHTINGS:
            self.fail(f"moments.weighting is {head.weighting!r}")
        return head

    def _shared(self, own: Set[str]) -> dict[str, str]:
        pairs = self._strings("moments.shared")
        shared = dict(zip(pairs[::2], pairs[1::2], strict=False))
        if len(pairs) != 2 * len(shared) or not set(shared.values()) <= own or shared.keys() & own:
            self.fail("moments.shared are no pairs of a weight and an entry")
        return shared

    def _get(self, key: str, kind: type) -> Any:
        value: Any = self._file.get(key)
        if type(value) is not kind or (type(value) is int and value < 0):
            self.fail(f"{key} is missing, or of a wrong type")
        return value

    def _strings(self, key: str) -> list[str]:
        value = self._get(key, list)
        if not all(isinstance(part, str) for part in value):
            self.fail(f"{key} is no list of names")
        return list(value)

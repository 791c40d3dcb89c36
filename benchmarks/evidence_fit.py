"""Is rounding fitted to the model or to the calibration text? Its objective on the moments of texts it did not see.

The preset's types are rounded with other `damping` and `shrinkage`. tr(O ΔW H ΔWᵀ) of the rounded blocks, as a share of
that of the library's, is summed by kind and width: with the moments that were rounded for, and with those of the texts
that rows are measured on. A second share far above the first says that the text was fitted.
"""

import collections
import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from evidence_methods import WHOLE, Method, Quant

from bitladder.calibrate import MomentsFile, unpack_triangle
from bitladder.engine import RowKernels
from bitladder.gguf import GgufFile, kind_of, open_model
from bitladder.quantize import QuantizeOptions, quantize
from bitladder.refine import ModelFiles, RefineOptions, quantize_rounded
from bitladder.rounding import RoundingOptions

if TYPE_CHECKING:
    from evidence import Evidence

Floats = npt.NDArray[np.float32]
CHUNKS, HELD_OUT_CHUNKS = 8, 6  # of each text


def fits() -> list[Method]:
    """The rounding of `normal` with its own damping and shrinkage, and with others."""
    normal = RefineOptions().at_effort(WHOLE).rounding
    pairs = [(0.1, 0.1), (0.01, 0.1), (0.3, 0.1), (1.0, 0.1), (0.1, 0.0), (0.1, 0.3)]
    methods = []
    for damping, shrinkage in pairs:
        rounding = normal.replace(damping=damping, shrinkage=shrinkage)
        how = (
            f"bitladder quantize --rounding best --effort normal --guard none, damping {damping:g}, shrinkage "
            f"{shrinkage:g}, moments by gradients of {CHUNKS} chunks of each text"
        )
        name = f"damping {damping:g}, shrinkage {shrinkage:g}"
        methods.append(Method(name, "fit", how, rounding, lambda e, rungs, r=rounding: _fitted(e, rungs, r)))
    return methods


def _fitted(evidence: "Evidence", rungs: tuple[str, ...], rounding: RoundingOptions) -> Iterator[Quant]:
    own, other = (evidence.moments("gradients", count, held_out=held_out) for count, held_out in
                  ((CHUNKS, False), (HELD_OUT_CHUNKS, True)))  # fmt: skip
    files = ModelFiles(evidence.model, evidence.imatrix, (own,))
    refine = RefineOptions().at_effort(WHOLE).replace(rounding=rounding)
    for rung in rungs:
        out, stock = evidence.work / "quant.gguf", evidence.work / "stock.gguf"
        began = time.process_time()
        quantize_rounded(files, out, QuantizeOptions(rung), refine, None, evidence.decoding, work=evidence.work / "fit")
        seconds = time.process_time() - began
        quantize(evidence.model, stock, rung, imatrix=evidence.imatrix, threads=evidence.settings.threads)
        shares = {}
        for name, moments in (("own", own), ("held_out", other)):
            before, after = (objective(evidence.model, quant, moments) for quant in (stock, out))
            shares[name] = {kind: after[kind] / before[kind] for kind in before if before[kind]}
        stock.unlink()
        yield Quant(rung, out, {"quantize": seconds}, {"objective": shares})


def objective(model: pathlib.Path, quant: pathlib.Path, moments: pathlib.Path) -> dict[str, float]:
    """Σ tr(O ΔW H ΔWᵀ) of a quant by kind and width, each tensor's as a share of the same of its whole weight.

    Parameters:
        model: the full-precision model.
        quant: the quant, of which tensors of the model's own type are left out.
        moments: second moments, H and where they are known O.
    """
    sums: dict[str, float] = collections.defaultdict(float)
    with open_model(model) as full, open_model(quant) as file, MomentsFile(moments) as known:
        for name in known.names():
            if file.tensors[name].type == full.tensors[name].type or known.shape(name).matrices != 1:
                continue
            weights = _values(full, name)
            h, kept = unpack_triangle(known.packed(name)), known.outputs(name)
            o = None if kept is None else kept.matrix()
            whole = _loss(weights, h, o)
            sums[f"{kind_of(name)} {full.tensors[name].width}"] += _loss(weights - _values(file, name), h, o) / whole
    return dict(sums)


def _loss(delta: Floats, h: Floats, o: Floats | None) -> float:
    spread = delta @ h
    return float(np.vdot(delta if o is None else o @ delta, spread))


def _values(file: GgufFile, name: str) -> Floats:
    tensor = file.tensors[name]
    with contextlib.closing(RowKernels(1)) as kernels:
        return kernels.dequantize(file.read(tensor), tensor.type, tensor.width)

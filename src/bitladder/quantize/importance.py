"""From an imatrix to the weights of each tensor's columns, with every doubt settled before work starts."""

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.imatrix import Imatrix
from bitladder.engine.presets import PresetTypes
from bitladder.engine.types import TensorType
from bitladder.errors import BitladderError
from bitladder.model.reader import GgufFile, TensorInfo
from bitladder.progress import Progress

Floats = npt.NDArray[np.float32]
# llama-quantize refuses to make these without importance, except for the embedding and the head.
NEED_IMPORTANCE = {"iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_m", "iq1_s"}
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
UNWEIGHTED = (*EMBEDDINGS, "output.weight")


def importance_of(
    file: GgufFile, chosen: PresetTypes, imatrix: Imatrix | None, preset: str, progress: Progress
) -> dict[str, Floats]:
    """Importance of the columns of each tensor that will be quantized.

    Returns float32 [matrices, width] by tensor name; a tensor without data is left out and quantized unweighted, with
    a warning. Raises BitladderError if the imatrix belongs to another model, or lacks what a type cannot do without.
    """
    if imatrix is None:
        if chosen.needs_imatrix:
            raise BitladderError(f"{preset} cannot be made without an importance matrix; pass --imatrix")
        return {}
    if not imatrix.entries.keys() & file.tensors.keys():
        some = next(iter(imatrix.entries))
        raise BitladderError(f"the imatrix belongs to another model: {file.path} has no tensor {some}")
    found: dict[str, Floats] = {}
    without = []
    for name, kind in chosen.types.items():
        if kind == file.tensors[name].type:
            continue
        weights = _columns(file.tensors[name], kind, imatrix)
        if weights is not None:
            found[name] = weights
        elif name not in UNWEIGHTED:
            without.append(name)
    if without:
        progress.warn(f"the imatrix has no entry for {len(without)} tensors ({without[0]}, …): quantized unweighted")
    for name, experts in imatrix.gaps().items():
        if name in found:
            progress.warn(f"{name}: no data for experts {experts[:8]}{'…' if len(experts) > 8 else ''}")
    return found


def _columns(tensor: TensorInfo, kind: TensorType, imatrix: Imatrix) -> Floats | None:
    entry = imatrix.entries.get(tensor.name)
    if entry is None:
        if kind.name in NEED_IMPORTANCE and tensor.name not in UNWEIGHTED:
            raise BitladderError(f"the imatrix has no entry for {tensor.name}, which would become {kind.name}")
        return None
    matrices = tensor.rows // tensor.rows_per_matrix
    if entry.sums.size == tensor.width * matrices:
        return entry.means().reshape(matrices, tensor.width)
    if tensor.name in EMBEDDINGS:
        return None
    raise BitladderError(
        f"the imatrix belongs to another model: {tensor.name} has {entry.sums.size} entries there, "
        f"but {tensor.width} columns × {matrices} here"
    )

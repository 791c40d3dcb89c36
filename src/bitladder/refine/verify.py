"""Is a quant what its metadata say: its blocks are derived again from the full-precision model.

A file that others made is verified too, as far as the library's own kernels and the imatrix made it.
"""

import contextlib
import dataclasses
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from bitladder.calibrate import MomentsFile, read_imatrix
from bitladder.engine import Device
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, TensorInfo, open_model, refuse_other_model
from bitladder.progress import SILENT, Progress
from bitladder.quantize import TUNE_KEY
from bitladder.refine.round.output_rounding import OutputRounding, joined_sha256
from bitladder.refine.round.quantize_rounded import DEVICE_KEY, METHOD_KEY, MOMENTS_KEY
from bitladder.rounding import Method, RoundingOptions, can_round, same_integers
from bitladder.trial import Renderer
from bitladder.units import listed

Origin = Literal["copied", "stock", "stock without importance", "rounded", "rounded on a device", "tuned", "differs"]
# Between output errors of two ways to round the same tensor on a device.
ALIKE = 0.02


@dataclasses.dataclass(frozen=True)
class VerifiedQuant:
    """How each tensor of a quant came about, by name.

    "copied": from the source. "stock": by the library's kernel with the imatrix, or without. "rounded": for the output.
    "rounded on a device": in a file that says so; the output error is the same within 2 %, for a device may add in
    another order if there are other tensors beside one. "tuned": in a file that says so; its integers come from one of
    these ways, and only F16 numbers of blocks differ.
    "differs": none of these gives its bytes.
    """

    origins: dict[str, Origin]

    @property
    def differing(self) -> list[str]:
        """The tensors that could not be derived."""
        return [name for name, origin in self.origins.items() if origin == "differs"]


def verify(
    quant: pathlib.Path,
    source: pathlib.Path,
    *,
    imatrix: pathlib.Path | None = None,
    moments: Sequence[pathlib.Path] = (),
    rounding: RoundingOptions | None = None,
    sample: int | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> VerifiedQuant:
    """Derives tensors of a quant again and compares bytes.

    Rounding repeats to the bit on one kind of processor; another may add in another order. What a GPU has rounded is
    made again there, a tensor at a time, and its output error compared.

    Parameters:
        quant: path of the quant.
        source: path of the full-precision GGUF that it was made from.
        imatrix: path of the importance matrix that it was made with.
        moments: paths of the second moments that it was made with.
        rounding: how it was rounded; None is the method that the file names, with the usual constants.
        sample: how many tensors, drawn at random, other ones each time; None takes all.
        threads: threads of the CPU; None takes all.
        progress: where work is shown.

    Raises:
        BitladderError: the two files are of different models, or the quant was made with other moments.
    """
    with contextlib.ExitStack() as opened:
        file, full = opened.enter_context(open_model(quant)), opened.enter_context(open_model(source))
        refuse_other_model(file, full)
        importance = {}
        if imatrix is not None:
            matrix = read_imatrix(imatrix)
            columns = {name: matrix.columns(name, tensor) for name, tensor in full.tensors.items()}
            importance = {name: values for name, values in columns.items() if values is not None}
        # The cheapest way comes first.
        ways: dict[Origin, Renderer] = {}
        if importance:
            ways["stock"] = opened.enter_context(Renderer(full, importance, threads=threads))
        ways["stock without importance"] = opened.enter_context(Renderer(full, {}, threads=threads))
        if moments:
            method = _rounding(file, [opened.enter_context(MomentsFile(path)) for path in moments], rounding)
            ways["rounded"] = opened.enter_context(Renderer(full, importance, rounding=method, threads=threads))
        origins: dict[str, Origin] = {}
        tensors = list(file.tensors.values())
        if sample is not None and sample < len(tensors):
            drawn = set(random.sample(range(len(tensors)), sample))
            tensors = [tensor for place, tensor in enumerate(tensors) if place in drawn]
        bar = opened.enter_context(progress.task(f"verify {quant.name}", sum(tensor.nbytes for tensor in tensors)))
        for tensor in tensors:
            origins[tensor.name] = _origin(file, tensor, full, ways)
            bar.note(tensor.name)
            bar.advance(tensor.nbytes)
    return VerifiedQuant(origins)


def _rounding(quant: GgufFile, moments: Sequence[MomentsFile], options: RoundingOptions | None) -> OutputRounding:
    """The rounding method that the metadata of a quant name, with options of it if they are known."""
    method, digest = quant.get(METHOD_KEY), quant.get(MOMENTS_KEY)
    if method not in get_args(Method):
        raise BitladderError(
            f"{quant.path} was not rounded by bitladder ({METHOD_KEY} is {method!r}); leave out --moments"
        )
    if digest != joined_sha256(moments):
        names = listed([str(file.path) for file in moments])
        raise BitladderError(f"{quant.path} was made with other second moments than {names} ({MOMENTS_KEY})")
    device = quant.get(DEVICE_KEY, "cpu")
    if device not in get_args(Device):
        raise BitladderError(f"{quant.path}: {DEVICE_KEY} is {device!r}, which is no device that bitladder knows")
    return OutputRounding(moments, options or RoundingOptions(method=method), device)


def _origin(quant: GgufFile, tensor: TensorInfo, full: GgufFile, ways: Mapping[Origin, Renderer]) -> Origin:
    data, before = quant.read(tensor), full.tensors[tensor.name]
    if tensor.type == before.type:
        return "copied" if np.array_equal(data, full.read(before)) else "differs"
    tuned = bool(quant.get(TUNE_KEY)) and can_round(tensor.type.name)
    for origin, renderer in ways.items():
        try:
            derived = renderer.blocks(tensor.name, tensor.type)
        except BitladderError:
            continue  # such as a type that needs importance
        if np.array_equal(data, derived):
            return origin
        if origin == "rounded" and quant.get(DEVICE_KEY) and _as_good(renderer, tensor, data):
            return "rounded on a device"
        if tuned and same_integers(tensor.type.name, data, derived, tensor.width):
            return "tuned"
    return "differs"


def _as_good(renderer: Renderer, tensor: TensorInfo, data: npt.NDArray[np.uint8]) -> bool:
    """Whether blocks have the output error of those that the renderer has just derived, within `ALIKE`."""
    method, name = renderer.rounding, tensor.name
    assert isinstance(method, OutputRounding)
    derived = method.losses.get((name, tensor.type.name))
    if derived is None:  # the library's blocks, which a device does not change
        return False
    shape = (-1, tensor.rows_per_matrix, tensor.width)
    values = renderer.kernels.dequantize(data, tensor.type, tensor.width).reshape(shape)
    loss = method.loss(name, renderer.weights(name).reshape(shape), values)
    return abs(loss - derived[1]) <= ALIKE * derived[1]

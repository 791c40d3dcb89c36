"""A loaded model whose weights are swapped: the KLD of a recipe, or of the model without a block, needs no file.

The loaded model has full precision. A swapped weight gets the values that its blocks stand for, rounded to the type of
the file (F16, mostly). On the CPU the inputs of swapped weights are rounded as the kernels of their types round them
(`engine.activations`): with K-quants of 5 and 6 bits this may be half of the loss. On a GPU they are not rounded.

A block adds the products of its last matrices to the residual stream. With zeros in these the block passes its input
on, as if it were pruned.
"""

import collections
import contextlib
import dataclasses
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine import (
    LANES,
    Decoding,
    KernelInputs,
    Lane,
    Lanes,
    Model,
    TensorType,
    Weights,
    threads_available,
    type_by_name,
    versions,
)
from bitladder.errors import BitladderError
from bitladder.evaluate import (
    Figure,
    HiddenBase,
    MeasureOptions,
    compare_chunk,
    compare_with_base,
    identify,
    load_or_compute_base,
    make_base,
    mean,
    open_base,
)
from bitladder.files import Closing
from bitladder.gguf import GgufFile, block_of, name_in_block, prediction_tensors
from bitladder.keys import Algorithm, key_of
from bitladder.options import option
from bitladder.progress import SILENT, Progress
from bitladder.text import Text
from bitladder.trial.render import RENDERING, Renderer

Doubles = npt.NDArray[np.float64]

SWAPPED_KLD = Algorithm(
    "kld of swapped weights",
    (
        "weights are replaced in the loaded model",
        "inputs of swapped weights are rounded as the kernels of their types round them",
    ),
    uses=(RENDERING,),
)
# The last matrices of the two halves of a block, in every transformer of llama.cpp's with plain attention.
ATTENTION, FEED_FORWARD = ("attn_output",), ("ffn_down", "ffn_down_exps", "ffn_down_shexp")


class Replacement(Protocol):
    """What stands in the place of a weight. Two that are equal put the same values there."""

    @property
    def kernel(self) -> TensorType | None:
        """The type whose kernel rounds the inputs; None leaves them as they are."""

    def put_into(self, weights: Weights, name: str) -> None:
        """Replace the weight in the loaded model."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A tensor as `renderer` renders it in a type."""

    renderer: Renderer
    kernel: TensorType

    def put_into(self, weights: Weights, name: str) -> None:
        """See `Replacement`."""
        weights.set(name, self.renderer.values(name, self.kernel))


@dataclasses.dataclass(frozen=True)
class Zeros:
    """Nothing but zeros: the weight is left out."""

    kernel: None = None

    def put_into(self, weights: Weights, name: str) -> None:
        """See `Replacement`."""
        weights.set_bytes(name, np.zeros_like(weights.get(name)))


class SwappedModel(Closing):
    """A full-precision model, loaded once, in which weights are replaced and put back.

    Parameters:
        base: the predictions that it is compared with.
        renderer: of the file that is loaded, which is the base's model or one that computes the same.
        decoding: how to decode; the context length must be the base's.
        most: as of `Lanes`.
        first_slot: alike.

    Raises:
        BitladderError: the model cannot be loaded, or its weights cannot be replaced.
    """

    def __init__(
        self, base: HiddenBase, renderer: Renderer, decoding: Decoding, *, most: int = LANES, first_slot: int = 0
    ) -> None:
        self.base, self.renderer, self._decoding = base, renderer, decoding
        self._replaced: dict[str, Replacement] = {}
        with contextlib.ExitStack() as opened:
            model = opened.enter_context(
                Model(renderer.file.path, mmap=False, repack=False, gpu_layers=decoding.gpu_layers)
            )
            self._weights = Weights(model)
            rounds = _rounds_inputs(decoding)
            callback = KernelInputs if rounds else None
            self._lanes = opened.enter_context(
                Lanes(model, decoding, callback=callback, most=most, first_slot=first_slot)
            )
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Free the model."""
        self._opened.close()

    def kld(self, types: Mapping[str, str], chunks: int | None = None) -> Doubles:
        """The divergence of a recipe from the base.

        Parameters:
            types: type of each tensor that differs from full precision, by name.
            chunks: as for `kld_with`.

        Returns:
            KLD of each token, nats, float64 [chunks, scored].
        """
        return self.kld_with(self._rendered(types), chunks)

    def copy(self) -> "SwappedModel":
        """A second copy of the model, for work beside the first lane of this one with the other half of the threads."""
        threads = self._decoding.threads or threads_available()
        half = self._decoding.replace(threads=threads // LANES)
        return SwappedModel(self.base, self.renderer, half, most=1, first_slot=threads - threads // LANES)

    @property
    def lane(self) -> Lane:
        """The first lane, with its own threads only."""
        return self._lanes.first

    @SWAPPED_KLD.entry
    def kld_beside(self, types: Mapping[str, str]) -> Doubles:
        """The divergence of a recipe on the base's first chunk, by the first lane: others may be at work meanwhile.

        Returns:
            As `kld`.
        """
        self._replace(self._rendered(types))
        return compare_chunk(self.lane, self.base, 0).kld.reshape(1, -1)

    def _rendered(self, types: Mapping[str, str]) -> dict[str, Replacement]:
        tensors = self.renderer.file.tensors
        return {
            name: Rendered(self.renderer, type_by_name(kind))
            for name, kind in types.items()
            if kind != tensors[name].type.name
        }

    @SWAPPED_KLD.entry
    def kld_with(
        self, replacements: Mapping[str, Replacement], chunks: int | None = None, *, first: int = 0
    ) -> Doubles:
        """The divergence of the model with these weights from the base; all other weights have full precision.

        Parameters:
            replacements: what stands in the place of each weight, by name.
            chunks: how many of the base's chunks to decode; None decodes all.
            first: number of the first of them.

        Returns:
            KLD of each token, nats, float64 [chunks, scored].

        Raises:
            BitladderError: decoding fails, or logits are not finite.
        """
        left = len(self.base.chunks) - first
        count = left if chunks is None else min(chunks, left)
        if count < 1:
            raise BitladderError("a recipe is measured on at least one chunk")
        self._replace(replacements)
        return compare_with_base(self._lanes, self.base, count, first=first).kld.reshape(count, -1)

    def _replace(self, replacements: Mapping[str, Replacement]) -> None:
        file = self.renderer.file
        for name in sorted(self._replaced.keys() | replacements.keys()):
            replacement = replacements.get(name)
            if replacement == self._replaced.get(name):
                continue
            if replacement is None:
                self._weights.set_bytes(name, file.read(file.tensors[name]))
                del self._replaced[name]
            else:
                replacement.put_into(self._weights, name)
                self._replaced[name] = replacement
        kernels = {name: replacement.kernel for name, replacement in self._replaced.items()}
        for inputs in self._lanes.watching:
            inputs.pretend({name: kernel for name, kernel in kernels.items() if kernel is not None})


def kept_base(
    folder: pathlib.Path, model: pathlib.Path, text: Text, settings: MeasureOptions, progress: Progress = SILENT
) -> HiddenBase:
    """The full-precision predictions of a text, kept in a folder under the hash of all that decides them.

    Parameters:
        folder: where they are kept; it is made if needed.
        model: path of the full-precision model.
        text: what is predicted.
        settings: how the model is decoded, and on how much of the text.
        progress: where work is shown.
    """
    identity = identify(model)
    key = key_of(
        {
            "model": identity.sha256,
            "text": text.sha256,
            "settings": settings,
            "library": versions()["llama_cpp_commit"],
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key[:16]}.base"
    if path.exists():
        try:
            return open_base(path, text, settings, identity)
        except BitladderError:
            path.unlink()  # the file is ours, and damaged
    own = folder / f".{path.name}.{uuid.uuid4().hex}.tmp"
    make_base(identity, text, own, settings, progress)
    if path.exists():  # another machine has made it meanwhile, and may read it
        own.unlink()
    else:
        own.replace(path)
    return open_base(path, text, settings, identity)


def measurement_inputs(base: HiddenBase, renderer: Renderer, decoding: Decoding) -> dict[str, Any]:
    """All that decides the KLD of a recipe, beside the recipe. Its hash (`keys.key_of`) is a `Journal`'s context.

    Parameters:
        base: the predictions compared with; its model is the renderer's file.
        renderer: what makes blocks.
        decoding: how the model is decoded.
    """
    return {
        "model": base.header.model_sha256,
        "text": base.header.text_sha256,
        "n_ctx": decoding.n_ctx,
        "unscored": base.header.unscored,
        "gpu": decoding.gpu_layers != 0,
        "inputs rounded": _rounds_inputs(decoding),
        "importance": renderer.importance_sha256(),
        "rounding": renderer.rounding.key,
        "library": versions()["llama_cpp_commit"],
        "algorithms": SWAPPED_KLD.versions(),
    }


def _rounds_inputs(decoding: Decoding) -> bool:
    """Activations on a GPU cannot be rounded from here."""
    return decoding.gpu_layers == 0


@dataclasses.dataclass(frozen=True)
class BlockLoss:
    """The model without a block.

    Parameters:
        block: number of the block.
        kld: KLD from the whole model, nats per token.
        bytes: size of the block in the file.
    """

    block: int
    kld: Figure
    bytes: int


@dataclasses.dataclass(frozen=True)
class PruneOptions(MeasureOptions):
    """How the model without a block is measured: on less text than a quant, because the losses are large."""

    chunks: int | None = option(4, "--chunks", least=1, metavar="N", help="Chunks of the text that are measured.")


def rank_blocks(
    model: pathlib.Path, text: Text, options: PruneOptions, *, progress: Progress = SILENT
) -> list[BlockLoss]:
    """Measures the model without each of its blocks, and sorts them by KLD, the least first.

    Parameters:
        model: path of a GGUF.
        text: what is measured on.
        options: how much of it, and how the model is decoded.
        progress: where work is shown.

    Raises:
        BitladderError: the blocks of the architecture cannot be left out here.
    """
    with load_or_compute_base(model, text, options, progress=progress) as base:
        losses = blocks_left_out(base, options, chunks=options.chunks, progress=progress)
    return sorted(losses, key=lambda loss: loss.kld.value)


def blocks_left_out(
    base: HiddenBase, decoding: Decoding, *, chunks: int | None = None, progress: Progress = SILENT
) -> list[BlockLoss]:
    """Measures the model of a base without each of its blocks.

    Parameters:
        base: predictions of the whole model.
        decoding: how to decode; the context length must be the base's.
        chunks: how many of the base's chunks to decode, from the first on; None decodes all.

    Returns:
        One entry for each block, in their order.

    Raises:
        BitladderError: the blocks of this architecture end in other matrices than attn_output and ffn_down.
    """
    losses = []
    with GgufFile(base.model.path) as file, Renderer(file, {}, threads=decoding.threads) as renderer:
        sizes, ends = _blocks(file)
        with (
            SwappedModel(base, renderer, decoding) as model,
            progress.task(f"{base.model.name} without each block", len(ends)) as task,
        ):
            for block, names in ends.items():
                kld = mean(model.kld_with(dict.fromkeys(names, Zeros()), chunks).ravel())
                losses.append(BlockLoss(block, kld, sizes[block]))
                task.note(f"block {block}: KLD {kld.value:.4f}")
                task.advance()
    return losses


def _blocks(file: GgufFile) -> tuple[dict[int, int], dict[int, list[str]]]:
    """Bytes of each block, and the tensors that it ends in."""
    sizes: dict[int, int] = collections.Counter()
    ends: dict[int, list[str]] = collections.defaultdict(list)
    halves: dict[int, set[tuple[str, ...]]] = collections.defaultdict(set)
    heads = set(prediction_tensors(file))  # no text that is measured here reaches them
    for tensor in file.tensors.values():
        block = None if tensor.name in heads else block_of(tensor.name)
        stem, _, suffix = name_in_block(tensor.name).rpartition(".")
        if block is None or suffix not in ("weight", "bias"):
            continue
        sizes[block] += tensor.nbytes
        for half in (ATTENTION, FEED_FORWARD):
            if stem in half:
                ends[block].append(tensor.name)
                halves[block].add(half)
    incomplete = [block for block in sizes if len(halves[block]) < 2]
    if incomplete or not sizes:
        raise BitladderError(
            f"{file.path.name}: block {incomplete[0] if incomplete else 0} of architecture {file.architecture} does "
            "not end in attn_output and ffn_down; it cannot be left out here"
        )
    return dict(sorted(sizes.items())), dict(sorted(ends.items()))

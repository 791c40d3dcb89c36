"""Second moments of inputs, weighted by what an error at each token costs, and of the gradients of outputs.

To second order an error ΔW of a weight matrix raises the model's KLD by ½ E[(gᵀ ΔW x)²] per token. Here x is the
matrix's input, and g the gradient, with respect to its output, of the log-probability of labels that are drawn from the
model. (The second derivative of the KLD at its minimum is the Fisher information of such labels.) If g and x were
independent, and g alike in all directions, this would be ½ tr(ΔW H ΔWᵀ) with H = E[xxᵀ]. They are not: at an attention
sink ‖g‖² is hundreds of times its mean. Hence H = E[w xxᵀ] and, for the rows, O = E[v ggᵀ]. YAQA (arXiv 2505.22988)
calls the pair a Kronecker-factored sketch of the Hessian. For errors whose columns have the covariance C, and rows R,
the expectation above is tr(C H) with w = gᵀRg and tr(R O) with v = xᵀCx. Rounding for H and O leaves errors where these
are small, so C and R are taken to be (H + λ)⁻¹ and (O + λ)⁻¹: w and v are leverages. With w = ‖g‖² and v = 1, which
suit errors that are alike everywhere, quants of two small models had 2 to 12 % more KLD.
"""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.gradients.usable import (
    check_logits,
    has_half_products,
    require_torch,
    torch_threads,
)
from bitladder.calibrate.moments.schema import MomentShape, Provenance
from bitladder.calibrate.moments.triangles import Correlations, LowRank, unpack_blocks
from bitladder.calibrate.sum_order import ByText
from bitladder.calibrate.unfinished import UnfinishedWork
from bitladder.engine import Floats, Tokens
from bitladder.errors import BitladderError
from bitladder.keys import Algorithm
from bitladder.options import Options, option
from bitladder.progress import SILENT, Progress

if TYPE_CHECKING:
    from bitladder.calibrate.gradients.entry_sums import EntryPlan, EntrySums
    from bitladder.calibrate.gradients.forward import TorchModel
    from bitladder.calibrate.gradients.gradient_pass import GradientPass
GRADIENT_MOMENTS = Algorithm(
    "moments by gradients",
    (
        "tokens weighted by the squared length of their gradients",
        "tokens weighted by leverages",
        "leverages estimated by products with random signs; gate and up share an input; O of q and k by heads, "
        "of gate and up of low rank; products with weights in bfloat16 where the CPU has them",
        "the forward pass is that of transformers' modules",
        "factorizations and sums are computed in one thread: the same bytes by any number of threads",
        "so are products of wide matrices, whose last bits depended on the number of threads",
        "each expert has moments of the tokens that are routed to it",
        "models that had none have gradients: windows of 0, norms with a bias, without weights, ropes of Ministral 3",
        "embeddings that are not the head have moments of the gradients at their rows",
        "sums of each text begin at 0, and are added up in the order of the texts",
    ),
)
# Parts of the names of what is kept of a matrix, as in the file.
_VALUES, _DIAGONALS = "values", "diagonals"


@dataclasses.dataclass(frozen=True)
class GradientOptions(Options):
    """How moments are weighted by gradients."""

    outputs: bool = option(True, help="Moments of the gradients of outputs, which rounding uses too.")
    draws: int = option(1, least=1, help="Labels that are drawn for each position.")
    seed: int = option(0, help="Seed of the labels.")
    pilots: int = option(
        4, least=2, help="Every fourth chunk, by default, is used only for the moments that leverages are made of."
    )
    fewest: int = option(8, least=1, help="With fewer chunks tokens are weighted by the squared length of gradients.")
    damping: float = option(
        0.1, help="Damping of the moments that leverages are made of, as a share of their diagonal."
    )
    sketch: int = option(128, least=1, help="Random products that estimate the leverages of wider inputs and outputs.")
    rank: int = option(
        128, least=1, help="Columns of the factor that is kept for the gradients of the outputs of gate and up."
    )
    half: bool | None = option(
        None,
        help="Products with weights in bfloat16.",
        unset="where the CPU has instructions for them, and the logits stay within the tolerance",
    )


@dataclasses.dataclass(frozen=True)
class GradientMoments:
    """Moments of one weight. w and v are leverages, divided by their means.

    With too few chunks, and without outputs (never known of a head, nor of experts), w is ‖g‖² divided by its mean, and
    v = 1. The mean is that of the expert.

    Parameters:
        name: the weight.
        tokens: tokens that were read.
        inputs: E[w xxᵀ], float32 [n_in, n_in]; of experts [experts, n_in, n_in]. w of gate and up is the sum of both.
        outputs: E[v ggᵀ] in squared nats, float32 [n_out, n_out]; None for the head and experts. That of q and k is 0
            between heads; that of gate and up is of low rank, but for its diagonal.
        by_position: mean of ‖g‖² at each position of a chunk, divided by its mean over all, float32 [n_ctx].
    """

    name: str
    tokens: int
    inputs: Floats
    outputs: Floats | None
    by_position: Floats


@GRADIENT_MOMENTS.entry
def weighted_moments(
    path: str | os.PathLike[str],
    chunks: Tokens,
    *,
    names: Collection[str] | None = None,
    options: GradientOptions | None = None,
    memory: int = 8 << 30,
    threads: int | None = None,
    device: str | None = None,
    progress: Progress = SILENT,
) -> Iterator[GradientMoments]:
    """Yields the moments of a model's weights, in the order of the computation from the last to the first.

    The same seed, model, chunks and kind of CPU give the same moments, whatever the memory and the number of threads.

    Parameters:
        path: the model.
        chunks: sequences, int32 [chunks, n_ctx].
        names: weights; None takes all, the head included.
        options: how tokens are weighted.
        memory: bytes for everything. What does not fit at once is computed forward twice (see `gradient_pass`).
        threads: threads of the CPU.
        device: what makes products and sums (`engine.torch_device`); None is the CPU.
        progress: hears of the work.

    Raises:
        BitladderError: torch is not installed, does not know the architecture, or does not compute the library's
            logits (`check_logits`).
        UsageError: a name is not a matrix of the model.
    """
    options = options or GradientOptions()
    with (
        tempfile.TemporaryDirectory(prefix="bitladder-gradients-") as folder,
        opened_model(path, options, memory, threads, device) as model,
    ):
        work = UnfinishedWork(pathlib.Path(folder) / "moments", "", seconds=float("inf"))
        whole = ByText((len(chunks),))
        for entries in gradient_pass(model, chunks, whole, names, options, memory, work, threads).run(progress):
            for entry in entries:
                experts = range(entry.plan.experts)
                inputs = np.stack([unpack_blocks(entry.packed_inputs(expert)) for expert in experts])
                inputs = inputs if len(inputs) > 1 else inputs[0]
                for name in entry.plan.names:
                    outputs = entry.kept_outputs(name)
                    matrix = None if outputs is None else outputs.matrix()
                    yield GradientMoments(name, chunks.size, inputs, matrix, entry.by_position(name))


@contextlib.contextmanager
def opened_model(
    path: str | os.PathLike[str], options: GradientOptions, memory: int, threads: int | None, device: str | None = None
) -> Iterator["TorchModel"]:
    """A model whose expanded weights take at most half of the memory. Torch has so many threads meanwhile."""
    require_torch()
    from bitladder.calibrate.gradients.forward import TorchModel

    half = has_half_products(device) if options.half is None else options.half
    with (
        torch_threads(threads),
        TorchModel(path, memory=memory // 2, threads=threads, half=half, device=device) as model,
    ):
        yield model


def gradient_pass(
    model: "TorchModel",
    chunks: Tokens,
    by_text: ByText,
    names: Collection[str] | None,
    options: GradientOptions,
    memory: int,
    work: UnfinishedWork,
    threads: int | None,
) -> "GradientPass":
    """The pass that makes the moments of some weights, after the model's logits were checked.

    Parameters:
        model: the model, open.
        chunks: int32 [chunks, n_ctx].
        by_text: which of them are of which text.
        names: weights; None takes all.
        options: how tokens are weighted.
        memory: bytes for everything.
        work: keeps what is finished.
        threads: threads of the CPU.
    """
    from bitladder.calibrate.gradients.gradient_pass import GradientPass
    from bitladder.calibrate.gradients.segments import choose_matrices, lanes_of, plan_entries, room_for_sums

    plans = plan_entries(model, choose_matrices(model, names), options)
    lanes = lanes_of(model, memory, chunks.shape[1], threads)
    room = room_for_sums(model, plans, memory, lanes)
    try:
        check_logits(model.path, model.checked(chunks[0]), threads=threads, ours=model)
    except BitladderError:
        if options.half or not model.half:
            raise
        model.half = False  # bfloat16 alone can move the logits of a model too far
        check_logits(model.path, model.checked(chunks[0]), threads=threads, ours=model)
    return GradientPass(model, chunks, by_text, plans, options, room, work, lanes, threads)


@dataclasses.dataclass(frozen=True)
class GradientWork:
    """Moments by gradients that are collected for a file.

    Parameters:
        model: path of a GGUF.
        chunks: int32 [chunks, n_ctx].
        by_text: which of them are of which text.
        options: as of `weighted_moments`.
        memory: bytes for everything.
        threads: threads of the CPU.
        device: what makes products and sums; None is the CPU.
    """

    model: str | os.PathLike[str]
    chunks: Tokens
    by_text: ByText
    options: GradientOptions
    memory: int
    threads: int | None
    device: str | None

    def collect(self, work: UnfinishedWork, provenance: Provenance, progress: Progress) -> "KeptMoments":
        """Computes the moments of all weights that are not in a folder of unfinished work yet."""
        with self._opened() as (model, plans):
            for entries in self._pass(model, work).run(progress):
                for entry in entries:
                    _keep_entry(work, entry)
        return KeptMoments(plans[::-1], work, provenance)

    def collect_text(self, work: UnfinishedWork, progress: Progress) -> None:
        """Leaves the sums of the one text of `by_text` in a folder of unfinished work."""
        from bitladder.calibrate.gradients.segments import keep_text

        assert self.by_text.only is not None
        with self._opened() as (model, _):
            for entries in self._pass(model, work).run(progress):
                for entry in entries:
                    keep_text(work, entry, self.by_text.only)

    def join(
        self, works: Sequence[UnfinishedWork], out: UnfinishedWork, provenance: Provenance, progress: Progress
    ) -> "KeptMoments":
        """The moments of all texts from what `collect_text` left of each."""
        from bitladder.calibrate.gradients.segments import joined_entry

        with self._opened() as (_, plans), progress.task("add up texts", len(plans)) as bar:
            for plan in plans:
                _keep_entry(out, joined_entry(plan, self.options, self.chunks.shape[1], works))
                bar.advance()
        return KeptMoments(plans[::-1], out, provenance)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple["TorchModel", "list[EntryPlan]"]]:
        from bitladder.calibrate.gradients.segments import choose_matrices, plan_entries

        with opened_model(self.model, self.options, self.memory, self.threads, self.device) as model:
            yield model, plan_entries(model, choose_matrices(model, None), self.options)

    def _pass(self, model: "TorchModel", work: UnfinishedWork) -> "GradientPass":
        return gradient_pass(model, self.chunks, self.by_text, None, self.options, self.memory, work, self.threads)


def _keep_entry(work: UnfinishedWork, entry: "EntrySums") -> None:
    for expert in range(entry.plan.experts):
        _keep(work, _inputs(entry.plan, expert), Correlations.of(entry.packed_inputs(expert)))
    work.put(_counts(entry.plan), entry.counts())
    for name in entry.plan.names:
        outputs = entry.kept_outputs(name)
        if outputs is not None:
            _keep(work, f"{name}.outputs", outputs)


def _inputs(plan: "EntryPlan", expert: int) -> str:
    return f"{plan.names[0]}.inputs {expert}"


def _counts(plan: "EntryPlan") -> str:
    return f"{plan.names[0]}.counts"


def _keep(work: UnfinishedWork, name: str, kept: Correlations | LowRank) -> None:
    work.put(f"{name}.{_VALUES}", kept.values)
    work.put(f"{name}.{_DIAGONALS}", kept.diagonals)


class KeptMoments:
    """Moments in the folder of unfinished work, as a MomentsSource."""

    def __init__(self, plans: Sequence["EntryPlan"], work: UnfinishedWork, provenance: Provenance) -> None:
        self.provenance = provenance
        self._work = work
        self._plans = {name: plan for plan in plans for name in plan.names}

    def names(self) -> list[str]:
        """See MomentsSource. Weights are in the order of the computation."""
        return list(self._plans)

    def entry(self, name: str) -> str:
        """See MomentsSource."""
        return self._plans[name].names[0]

    def shape(self, name: str) -> MomentShape:
        """See MomentsSource."""
        plan = self._plans[name]
        outputs = plan.outputs[plan.names.index(name)]
        return MomentShape(plan.experts, plan.n_in, **({} if outputs is None else outputs.moment_shape))

    def counts(self, name: str) -> npt.NDArray[np.int64]:
        """See MomentsSource."""
        return np.asarray(self._work.get(_counts(self._plans[name])), np.int64)

    def packed(self, name: str, matrix: int = 0) -> Floats:
        """See MomentsSource."""
        packed: Floats = self.kept_inputs(name, matrix).packed()[0]
        return packed

    def kept_inputs(self, name: str, matrix: int = 0) -> Correlations:
        """See MomentsSource."""
        return Correlations(*self._kept(_inputs(self._plans[name], matrix)))

    def outputs(self, name: str) -> Correlations | LowRank | None:
        """See MomentsSource."""
        shape = self.shape(name)
        if not shape.n_out:
            return None
        return (LowRank if shape.rank else Correlations)(*self._kept(f"{name}.outputs"))

    def _kept(self, name: str) -> tuple[npt.NDArray[np.float16], Floats]:
        return np.asarray(self._work.get(f"{name}.{_VALUES}")), np.asarray(self._work.get(f"{name}.{_DIAGONALS}"))

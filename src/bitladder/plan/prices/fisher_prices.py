"""Prices from gradients: the second-order term of every rendered error, from one backward pass (extra: torch).

A look-up in the embeddings is no multiplication by a block's weight and has no such term. The few tensors outside of
blocks are swapped into the loaded model at every type instead, where a tied embedding counts for both its uses. The
price of a (tensor, type) depends on no other tensor or type.
"""

import functools

import numpy as np
import numpy.typing as npt

from bitladder.calibrate import FISHER, fisher_costs
from bitladder.engine import TensorType, Tokens
from bitladder.keys import Algorithm
from bitladder.plan.prices.document import TypePrices
from bitladder.plan.prices.law import FLOOR
from bitladder.plan.prices.menu import Menus
from bitladder.plan.prices.price import PriceSource, check_swaps
from bitladder.progress import SILENT, Progress
from bitladder.text import EXCERPTS
from bitladder.trial import RENDERING, SWAPPED_KLD, Renderer

Floats = npt.NDArray[np.float32]

FISHER_PRICES = Algorithm(
    "prices from gradients",
    ("the second-order term of every rendered error; embeddings and head by swaps",),
    uses=(EXCERPTS, FISHER, RENDERING, SWAPPED_KLD),
)


@FISHER_PRICES.entry
def price_by_gradients(
    source: PriceSource, menus: Menus, chunks: Tokens, *, threads: int | None = None, progress: Progress = SILENT
) -> TypePrices:
    """Prices every type on the tensors' menus.

    Parameters:
        source: what prices are made from.
        menus: tensor → types.
        chunks: tokens for the backward pass, int32, shape [chunks, n_ctx].
        threads: of the CPU; None for all.
        progress: where work is shown.

    Raises:
        BitladderError: torch is not installed, or does not know the architecture.
    """
    options = source.options
    errors = source.rendered_errors(menus, progress)
    inner = [name for name in menus if source.places[name][1] is not None]
    candidates = {
        name: {kind.name: functools.partial(_gap, source.renderer, name, kind) for kind in menus[name]}
        for name in inner
    }
    path = source.renderer.file.path
    costs = fisher_costs(path, chunks, candidates, options=options.fisher, threads=threads, progress=progress)
    kld = {name: {kind: max(cost.sequence, FLOOR) for kind, cost in costs[name].items()} for name in inner}
    outer = [(name, kind.name) for name in menus if name not in kld for kind in menus[name]]
    with progress.task("swap embeddings and head", len(outer)) as task:
        for name, kind in outer:
            task.note(f"{name} {kind}")
            measured = source.measurements.measure({name: kind}, options.probe_chunks, "outside of the blocks")
            kld.setdefault(name, {})[kind] = max(measured.kld, FLOOR)
            task.advance()
    check = check_swaps(kld, {}, source.measurements, options, progress)
    return TypePrices(
        method="fisher",
        key=source.key,
        made=source.made,
        tokens=source.measurements.tokens + chunks.size * options.fisher.draws,
        check=check,
        tensors=source.table(menus, errors, kld),
    )


def _gap(renderer: Renderer, name: str, kind: TensorType) -> Floats:
    """The error of a rendered tensor, float32, shape [n_out, n_in]."""
    gap: Floats = renderer.values(name, kind) - renderer.weights(name)
    return gap

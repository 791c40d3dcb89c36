"""Prices from gradients: the second-order term of every rendered error, from one backward pass (extra: torch).

What is no multiplication by a block's weight, as a look-up in the embeddings, has no such term; those few tensors are
swapped into the loaded model at every type instead, where a tied embedding counts for both its uses.
"""

import functools
import time
from collections.abc import Mapping

from bitladder.calibrate.gradients import fisher_costs
from bitladder.engine.model import Tokens
from bitladder.engine.types import TensorType
from bitladder.plan.prices.document import Made, Sensitivity
from bitladder.plan.prices.law import FLOOR
from bitladder.plan.prices.price import Effort, Menus, check_swaps, rendered_errors, table
from bitladder.progress import SILENT, Progress
from bitladder.trial.journal import Journal, Measures
from bitladder.trial.render import Floats, Renderer

DRAWS = 4


def price_by_gradients(
    renderer: Renderer,
    model: Measures,
    menus: Menus,
    places: Mapping[str, tuple[str, int | None]],
    journal: Journal,
    made: Made,
    effort: Effort,
    chunks: Tokens,
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Sensitivity:
    """Price every type on the tensors' menus; parameters as for `price.price`, and `chunks` int32 [chunks, n_ctx].

    Raises BitladderError if torch is not installed, or does not know the architecture.
    """
    began = time.monotonic()
    errors = rendered_errors(renderer, menus, progress)
    inner = [name for name in menus if places[name][1] is not None]
    candidates = {
        name: {kind.name: functools.partial(_gap, renderer, name, kind) for kind in menus[name]} for name in inner
    }
    costs = fisher_costs(renderer.file.path, chunks, candidates, draws=DRAWS, threads=threads, progress=progress)
    kld = {name: {kind: max(cost.sequence, FLOOR) for kind, cost in costs[name].items()} for name in inner}
    outer = [(name, kind.name) for name in menus if name not in kld for kind in menus[name]]
    with progress.task("swap embeddings and head", len(outer)) as task:
        for name, kind in outer:
            task.note(f"{name} {kind}")
            found = journal.measure(model, {name: kind}, effort.chunks, "outside of the blocks")
            kld.setdefault(name, {})[kind] = max(found.kld, FLOOR)
            task.advance()
    check = check_swaps(kld, {}, model, journal, effort, progress)
    return Sensitivity(
        method="fisher",
        made=made,
        tokens=journal.tokens + chunks.size * DRAWS,
        seconds=time.monotonic() - began,
        check=check,
        tensors=table(renderer, menus, places, errors, kld),
    )


def _gap(renderer: Renderer, name: str, kind: TensorType) -> Floats:
    """The error of a rendered tensor, float32 [n_out, n_in]."""
    gap: Floats = renderer.values(name, kind) - renderer.weights(name)
    return gap

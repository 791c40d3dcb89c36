"""Rendering many tensors, several at once."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from bitladder.engine.types import type_by_name
from bitladder.progress import SILENT, Progress
from bitladder.trial.render import Renderer, Stock


def render_all(
    renderer: Renderer,
    wanted: Iterable[tuple[str, str]],
    *,
    label: str = "rounding",
    progress: Progress = SILENT,
) -> dict[tuple[str, str], float]:
    """Render tensors in types, given as pairs of names, into the renderer's folder; their errors (`Renderer.error`).

    Each tensor has a thread; the library's kernels use all threads for one by themselves. Large tensors go first, so
    that no thread is left with one at the end. Raises BitladderError that names the tensor.
    """
    tensors = renderer.file.tensors
    pairs = sorted(wanted, key=lambda pair: -tensors[pair[0]].elements * tensors[pair[0]].width)
    pool = ThreadPoolExecutor(1 if isinstance(renderer.rounding, Stock) else renderer.kernels.threads)
    errors = {}
    try:
        with progress.task(label, sum(tensors[name].elements for name, _ in pairs)) as bar:
            waiting = [(pair, pool.submit(renderer.error, pair[0], type_by_name(pair[1]))) for pair in pairs]
            for (name, kind), future in waiting:
                errors[name, kind] = future.result()
                bar.note(f"{name} {kind}")
                bar.advance(tensors[name].elements)
    finally:
        pool.shutdown(cancel_futures=True)
    return errors

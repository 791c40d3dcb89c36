"""Rendering many tensors, several at once."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from bitladder.engine.types import threads_available, type_by_name
from bitladder.progress import SILENT, Progress
from bitladder.sensitivity.rendered import Renderer


def render_all(
    renderer: Renderer, wanted: Iterable[tuple[str, str]], *, threads: int | None = None, progress: Progress = SILENT
) -> None:
    """Render tensors in types, given as pairs of names, into the renderer's folder, a thread for each.

    Large tensors go first, so that no thread is left with one at the end. Raises BitladderError that names the tensor.
    """
    tensors = renderer.file.tensors
    pairs = sorted(wanted, key=lambda pair: -tensors[pair[0]].elements * tensors[pair[0]].width)
    pool = ThreadPoolExecutor(threads or threads_available())
    try:
        with progress.task("rounding", sum(tensors[name].elements for name, _ in pairs)) as bar:
            waiting = [(name, pool.submit(renderer.blocks, name, type_by_name(kind))) for name, kind in pairs]
            for name, future in waiting:
                future.result()
                bar.note(name)
                bar.advance(tensors[name].elements)
    finally:
        pool.shutdown(cancel_futures=True)

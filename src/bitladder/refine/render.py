"""Rendering all tensors of a recipe, several at once."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from bitladder.engine.types import threads_available, type_by_name
from bitladder.progress import SILENT, Progress
from bitladder.sensitivity.rendered import Renderer


def render_all(
    renderer: Renderer, types: Mapping[str, str], *, threads: int | None = None, progress: Progress = SILENT
) -> None:
    """Render each tensor in its type into the renderer's folder, a thread for each tensor.

    Large tensors go first, so that no thread is left with one at the end. Raises BitladderError that names the tensor.
    """
    tensors = renderer.file.tensors
    names = sorted(types, key=lambda name: -tensors[name].elements * tensors[name].width)
    pool = ThreadPoolExecutor(threads or threads_available())
    try:
        with progress.task("rounding", sum(tensors[name].elements for name in names)) as bar:
            waiting = {name: pool.submit(renderer.blocks, name, type_by_name(types[name])) for name in names}
            for name, future in waiting.items():
                future.result()
                bar.note(name)
                bar.advance(tensors[name].elements)
    finally:
        pool.shutdown(cancel_futures=True)

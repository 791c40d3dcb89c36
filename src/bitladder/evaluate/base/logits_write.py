"""Writing llama-perplexity's file of log-probabilities, byte for byte as the tool itself does."""

import pathlib
import shutil

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError
from bitladder.evaluate.base.logits_file import HEAD, Codes, Layout
from bitladder.evaluate.decode_chunks import cut, decode
from bitladder.evaluate.logit_rows import Workers, score_rows
from bitladder.evaluate.settings import Settings
from bitladder.files import replacing
from bitladder.progress import SILENT, Progress
from bitladder.text.texts import Text

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Logits this far below a row's largest, or farther, are stored alike.
_DEPTH = np.float32(16)
_LARGEST = np.float32(65535)


def write_logits_file(
    model: pathlib.Path, text: Text, out: pathlib.Path, settings: Settings, progress: Progress = SILENT
) -> Doubles:
    """Run the full-precision model over a text and keep its log-probabilities as llama-perplexity does.

    Parameters: `out` the file, replaced only when all is done; it has 2 bytes for each token of the vocabulary and
    each scored position. Returns the negative log-likelihood of every scored token, float64 [chunks × scored], nats.
    Raises BitladderError if the text is too short, the model does not load, its logits are not finite, or the disk
    has too little room.
    """
    with settings.load(model) as loaded:
        chunks = cut(loaded, text, settings)
        layout = Layout(chunks.n_ctx, loaded.n_vocab, len(chunks))
        _check_room(out, layout.size)
        nll = np.empty((len(chunks), chunks.scored))
        label = f"Log-probabilities of {model.name} over {text.name}"
        with (
            settings.context(loaded) as context,
            Workers(settings.threads) as workers,
            progress.task(label, len(chunks)) as task,
            replacing(out) as temporary,
            temporary.open("wb") as stream,
        ):
            stream.write(layout.start() + chunks.tokens.astype("<i4").tobytes())
            for chunk in range(len(chunks)):
                targets = chunks.targets(chunk)
                for start, logits in decode(context, chunks, chunk):
                    part = slice(start, start + len(logits))
                    nll[chunk, part] = score_rows(logits, targets[part], workers, what=model.name).nll
                    stream.write(pack_rows(logits, workers).data)
                task.note(f"PPL {np.exp(min(nll[: chunk + 1].mean(), 700)):.4f}")
                task.advance()
    return nll.reshape(-1)


def pack_rows(logits: Floats, workers: Workers) -> Codes:
    """Rows of logits, float32 [rows, n_vocab], as a record holds them: uint16 [rows, row]; see `logitsfile`.

    The arithmetic is llama-perplexity's, in single precision but for the sum of exponentials, so that the bytes are
    the same.
    """
    rows, n_vocab = logits.shape
    packed = np.zeros((rows, Layout(0, n_vocab, 0).row), "<u2")

    def work(row: int, _slot: int) -> None:
        values = logits[row]
        largest = values.max()
        least = max(values.min(), largest - _DEPTH)
        # The C library's expf is rounded correctly, NumPy's is not: hence double precision, rounded once.
        total = np.exp(values - largest, dtype=np.float64).astype(np.float32).sum(dtype=np.float64)
        scale = (largest - least) / _LARGEST
        packed[row, :HEAD] = np.array([scale, least - largest - np.float32(np.log(total))], "<f4").view("<u2")
        if scale > 0:
            steps = np.maximum(values - least, np.float32(0)) * (np.float32(1) / scale)
            packed[row, HEAD : HEAD + n_vocab] = np.rint(steps)

    workers.run(rows, work)
    return packed


def _check_room(out: pathlib.Path, needed: int) -> None:
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BitladderError(
            f"{out} needs {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB free; take fewer --chunks or "
            "another disk"
        )

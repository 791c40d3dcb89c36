"""Models to smooth: converted, with an importance matrix, and their logits."""

import numpy as np

from bitladder.calibrate import ImatrixOptions, collect_imatrix
from bitladder.convert import convert
from bitladder.engine import Context, Decoding, Model
from bitladder.progress import SILENT
from bitladder.refine import ModelFiles, SmoothingOptions, smooth_model


def converted_with_imatrix(folder, model, text, outtype, **options):
    """The GGUF of a transformers model whose tokenizer is in folder/checkpoint, and its importance matrix."""
    model.save_pretrained(folder / "checkpoint")
    path, imatrix = folder / "f.gguf", folder / "i.gguf"
    convert(folder / "checkpoint", path, outtype=outtype)
    collect_imatrix(path, [text], imatrix, decoding=Decoding(n_ctx=64), options=ImatrixOptions(**options))
    return path, imatrix


def smooth(path, imatrix, out, imatrix_out, progress=SILENT, **options):
    """Writes the smoothed model and its importance matrix."""
    source, smoothed = ModelFiles(path, imatrix), ModelFiles(out, imatrix_out)
    return smooth_model(source, smoothed, SmoothingOptions(**options), progress=progress)


def logits(path, tokens):
    """The logits of every token, float32 [tokens, n_vocab]."""
    count = len(tokens)
    with Model(path, repack=False) as model, Context(model, Decoding(n_ctx=count, n_batch=count)) as context:
        context.decode(tokens, np.arange(count, dtype=np.int32), np.zeros(count, np.int32), np.ones(count, np.bool_))
        return context.logits().copy()

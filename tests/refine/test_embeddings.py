"""Embeddings that are not the head are rounded: for the gradients at their rows, or as if columns counted alike."""

import numpy as np
import pytest
import tiny_models

from bitladder.calibrate import MomentsFile, MomentsOptions, collect_moments
from bitladder.convert import convert
from bitladder.engine import Decoding, type_by_name
from bitladder.gguf import GgufFile
from bitladder.refine import OutputRounding
from bitladder.rounding import RoundingOptions
from bitladder.text import Reading
from bitladder.trial import Renderer

EMBEDDING = "token_embd.weight"


def model(folder, tied):
    tiny_models.train_byte_level(folder / "checkpoint")
    tiny_models.llama(folder / "checkpoint", tie_word_embeddings=tied)
    convert(folder / "checkpoint", folder / "f.gguf", outtype="f16")
    return folder / "f.gguf"


def moments(path, text, weighting):
    out, options = path.with_name(f"{weighting}.gguf"), MomentsOptions(weighting=weighting)
    collect_moments(path, [text], out, reading=Reading(chunks=3), decoding=Decoding(n_ctx=64), options=options)
    return out


@pytest.mark.parametrize("weighting", ["gradients", "tokens"])
def test_errors_cost_less_where_gradients_are_or_everywhere(tmp_path, text, weighting):
    path = model(tmp_path, tied=False)
    with MomentsFile(moments(path, text, weighting)) as known, GgufFile(path) as file:
        rounding = OutputRounding([known], RoundingOptions())
        kind = type_by_name("q4_0")
        assert rounding.covers(EMBEDDING, kind) and (EMBEDDING in known) == (weighting == "gradients")
        h = known.read(EMBEDDING).inputs[0] if weighting == "gradients" else np.eye(file.tensors[EMBEDDING].width)
        losses = []
        for method in (None, rounding):
            with Renderer(file, {}, rounding=method) as renderer:
                delta = (renderer.values(EMBEDDING, kind) - renderer.weights(EMBEDDING)).reshape(-1, len(h))
                losses.append(float(np.vdot(delta @ h, delta)))
        assert losses[1] < 0.9 * losses[0]


def test_embeddings_that_are_the_head_have_its_moments(tmp_path, text):
    path = model(tmp_path, tied=True)
    with MomentsFile(moments(path, text, "gradients")) as known:
        assert EMBEDDING in known and "output.weight" not in known.names()
        assert OutputRounding([known], RoundingOptions()).covers(EMBEDDING, type_by_name("q4_0"))

"""Rounding from the first block to the last, each group of blocks making up for what those before it got wrong.

The groups before are put into the loaded model as they were rounded. The next group's inputs x̃ then differ from the
full-precision model's x, and what is rounded is not W but the weights that come nearest to W x when given x̃
(`calibrate.sequential.asymmetric_target`). Second moments and output-side factors stay those of the files.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from bitladder.calibrate.sequential import SequentialModel, ShiftedMoment, asymmetric_target
from bitladder.engine.model import Model
from bitladder.engine.types import TensorType, type_by_name
from bitladder.progress import SILENT, Progress
from bitladder.refine.round.output_rounding import Bytes, Floats, OutputRounding
from bitladder.text.chunks import Reading
from bitladder.text.texts import Text
from bitladder.trial import Renderer, render_all

EMBEDDINGS = "token_embd.weight"
# The first token of a text is what attention rests on: its errors reach all others (the attention sink), but in a mean
# it is one of n_ctx. Counted like the others its error doubled where the target was to lower it; hence this weight.
FIRST = 50.0
# Raise it when the same texts and options would give other targets.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Sequential:
    """What the inputs are compared on, and how often: `chunks` of `n_ctx` tokens from all over each text, after every
    so many `blocks` of the model."""

    texts: tuple[Text, ...]
    chunks: int = 24
    blocks: int = 5
    n_ctx: int = 512

    def describe(self) -> str:
        """What a file says of it, which `bitladder verify` compares."""
        digest = hashlib.sha256(" ".join(text.sha256 for text in self.texts).encode()).hexdigest()
        return json.dumps(
            {"version": VERSION, "texts": digest, "chunks": self.chunks, "blocks": self.blocks, "n_ctx": self.n_ctx}
        )


class ShiftedRounding:
    """Rounds the targets of weights whose inputs have moved (a `sensitivity.rendered.Rounding`).

    Parameters: `rounding` what rounds them; `sequential` and `types` decide, with the moments, what has been rounded
    before a weight, and so its key. `moments` are set by whoever goes through the model.
    """

    def __init__(self, rounding: OutputRounding, sequential: Sequential, types: Mapping[str, str]) -> None:
        self._rounding, self.sequential = rounding, sequential
        self.moments: Mapping[str, ShiftedMoment] = {}
        text = json.dumps([rounding.key, sequential.describe(), sorted(types.items())])
        self.key = "sequential " + hashlib.sha256(text.encode()).hexdigest()

    def __call__(self, name: str, weights: Floats, kind: TensorType, importance: Floats | None) -> Bytes:
        """See `Rounding`. Experts, which may get other tokens behind rounded weights, have no target but themselves."""
        moment = self.moments.get(name)
        if moment is not None and moment.cross is not None:
            weights = asymmetric_target(weights[0], moment.inputs[0], moment.cross)[None]
        return self._rounding(name, np.ascontiguousarray(weights), kind, importance)


def render_in_order(
    shifted: ShiftedRounding,
    renderers: tuple[Renderer, Renderer],
    types: Mapping[str, str],
    chosen: Sequence[str],
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> None:
    """Render tensors from block to block into the second renderer's folder.

    Parameters: `renderers` of the full-precision file, with the library's blocks and with `shifted`; `types` of all
    tensors that change, of which `chosen` are rounded for the output. Embeddings come first, and are rounded for what
    they are: every block sees them. Holds two full-precision models, and one group's moments of the inputs twice.
    Raises BitladderError if a text is too short or the model does not decode.
    """
    stock, rounded = renderers
    sequential, model = shifted.sequential, rounded.file.path
    with Model(model, vocab_only=True) as vocabulary:
        chunks = Reading(chunks=sequential.chunks).rows(vocabulary, sequential.texts, sequential.n_ctx)
    profile = np.ones(sequential.n_ctx)
    profile[0] = FIRST
    with SequentialModel(
        model, chunks, weights=dict.fromkeys(types, profile), cross=True, threads=threads, progress=progress
    ) as watched:
        groups = [[name for name in names if name != EMBEDDINGS] for names in watched.groups(sequential.blocks)]
        groups = [[EMBEDDINGS], *groups]
        for number, names in enumerate(groups):
            wanted = [name for name in names if name in chosen]
            if number and wanted:
                shifted.moments = watched.collect(wanted)
            render_all(rounded, ((name, types[name]) for name in wanted), progress=progress)
            for name in names:
                if name in types:
                    renderer = rounded if name in wanted else stock
                    watched.replace(name, renderer.values(name, type_by_name(types[name])))

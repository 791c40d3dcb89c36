#!/usr/bin/env python3
"""How well a chunk says what a type of a single tensor costs, by which of its tokens are scored.

    python benchmarks/scored_tokens.py --model F.gguf --imatrix I.gguf --text TEXT [--chunks 16] [--swaps 24] [--json J]

All tensors get the types of a preset. Then some of them, one after the other, get a larger type. What that changes in
KLD is known for every token of every chunk. Some tokens of one chunk stand for a measurement, the second halves of all
other chunks, which llama-perplexity would score, for the truth:

    error   root of the mean squared difference of the two, of that of the truth; the best factor is taken out
    rank    rank correlation of the two over the tensors

Both are means over the chunks. A token's KLD depends on no later token, so the tokens of a first half are those of a
chunk of half the length.
"""

import argparse
import itertools
import pathlib
import random
import tempfile

import numpy as np

from bitladder.evaluate import MeasureOptions
from bitladder.files import write_json
from bitladder.quantize import QuantizeOptions, prepare
from bitladder.text import load_text
from bitladder.trial import Renderer, SwappedModel, kept_base

PLACES = (0, 8, 16, 32, 64, 128, 256)


def measured(options: argparse.Namespace) -> np.ndarray:
    """KLD of each token: of the preset, then of each swap, float64 [1 + swaps, chunks, n_ctx − 1]."""
    settings = MeasureOptions(n_ctx=options.ctx_size, chunks=options.chunks, threads=options.threads, unscored=0)
    text = load_text(options.text)
    with (
        tempfile.TemporaryDirectory() as work,
        kept_base(pathlib.Path(work), options.model, text, settings) as base,
        prepare(options.model, QuantizeOptions(options.preset), imatrix=options.imatrix) as quant,
        Renderer(quant.file, quant.importance, threads=options.threads) as renderer,
        SwappedModel(base, renderer, settings) as model,
    ):
        types = {tensor.name: tensor.type.name for tensor in quant.choice.tensors if tensor.changes}
        names = random.Random(0).sample(sorted(types), options.swaps)
        larger = {name: "q6_K" if quant.file.tensors[name].width % 256 == 0 else "q8_0" for name in names}
        recipes = [types, *(types | {name: kind} for name, kind in larger.items())]
        return np.stack([model.kld(recipe, options.chunks) for recipe in recipes])


def judged(changes: np.ndarray, scored: range, half: int) -> dict[str, float]:
    """Error and rank of the mean over some places of a chunk."""
    estimates = changes[:, :, scored.start : scored.stop].mean(axis=2)
    errors, ranks = [], []
    for chunk in range(changes.shape[1]):
        estimate = estimates[:, chunk]
        truth = np.delete(changes, chunk, axis=1)[:, :, half:].mean(axis=(1, 2))
        factor = estimate @ truth / (estimate @ estimate)
        errors.append(np.square(factor * estimate - truth).sum() / np.square(truth).sum())
        places = (values.argsort().argsort() for values in (estimate, truth))
        ranks.append(np.corrcoef(*places)[0, 1])
    return {"error": float(np.sqrt(np.mean(errors))), "rank": float(np.mean(ranks))}


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--imatrix", type=pathlib.Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--preset", default="Q3_K_M")
    parser.add_argument("--ctx-size", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--swaps", type=int, default=24)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    kld = measured(options)
    n_ctx, half = options.ctx_size, options.ctx_size // 2
    places = [place for place in PLACES if place < half] + [half, n_ctx - 1]
    levels = {f"{a}–{b - 1}": float(kld[0, :, a:b].mean()) for a, b in itertools.pairwise(places)}
    print("KLD by place:", ", ".join(f"{name} {level:.4f}" for name, level in levels.items()))
    rows = {}
    for length in (n_ctx, half):
        usual, wanted = range(length // 2, length - 1), range(length // 16, length - 1)
        for name, scored in (("second half", usual), ("all but the first sixteenth", wanted)):
            label = f"{name} of {length}"
            rows[label] = row = {"tokens": len(scored), **judged(kld[1:] - kld[0], scored, half)}
            print(f"{label:34} {len(scored):4} tokens  error {row['error']:.3f}  rank {row['rank']:.3f}")
    if options.json:
        write_json(options.json, {"kld by place": levels, "scored": rows})


if __name__ == "__main__":
    main()

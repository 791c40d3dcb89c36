"""A model file and a text in, scores out."""

import contextlib
import pathlib
import time
from typing import Any

import numpy as np

from bitladder.calibrate.texts import Text
from bitladder.engine.native import versions
from bitladder.errors import BitladderError
from bitladder.evaluate import base as bases
from bitladder.evaluate.base import HiddenBase
from bitladder.evaluate.basefile import is_base_file
from bitladder.evaluate.cache import check_fits, load_or_compute_base, open_base
from bitladder.evaluate.chunks import cut
from bitladder.evaluate.divergence import TokenScores, compare
from bitladder.evaluate.figures import divergence_figures, perplexity
from bitladder.evaluate.identity import Identity, identify
from bitladder.evaluate.perplexity import token_nll
from bitladder.evaluate.rows import Workers
from bitladder.evaluate.scores import BaseModelName, Named, Scores
from bitladder.evaluate.settings import Settings
from bitladder.progress import SILENT, Progress

VERSIONS = ("bitladder", "llama_cpp_python", "llama_cpp_commit")


def evaluate(
    model: pathlib.Path,
    text: Text,
    *,
    base: pathlib.Path | HiddenBase | None = None,
    base_file: pathlib.Path | None = None,
    n_ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    n_batch: int = 512,
    n_ubatch: int = 512,
    progress: Progress = SILENT,
) -> Scores:
    """Perplexity of a model over a text and, with a base, its divergence from the full-precision model.

    Parameters: `base` the full-precision model (GGUF), whose predictions are computed once and kept in `base_file`
    (by default beside it), or a base file, or an open base; the others as for `Settings`.
    Raises BitladderError: a file that is none, a text too short, a base or vocabulary that does not fit.
    """
    settings = Settings(n_ctx, chunks, threads, gpu_layers, n_batch, n_ubatch)
    return measure(model, text, settings, base=base, base_file=base_file, progress=progress)[0]


def make_base(
    model: pathlib.Path,
    text: Text,
    out: pathlib.Path,
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    n_batch: int = 512,
    n_ubatch: int = 512,
    progress: Progress = SILENT,
) -> None:
    """Run the full-precision model over a text and keep its predictions in the file `out`.

    The options are those of `Settings`. Raises BitladderError (see `base.make_base`).
    """
    settings = Settings(n_ctx, chunks, threads, gpu_layers, n_batch, n_ubatch)
    bases.make_base(identify(model), text, out, settings, progress)


def measure(
    model: pathlib.Path,
    text: Text,
    settings: Settings,
    *,
    base: pathlib.Path | HiddenBase | None = None,
    base_file: pathlib.Path | None = None,
    progress: Progress = SILENT,
) -> tuple[Scores, TokenScores | None]:
    """As `evaluate`; returns the scores of each token too (None without a base), for paired comparisons."""
    began = time.monotonic()
    identity = identify(model)
    tokens: TokenScores | None = None
    compared: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if isinstance(base, pathlib.Path):
            base = stack.enter_context(open_or_compute(base, base_file, text, settings, progress))
        if base is not None:
            check_fits(base, text, settings)
            _same_vocabulary(identity, base)
        loaded = stack.enter_context(settings.load(model))
        if settings.n_ctx > loaded.n_ctx_train > 0:
            progress.warn(
                f"{identity.name} was trained on {loaded.n_ctx_train} tokens of context, not {settings.n_ctx}"
            )
        pieces = None if base else cut(loaded, text, settings)
        context = stack.enter_context(settings.context(loaded))
        workers = stack.enter_context(Workers(settings.threads))
        if base is not None:
            count = settings.limit(len(base.chunks))
            tokens = compare(context, base, count, workers, progress)
            compared = divergence_figures(tokens)
            compared["base"] = BaseModelName(model=base.header.model, sha256=base.header.model_sha256)
        elif pieces is not None:
            count = len(pieces)
            nll = token_nll(context, pieces, workers, progress)
            compared = {"ppl": perplexity(nll), "tokens_scored": len(nll)}
    return _scores(identity, text, settings.n_ctx, count, began, compared), tokens


def base_scores(base: HiddenBase, text: Text, settings: Settings) -> Scores:
    """The full-precision model's own perplexity, from what its base keeps; nothing is decoded.

    Raises BitladderError if the base was made of another text or for other settings.
    """
    began = time.monotonic()
    check_fits(base, text, settings)
    count = settings.limit(len(base.chunks))
    nll = np.concatenate([base.rows(chunk).nll for chunk in range(count)])
    figures = {"ppl": perplexity(nll), "tokens_scored": len(nll)}
    return _scores(base.model, text, settings.n_ctx, count, began, figures)


def _scores(identity: Identity, text: Text, n_ctx: int, chunks: int, began: float, figures: dict[str, Any]) -> Scores:
    known = versions()
    return Scores(
        model=identity.name,
        sha256=identity.sha256,
        bytes=identity.bytes,
        bpw=identity.bpw,
        text=Named(name=text.name, sha256=text.sha256),
        n_ctx=n_ctx,
        chunks=chunks,
        versions={name: known[name] for name in VERSIONS},
        seconds=time.monotonic() - began,
        **figures,
    )


def open_or_compute(
    base: pathlib.Path, base_file: pathlib.Path | None, text: Text, settings: Settings, progress: Progress = SILENT
) -> HiddenBase:
    """The base that `evaluate` uses for `base` and `base_file`, opened once for several models."""
    if is_base_file(base):
        return open_base(base, text, settings)
    return load_or_compute_base(base, text, settings, path=base_file, progress=progress)


def _same_vocabulary(model: Identity, base: HiddenBase) -> None:
    if model.vocabulary != base.header.vocabulary or model.head.rows != base.header.n_vocab:
        raise BitladderError(
            f"{model.name} and the base {base.header.model} have different vocabularies "
            f"({model.head.rows} and {base.header.n_vocab} tokens): they cannot be compared"
        )

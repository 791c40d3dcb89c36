"""A model file and a text in, scores out."""

import contextlib
import dataclasses
import pathlib
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.engine.native import versions
from bitladder.errors import UsageError
from bitladder.evaluate.base import hidden as bases
from bitladder.evaluate.base.basefile import is_base_file
from bitladder.evaluate.base.cache import check_fits, load_or_compute_base, open_base
from bitladder.evaluate.base.hidden import HiddenBase
from bitladder.evaluate.base.logits_base import LogitsBase, check_logits, compare_logits, open_logits
from bitladder.evaluate.base.logits_file import is_logits_file
from bitladder.evaluate.base.logits_write import write_logits_file
from bitladder.evaluate.decode_chunks import cut
from bitladder.evaluate.divergence import compare
from bitladder.evaluate.figures import divergence_figures, perplexity
from bitladder.evaluate.identity import Identity, check_vocabularies, identify, unlike
from bitladder.evaluate.logit_rows import Workers
from bitladder.evaluate.perplexity import token_nll
from bitladder.evaluate.scores import BaseModelName, Named, Scores
from bitladder.evaluate.settings import Settings
from bitladder.progress import SILENT, Progress
from bitladder.text.texts import Text

VERSIONS = ("bitladder", "llama_cpp_python", "llama_cpp_commit")
Arrays = dict[str, npt.NDArray[Any]]
Reference = HiddenBase | LogitsBase


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model's scores, and what they are means of: the fields of TokenScores by name, or `nll` alone without a base.

    All arrays are [chunks × scored], in the order of the text, so that two models' can be compared pair by pair.
    """

    scores: Scores
    arrays: Arrays


def evaluate(
    model: pathlib.Path,
    text: Text,
    *,
    base: pathlib.Path | Reference | None = None,
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
    settings = Settings(
        n_ctx=n_ctx, chunks=chunks, threads=threads, gpu_layers=gpu_layers, n_batch=n_batch, n_ubatch=n_ubatch
    )
    return measure(model, text, settings, base=base, base_file=base_file, progress=progress).scores


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
    settings = Settings(
        n_ctx=n_ctx, chunks=chunks, threads=threads, gpu_layers=gpu_layers, n_batch=n_batch, n_ubatch=n_ubatch
    )
    bases.make_base(identify(model), text, out, settings, progress)


def measure(
    model: pathlib.Path | Identity,
    text: Text | None,
    settings: Settings,
    *,
    base: pathlib.Path | Reference | None = None,
    base_file: pathlib.Path | None = None,
    progress: Progress = SILENT,
) -> Measured:
    """As `evaluate`; returns the scores of each token too, for paired comparisons.

    Without a text those tokens are taken that a base of log-probabilities holds; no other base will do then.
    """
    began = time.monotonic()
    identity = model if isinstance(model, Identity) else identify(model)
    with contextlib.ExitStack() as stack:
        if isinstance(base, pathlib.Path):
            base = open_or_compute(base, base_file, text, settings, identity.path, progress)
            stack.callback(base.close)
        if isinstance(base, HiddenBase):
            check_fits(base, _needed(text), settings)
            check_vocabulary(identity, base)
        loaded = stack.enter_context(settings.load(identity.path))
        if isinstance(base, LogitsBase):
            check_logits(base, loaded, text, settings)
        if settings.n_ctx > loaded.n_ctx_train > 0:
            progress.warn(
                f"{identity.name} was trained on {loaded.n_ctx_train} tokens of context, not {settings.n_ctx}"
            )
        pieces = base.chunks.head(settings.limit(len(base.chunks))) if base else cut(loaded, _needed(text), settings)
        context = stack.enter_context(settings.context(loaded))
        workers = stack.enter_context(Workers(settings.threads))
        if base is None:
            nll = token_nll(context, pieces, workers, progress)
            arrays: Arrays = {"nll": nll}
            figures: dict[str, Any] = {"ppl": perplexity(nll), "tokens_scored": len(nll)}
        else:
            run = compare_logits if isinstance(base, LogitsBase) else compare
            tokens = run(context, base, len(pieces), workers, progress)  # type: ignore[arg-type]
            arrays = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
            figures = {**divergence_figures(tokens), "base": reference_name(base)}
    return Measured(_scores(identity, text, settings.n_ctx, len(pieces), began, figures), arrays)


def measure_and_keep(
    model: pathlib.Path, text: Text, out: pathlib.Path, settings: Settings, progress: Progress = SILENT
) -> Scores:
    """Perplexity of a model whose log-probabilities are written to `out` for llama-perplexity and others.

    Raises BitladderError as `write_logits_file`.
    """
    began = time.monotonic()
    nll = write_logits_file(model, text, out, settings, progress)
    figures = {"ppl": perplexity(nll), "tokens_scored": len(nll)}
    scored = settings.n_ctx - 1 - settings.n_ctx // 2
    return _scores(identify(model), text, settings.n_ctx, len(nll) // scored, began, figures)


def _needed(text: Text | None) -> Text:
    if text is None:
        raise UsageError("name a text to measure on (-f)")
    return text


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


def _scores(
    identity: Identity, text: Text | None, n_ctx: int, chunks: int, began: float, figures: dict[str, Any]
) -> Scores:
    return Scores(
        **identity_fields(identity),
        text=Named(name=text.name, sha256=text.sha256) if text else None,
        n_ctx=n_ctx,
        chunks=chunks,
        seconds=time.monotonic() - began,
        **figures,
    )


def identity_fields(identity: Identity) -> dict[str, Any]:
    """The fields of Scores that are known of a model before anything is measured."""
    known = versions()
    return {
        "model": identity.name,
        "sha256": identity.sha256,
        "bytes": identity.bytes,
        "bpw": identity.bpw,
        "versions": {name: known[name] for name in VERSIONS},
    }


def open_or_compute(
    base: pathlib.Path,
    base_file: pathlib.Path | None,
    text: Text | None,
    settings: Settings,
    model: pathlib.Path,
    progress: Progress = SILENT,
) -> Reference:
    """The base that `evaluate` uses for `base` and `base_file`, opened once for several models.

    `base` may be a model, a base file or llama-perplexity's file of log-probabilities; `model` is one of those to be
    compared with it: its vocabulary must be a base model's, and its tokenizer checks the last kind.
    """
    if is_logits_file(base):
        return open_logits(base, text, settings, model)
    if is_base_file(base):
        return open_base(base, _needed(text), settings)
    check_vocabularies(model, base)  # before the base is computed, which takes a while
    return load_or_compute_base(base, _needed(text), settings, path=base_file, progress=progress)


def reference_name(base: Reference) -> BaseModelName:
    """What a model was compared with; a file of log-probabilities does not name its model, so it stands for it."""
    if isinstance(base, LogitsBase):
        return BaseModelName(model=base.name, sha256=base.digest)
    return BaseModelName(model=base.header.model, sha256=base.header.model_sha256)


def check_vocabulary(model: Identity, base: HiddenBase) -> None:
    """Raise BitladderError if a model's vocabulary is not the base's."""
    if model.vocabulary != base.header.vocabulary or model.head.rows != base.header.n_vocab:
        raise unlike(model.name, model.head.rows, base.header.model, base.header.n_vocab)

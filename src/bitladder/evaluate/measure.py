"""Measures one model file over a text."""

import contextlib
import dataclasses
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.engine import versions
from bitladder.errors import UsageError
from bitladder.evaluate.base import hidden
from bitladder.evaluate.base.basefile import is_base_file
from bitladder.evaluate.base.cache import check_fits, load_or_compute_base, open_base
from bitladder.evaluate.base.hidden import BASE, HiddenBase
from bitladder.evaluate.base.logits_base import LogitsBase, check_logits, compare_logits, open_logits
from bitladder.evaluate.base.logits_file import is_logits_file, write_logits_file
from bitladder.evaluate.divergence import compare_with_base, refuse_alike, token_nll
from bitladder.evaluate.figures import divergence_figures, perplexity
from bitladder.evaluate.identity import Identity, check_vocabularies, identify, unlike
from bitladder.evaluate.logit_rows import Workers
from bitladder.evaluate.measure_options import MeasureOptions
from bitladder.evaluate.scores import BaseModelName, NamedFile, Scores
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress
from bitladder.text import Text, text_chunks

MEASURE = Algorithm(
    "measure",
    (
        "perplexity and divergence as llama-perplexity defines them",
        "the scores of each token are kept, so that two models are compared token by token",
        "figures of time are left out, so that the same scores are the same file",
    ),
    uses=(BASE,),
)

VERSIONS = ("bitladder", "llama_cpp_python", "llama_cpp_commit")
Arrays = dict[str, npt.NDArray[Any]]
Reference = HiddenBase | LogitsBase


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A model's scores, and the scores of each token that they are means of.

    `arrays` has the fields of `TokenScores` by name, or "nll" alone if there was no base. Each array is
    [chunks × scored], in the order of the text, so that two models can be compared token by token.
    """

    scores: Scores
    arrays: Arrays


def evaluate(
    model: pathlib.Path,
    text: Text,
    settings: MeasureOptions | None = None,
    *,
    base: pathlib.Path | Reference | None = None,
    base_file: pathlib.Path | None = None,
    progress: Progress = SILENT,
) -> Scores:
    """Measures the perplexity of a model over a text and, with a base, its divergence from the full-precision model.

    Parameters:
        model: path of the GGUF to measure.
        text: the text to measure on.
        settings: how to decode, and how many chunks; None takes the defaults.
        base: the full-precision GGUF, a base file, or an open base. The predictions of a GGUF are computed once and
            kept in `base_file`.
        base_file: where the base's predictions are kept; None is a file beside the base.
        progress: receives the progress.

    Raises:
        BitladderError: a file is missing or not a model, the text is too short, or a base or vocabulary does not fit.
    """
    return measure(model, text, settings or MeasureOptions(), base=base, base_file=base_file, progress=progress).scores


def make_base(
    model: pathlib.Path,
    text: Text,
    out: pathlib.Path,
    settings: MeasureOptions | None = None,
    progress: Progress = SILENT,
) -> None:
    """Runs the full-precision model over a text and writes its predictions to the base file `out`.

    Raises:
        BitladderError: as `base.hidden.make_base`.
    """
    hidden.make_base(identify(model), text, out, settings or MeasureOptions(), progress)


@MEASURE.entry
def measure(
    model: pathlib.Path | Identity,
    text: Text | None,
    settings: MeasureOptions,
    *,
    base: pathlib.Path | Reference | None = None,
    base_file: pathlib.Path | None = None,
    progress: Progress = SILENT,
) -> Measurement:
    """Measures as `evaluate`, and returns the scores of each token too.

    Without a text the tokens are those of a base of log-probabilities. No other base has tokens of its own.

    Raises:
        UsageError: there is neither a text nor such a base.
        BitladderError: as `evaluate`.
    """
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
        if base:
            chunks = base.chunks.head(settings.limit(len(base.chunks)))
        else:
            chunks = text_chunks(loaded, _needed(text), settings.n_ctx, chunks=settings.chunks)
        context = stack.enter_context(settings.context(loaded))
        workers = stack.enter_context(Workers(settings.threads))
        if base is None:
            nll = token_nll(context, chunks, workers, progress)
            arrays: Arrays = {"nll": nll}
            figures: dict[str, Any] = {"ppl": perplexity(nll), "tokens_scored": len(nll)}
        else:
            run = compare_logits if isinstance(base, LogitsBase) else compare_with_base
            tokens = run(context, base, len(chunks), workers, progress)  # type: ignore[arg-type]
            arrays = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
            figures = {**divergence_figures(tokens), "base": reference_name(base)}
        refuse_alike(arrays["nll"], identity.name)
    return Measurement(_scores(identity, text, settings.n_ctx, len(chunks), figures), arrays)


def measure_and_keep(
    model: pathlib.Path, text: Text, out: pathlib.Path, settings: MeasureOptions, progress: Progress = SILENT
) -> Scores:
    """Measures the perplexity of a model and writes its log-probabilities to `out`, for llama-perplexity and others.

    Raises:
        BitladderError: as `write_logits_file`.
    """
    nll = write_logits_file(model, text, out, settings, progress)
    figures = {"ppl": perplexity(nll), "tokens_scored": len(nll)}
    scored = settings.n_ctx - 1 - settings.n_ctx // 2
    return _scores(identify(model), text, settings.n_ctx, len(nll) // scored, figures)


def _needed(text: Text | None) -> Text:
    if text is None:
        raise UsageError("name a text to measure on (-f)")
    return text


@MEASURE.entry
def base_scores(base: HiddenBase, text: Text, settings: MeasureOptions) -> Scores:
    """The perplexity of the full-precision model, from its base. Nothing is decoded.

    Raises:
        BitladderError: the base was made of another text or with other settings.
    """
    check_fits(base, text, settings)
    count = settings.limit(len(base.chunks))
    nll = np.concatenate([base.rows(chunk).nll for chunk in range(count)])
    figures = {"ppl": perplexity(nll), "tokens_scored": len(nll)}
    return _scores(base.model, text, settings.n_ctx, count, figures)


def _scores(identity: Identity, text: Text | None, n_ctx: int, chunks: int, figures: dict[str, Any]) -> Scores:
    return Scores(
        **identity_fields(identity),
        text=NamedFile(name=text.name, sha256=text.sha256) if text else None,
        n_ctx=n_ctx,
        chunks=chunks,
        **figures,
    )


def identity_fields(identity: Identity) -> dict[str, Any]:
    """The fields of `Scores` that are known before anything is measured."""
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
    settings: MeasureOptions,
    model: pathlib.Path,
    progress: Progress = SILENT,
) -> Reference:
    """Opens the base that `evaluate` uses, once for several models.

    Parameters:
        base: a full-precision model, a base file, or llama-perplexity's file of log-probabilities.
        base_file: where the predictions of a model are kept; None is a file beside the model.
        text: the text to measure on; None is possible with a file of log-probabilities.
        settings: how to decode, and how many chunks.
        model: one of the models to compare. Its vocabulary must be the base's. Its tokenizer checks the text against a
            file of log-probabilities.
        progress: receives the progress.

    Raises:
        UsageError: a text is needed and there is none.
        BitladderError: the base cannot be read or does not fit.
    """
    if is_logits_file(base):
        return open_logits(base, text, settings, model)
    if is_base_file(base):
        return open_base(base, _needed(text), settings)
    check_vocabularies(model, base)  # before the base is computed, which can take long
    return load_or_compute_base(base, _needed(text), settings, path=base_file, progress=progress)


def reference_name(base: Reference) -> BaseModelName:
    """What a model was compared with. A file of log-probabilities does not name its model, so its own name is used."""
    if isinstance(base, LogitsBase):
        return BaseModelName(model=base.name, sha256=base.digest)
    return BaseModelName(model=base.header.model, sha256=base.header.model_sha256)


def check_vocabulary(model: Identity, base: HiddenBase) -> None:
    """Raises BitladderError if a model's vocabulary is not the base's."""
    if model.vocabulary != base.header.vocabulary or model.head.rows != base.header.n_vocab:
        raise unlike(model.name, model.head.rows, base.header.model, base.header.n_vocab)

"""Measures one model file over a text, and puts together what was measured over several."""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.engine import Lanes, Model, versions
from bitladder.errors import BitladderError, UsageError
from bitladder.evaluate.base import hidden
from bitladder.evaluate.base.basefile import is_base_file
from bitladder.evaluate.base.cache import check_fits, load_or_compute_base, open_base
from bitladder.evaluate.base.hidden import BASE, HiddenBase
from bitladder.evaluate.base.logits_base import LogitsBase, check_logits, compare_logits, open_logits
from bitladder.evaluate.base.logits_file import is_logits_file, write_logits_file
from bitladder.evaluate.divergence import refuse_alike
from bitladder.evaluate.identity import (
    Identity,
    MeasureOptions,
    NoResults,
    Results,
    check_vocabularies,
    identify,
    unlike,
)
from bitladder.evaluate.scores import BaseModelName, NamedFile, Scores, TextScores
from bitladder.evaluate.token_scores import (
    TokenScores,
    compare_with_base,
    divergence_figures,
    likelihood_figures,
    token_nll,
)
from bitladder.files import sha256_bytes
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress
from bitladder.text import Chunks, Text, text_chunks

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
    [chunks × scored], in the order of the texts, so that two models can be compared token by token. Where only answers
    are scored, it is shorter, and "chunk" has the number of the chunk of each token.
    """

    scores: Scores
    arrays: Arrays

    @property
    def by_text(self) -> list[tuple[TextScores, Arrays]]:
        """The figures and the arrays of each text."""
        texts = self.scores.texts or (self.scores,)
        ends = np.cumsum([text.tokens_scored or 0 for text in texts])
        split = {name: np.split(values, ends[:-1]) for name, values in self.arrays.items()}
        return [(text, {name: parts[place] for name, parts in split.items()}) for place, text in enumerate(texts)]


def token_scores(arrays: Arrays) -> TokenScores:
    """The arrays of a measurement against a base, in the class that has them."""
    return TokenScores(**{field.name: arrays[field.name] for field in dataclasses.fields(TokenScores)})


def counted(arrays: Arrays, chunks: Chunks, name: str) -> Arrays:
    """The values of the tokens that count, where only answers are scored.

    Parameters:
        arrays: values of all scored tokens by name, each [chunks × scored].
        chunks: the chunks, which know the answers.
        name: the text, for the error.

    Raises:
        BitladderError: no token of an answer is scored.
    """
    if chunks.answers is None:
        return arrays
    flags = chunks.counted
    if not flags.any():
        raise BitladderError(f"{name}: no answer lies in the second half of a chunk, which is what is scored")
    kept = {key: values[flags.ravel()] for key, values in arrays.items()}
    return {**kept, "chunk": np.nonzero(flags)[0].astype(np.int32)}


def over_texts(measured: Sequence[Measurement]) -> Measurement:
    """What was measured of a model on several texts, as one: figures on each, and means in which each counts alike.

    Parameters:
        measured: a measurement on each text. The only one of a single text stays as it is.
    """
    if len(measured) == 1:
        return measured[0]
    parts, scores = [text.arrays for text in measured], [text.scores for text in measured]
    names = [text.text for text in scores if text.text]
    if all("kld" in arrays for arrays in parts):
        figures = divergence_figures(*map(token_scores, parts))
    else:
        figures = likelihood_figures(*(arrays["nll"] for arrays in parts))
    together = scores[0].model_copy(
        update={
            **figures,
            "text": NamedFile(
                name=" + ".join(text.name for text in names),
                sha256=sha256_bytes("".join(text.sha256 for text in names).encode()),
            ),
            "chunks": sum(text.chunks or 0 for text in scores),
            "texts": tuple(
                TextScores(**{name: getattr(text, name) for name in TextScores.model_fields}) for text in scores
            ),
        }
    )
    return Measurement(together, {name: np.concatenate([arrays[name] for arrays in parts]) for name in parts[0]})


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
    model: pathlib.Path | Identity,
    text: Text,
    out: pathlib.Path,
    settings: MeasureOptions | None = None,
    progress: Progress = SILENT,
) -> None:
    """Runs the full-precision model over a text and writes its predictions to the base file `out`.

    Raises:
        BitladderError: as `base.hidden.make_base`.
    """
    identity = model if isinstance(model, Identity) else identify(model)
    hidden.make_base(identity, text, out, settings or MeasureOptions(), progress)


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
        if base is None or (text is not None and text.answers is not None):
            cut = text_chunks(loaded, _needed(text), settings.n_ctx, chunks=settings.chunks, unscored=settings.unscored)
            chunks = dataclasses.replace(chunks, answers=cut.answers) if base else cut
        lanes = stack.enter_context(Lanes(loaded, settings))
        if base is None:
            arrays: Arrays = {"nll": token_nll(lanes, chunks, progress)}
        else:
            run = compare_logits if isinstance(base, LogitsBase) else compare_with_base
            tokens = run(lanes, base, len(chunks), progress)  # type: ignore[arg-type]
            arrays = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
        refuse_alike(arrays["nll"], identity.name)
        arrays = counted(arrays, chunks, text.name if text else "")
        figures = likelihood_figures(arrays["nll"]) if base is None else divergence_figures(token_scores(arrays))
        if base is not None:
            figures["base"] = reference_name(base)
    return Measurement(_scores(identity, text, settings.n_ctx, len(chunks), figures), arrays)


def measure_and_keep(
    model: pathlib.Path, text: Text, out: pathlib.Path, settings: MeasureOptions, progress: Progress = SILENT
) -> Scores:
    """Measures the perplexity of a model and writes its log-probabilities to `out`, for llama-perplexity and others.

    Raises:
        BitladderError: as `write_logits_file`.
    """
    nll = write_logits_file(model, text, out, settings, progress)
    scored = settings.n_ctx - 1 - settings.n_ctx // 2
    return _scores(identify(model), text, settings.n_ctx, len(nll) // scored, likelihood_figures(nll))


def _needed(text: Text | None) -> Text:
    if text is None:
        raise UsageError("name a text to measure on (-f)")
    return text


@MEASURE.entry
def measure_base(base: HiddenBase, text: Text, settings: MeasureOptions) -> Measurement:
    """The perplexity of the full-precision model, from its base. Nothing is decoded.

    Raises:
        BitladderError: the base was made of another text or with other settings.
    """
    check_fits(base, text, settings)
    count = settings.limit(len(base.chunks))
    arrays: Arrays = {"nll": np.concatenate([base.rows(chunk).nll for chunk in range(count)])}
    if text.answers is not None:
        with Model(base.model.path, vocab_only=True) as vocabulary:
            chunks = text_chunks(vocabulary, text, settings.n_ctx, chunks=settings.chunks, unscored=settings.unscored)
        arrays = counted(arrays, chunks, text.name)
    scores = _scores(base.model, text, settings.n_ctx, count, likelihood_figures(arrays["nll"]))
    return Measurement(scores, arrays)


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


@contextlib.contextmanager
def opened_bases(
    base: pathlib.Path,
    base_file: pathlib.Path | None,
    texts: Sequence[Text],
    settings: MeasureOptions,
    model: pathlib.Path,
    *,
    results: Results | None,
    progress: Progress = SILENT,
) -> Iterator[tuple[Reference, ...]]:
    """The base of each text, for several models; without a text that of a file of log-probabilities.

    Parameters:
        base, base_file, settings, model, progress: as for `open_or_compute`.
        texts: the texts to measure on.
        results: where results are kept. If they are not, predictions that are computed are not kept either, unless
            `base_file` names a place.

    Raises:
        UsageError, BitladderError: as `open_or_compute`.
    """
    with contextlib.ExitStack() as stack:
        bases: list[Reference] = []
        for number, text in enumerate(texts or [None]):
            place = base_file
            if place is None and (results is None or isinstance(results, NoResults)):
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bitladder-"))
                place = pathlib.Path(folder) / f"{number}.base"
            bases.append(open_or_compute(base, place, text, settings, model, progress))
            stack.callback(bases[-1].close)
        yield tuple(bases)


def reference_name(base: Reference) -> BaseModelName:
    """What a model was compared with. A file of log-probabilities does not name its model, so its own name is used."""
    if isinstance(base, LogitsBase):
        return BaseModelName(model=base.name, sha256=base.digest)
    return BaseModelName(model=base.header.model, sha256=base.header.model_sha256)


def check_vocabulary(model: Identity, base: HiddenBase) -> None:
    """Raises BitladderError if a model's vocabulary is not the base's."""
    if model.vocabulary != base.header.vocabulary or model.head.rows != base.header.n_vocab:
        raise unlike(model.name, model.head.rows, base.header.model, base.header.n_vocab)

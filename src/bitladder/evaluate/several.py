"""Measures several models over texts and any tasks. What was measured before is read from the kept results."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from bitladder.engine import Model, begin_check, kernels, library
from bitladder.errors import UsageError
from bitladder.evaluate.base.basefile import is_base_file
from bitladder.evaluate.base.hidden import HiddenBase
from bitladder.evaluate.base.logits_file import LogitsFile
from bitladder.evaluate.identity import Arrays, Identity, MeasureOptions, NoResults, Results, identify
from bitladder.evaluate.measure import (
    MEASURE,
    Measurement,
    Reference,
    check_vocabulary,
    identity_fields,
    measure,
    measure_and_keep,
    opened_bases,
    over_texts,
    reference_name,
)
from bitladder.evaluate.noise import NOISE, noise_floor
from bitladder.evaluate.paired import with_pair
from bitladder.evaluate.scores import Noise, Scores, TaskScore
from bitladder.evaluate.tasks.answer import TASKS, score_task
from bitladder.evaluate.tasks.load import load_task, parse_specs
from bitladder.evaluate.tasks.task import QuestionSet, average_of_five
from bitladder.files import sha256_bytes
from bitladder.keys import Algorithm
from bitladder.options import Options, option
from bitladder.progress import SILENT, Progress
from bitladder.text import Text, answers_option, load_texts

M = TypeVar("M", bound=pydantic.BaseModel)
TEXT = "pydoc:test"
TEXT_CTX, TASK_CTX = 512, 768


@dataclasses.dataclass(frozen=True)
class EvalOptions(Options):
    """What `bitladder eval` measures of each model, and against which base."""

    base: pathlib.Path | None = option(
        None,
        "--base",
        metavar="FILE",
        help="The full-precision GGUF to compare with (its predictions are kept), or a file of its predictions.",
    )
    base_file: pathlib.Path | None = option(
        None,
        "--base-file",
        decides=False,
        writes="base",
        metavar="FILE",
        help="Where the base's predictions are kept.",
        unset="beside the base",
    )
    logits: pathlib.Path | None = option(
        None,
        "--kl-divergence-base",
        writes=lambda values: None if values["read_logits"] else "logits",
        metavar="FILE",
        help="Log-probabilities in llama-perplexity's format: written from the model, or read with --kl-divergence.",
    )
    read_logits: bool = option(False, "--kl-divergence", help="Compare with --kl-divergence-base.")
    texts: tuple[str, ...] = option(
        (),
        "-f",
        "--file",
        metavar="TEXT",
        names="text",
        help="Text to measure on: a file, or a built-in text (pydoc:test, pydoc:calibration).",
        unset=f"{TEXT}; no text if only --tasks is used",
    )
    assistant_only: bool = answers_option()
    tasks: str | None = option(
        None,
        "--tasks",
        metavar="NAME[:FILE],…",
        names="tasks",
        help="Benchmarks by name (without FILE: from the hub), and continuation:TEXT. `bitladder tasks` lists them.",
    )
    task_count: int | None = option(
        None, "--task-count", least=1, metavar="N", help="Questions of each task, drawn at random.", unset="all"
    )
    n_ctx: int | None = option(
        None,
        "-c",
        "--ctx-size",
        least=4,
        metavar="TOKENS",
        help="Tokens of context.",
        unset=f"{TEXT_CTX} for a chunk of text, {TASK_CTX} for tasks",
    )
    noise_chunks: int = option(
        2, "--noise-chunks", least=0, metavar="N", help="Chunks for the noise floor of KLD (0: none)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read_logits and (self.base or not self.logits):
            raise UsageError("--kl-divergence compares with --kl-divergence-base FILE; leave --base out")
        if self.writes_logits and (self.base or self.tasks):
            raise UsageError(
                "--kl-divergence-base without --kl-divergence writes the file from one full-precision model: leave "
                "--base and --tasks out"
            )
        if self.writes_logits and self.assistant_only:
            raise UsageError("--kl-divergence-base has all tokens of a text; leave --assistant-only out")

        if len(self.texts) > 1 and (self.logits or self.base_file):
            flag = "--kl-divergence-base" if self.logits else "--base-file"
            raise UsageError(f"{flag} names a file of one text; name one text (-f), or leave {flag} out")

    @property
    def writes_logits(self) -> bool:
        """Whether a file of log-probabilities is written."""
        return self.logits is not None and not self.read_logits


def evaluate_files(
    models: Sequence[pathlib.Path],
    options: EvalOptions,
    settings: MeasureOptions,
    *,
    results: Results | None = None,
    progress: Progress = SILENT,
) -> list[Scores]:
    """Measures model files as `bitladder eval` does.

    Parameters:
        models: the files to measure.
        options: what to measure, and against which base.
        settings: how to decode, and how many chunks; the context is that of `options`.
        results: where results are kept; None keeps nothing, and no predictions of the base either.
        progress: receives the progress.

    Returns:
        The scores of each model. All but the first have the paired difference from the first.

    Raises:
        UsageError: options do not fit together.
        BitladderError: as `evaluate`, or a task cannot be read.
    """
    if options.writes_logits and len(models) > 1:
        raise UsageError("--kl-divergence-base without --kl-divergence writes the file from one full-precision model")
    tasks = tuple(load_task(spec) for spec in parse_specs(options.tasks)) if options.tasks else ()
    specs = options.texts
    if not specs and not options.read_logits and (options.base or not tasks):
        specs = (TEXT,)
    if options.assistant_only and not specs:
        raise UsageError("--assistant-only needs conversations: name them with -f")
    rendering = options.base if options.base and not is_base_file(options.base) else models[0]
    texts = load_texts(specs, rendering, assistant_only=options.assistant_only)
    n_ctx = options.n_ctx
    if n_ctx is None and options.logits and options.read_logits:
        with LogitsFile(options.logits) as file:
            n_ctx = file.layout.n_ctx
    settings = settings.replace(n_ctx=TEXT_CTX if n_ctx is None else n_ctx)
    if options.logits and options.writes_logits:
        return [measure_and_keep(models[0], texts[0], options.logits, settings, progress)]
    with contextlib.ExitStack() as stack:
        bases: tuple[Reference, ...] = ()
        if reference := options.logits or options.base:
            opened = opened_bases(
                reference, options.base_file, texts, settings, models[0], results=results, progress=progress
            )
            bases = stack.enter_context(opened)
        request = EvalRequest(
            texts=tuple(texts),
            settings=settings,
            bases=bases,
            tasks=tasks,
            task_settings=settings.replace(n_ctx=TASK_CTX if options.n_ctx is None else options.n_ctx, chunks=None),
            task_count=options.task_count,
            noise_chunks=options.noise_chunks,
        )
        return evaluate_several(models, request, results=results, progress=progress)


@dataclasses.dataclass(frozen=True)
class EvalRequest:
    """What to measure of each model.

    Parameters:
        texts: the texts to measure on, which count alike. Without one no perplexity is measured, except on the tokens
            of a file of log-probabilities.
        settings: how to decode a text, and how many chunks.
        bases: the full-precision model's predictions on each text; without them no divergence is measured.
        tasks: the tasks to score.
        task_settings: how to decode tasks.
        task_count: questions of each task; None asks all.
        noise_chunks: chunks of the first base for the noise floor; 0 measures none.
    """

    texts: tuple[Text, ...]
    settings: MeasureOptions
    bases: tuple[Reference, ...] = ()
    tasks: tuple[QuestionSet, ...] = ()
    task_settings: MeasureOptions = dataclasses.field(default_factory=lambda: MeasureOptions(n_ctx=TASK_CTX))
    task_count: int | None = None
    noise_chunks: int = 0

    @property
    def parts(self) -> list[tuple[Text | None, Reference | None]]:
        """Each text with its base. The tokens of a file of log-probabilities stand for a text."""
        texts: Sequence[Text | None] = self.texts or [None] * len(self.bases)
        return list(zip(texts, self.bases or [None] * len(texts), strict=True))


def evaluate_several(
    models: Sequence[pathlib.Path], request: EvalRequest, *, results: Results | None = None, progress: Progress = SILENT
) -> list[Scores]:
    """Measures several models. All but the first have the paired difference from the first.

    Parameters:
        models: the files to measure.
        request: what to measure.
        results: where results are kept; None keeps nothing.
        progress: receives the progress.

    Raises:
        BitladderError: as `measure` and `tasks.score_task`.
    """
    first, *others = measure_several(models, request, results=results, progress=progress)
    return [first.scores, *(with_pair(model, first) for model in others)]


def measure_several(
    models: Sequence[pathlib.Path], request: EvalRequest, *, results: Results | None = None, progress: Progress = SILENT
) -> list[Measurement]:
    """Measures as `evaluate_several`, and returns the scores of each token too, so that any two can be compared."""
    results = results or NoResults()
    begin_check()  # it goes on while files are hashed and texts read into tokens
    identities = [identify(model) for model in models]
    first = request.bases[0] if request.bases else None
    noise = None
    if isinstance(first, HiddenBase):
        for identity in identities:  # all of them before the first is measured
            check_vocabulary(identity, first)
        if request.noise_chunks:
            noise = _noise(first, request, results, progress)
    measured = [_measure(identity, request, results, progress) for identity in identities]
    return [dataclasses.replace(model, scores=model.scores.model_copy(update={"noise": noise})) for model in measured]


def _measure(identity: Identity, request: EvalRequest, results: Results, progress: Progress) -> Measurement:
    if request.parts:
        parts = [_measure_text(identity, *part, request.settings, results, progress) for part in request.parts]
        measured = over_texts(parts)
    else:
        measured = Measurement(Scores(**identity_fields(identity)), {})
    tasks = _measure_tasks(identity, request, results, progress)
    scores = measured.scores.model_copy(update=task_fields(tasks))
    return Measurement(scores, measured.arrays)


def _measure_text(
    identity: Identity,
    text: Text | None,
    base: Reference | None,
    settings: MeasureOptions,
    results: Results,
    progress: Progress,
) -> Measurement:
    names: dict[str, Any] = {"model": identity.name}  # the same content can have another name by now
    inputs = _inputs(MEASURE, identity.sha256, settings)
    if text:
        inputs["text"] = text.sha256
        if text.answers is not None:
            inputs["answers"] = sha256_bytes(repr(text.answers).encode())
        names["text"] = {"name": text.name, "sha256": text.sha256}
    if base:
        reference = reference_name(base)
        inputs["base"] = reference.sha256
        if isinstance(base, HiddenBase):
            inputs["base"] = {**base.header.inputs, "gpu": base.header.gpu}
        names["base"] = reference.model_dump()
    if (kept := _kept(results, inputs, Scores, names)) is not None:
        scores, arrays = kept
        if all(values.shape == (scores.tokens_scored,) for values in arrays.values()) and "nll" in arrays:
            return Measurement(scores, arrays)
    measured = measure(identity, text, settings, base=base, progress=progress)
    results.put(inputs, measured.scores.to_json(), measured.arrays)
    return measured


def _measure_tasks(
    identity: Identity, request: EvalRequest, results: Results, progress: Progress
) -> dict[str, TaskScore]:
    settings = request.task_settings
    scores: dict[str, TaskScore] = {}
    with contextlib.ExitStack() as stack:
        model: Model | None = None
        for task in request.tasks:
            inputs = _inputs(TASKS, identity.sha256, settings)
            inputs |= {"task": task.name, "source": task.sha256, "count": request.task_count}
            if (kept := _kept(results, inputs, TaskScore, {"source": task.source})) is not None:
                scores[task.name] = kept[0]
                continue
            model = model or stack.enter_context(settings.load(identity.path))
            score = score_task(model, task, settings, count=request.task_count, progress=progress).to_score()
            results.put(inputs, score.model_dump(mode="json"), {})
            scores[task.name] = score
    return scores


def add_tasks(
    scores: Scores,
    model: pathlib.Path,
    tasks: Sequence[QuestionSet],
    settings: MeasureOptions,
    *,
    count: int | None = None,
    progress: Progress = SILENT,
) -> Scores:
    """A model's scores with those of some tasks.

    Parameters:
        scores: what was measured of the model before.
        model: path of the model.
        tasks: the tasks to score.
        settings: how to decode.
        count: questions of each task; None asks all.
        progress: receives the progress.

    Raises:
        BitladderError: as `tasks.score_task`.
    """
    with settings.load(model) as loaded:
        by_name = {
            task.name: score_task(loaded, task, settings, count=count, progress=progress).to_score() for task in tasks
        }
    return scores.model_copy(update=task_fields(by_name))


def _noise(base: HiddenBase, request: EvalRequest, results: Results, progress: Progress) -> Noise:
    inputs = _inputs(NOISE, base.header.model_sha256, request.settings.replace(chunks=request.noise_chunks))
    inputs["text"] = base.header.text_sha256
    if (kept := _kept(results, inputs, Noise)) is not None:
        return kept[0]
    noise = noise_floor(base, request.noise_chunks, request.settings, progress)
    results.put(inputs, noise.model_dump(mode="json"), {})
    return noise


def _kept(
    results: Results, inputs: Mapping[str, Any], kind: type[M], named: Mapping[str, Any] | None = None
) -> tuple[M, Arrays] | None:
    """A kept result with other names; None if there is none, or not in this form: then it is measured again."""
    result = results.get(inputs)
    if result is None or not isinstance(result[0], dict):
        return None
    try:
        return kind.model_validate(result[0] | dict(named or {})), result[1]
    except pydantic.ValidationError:
        return None


def _inputs(algorithm: Algorithm, model_sha256: str, settings: MeasureOptions) -> dict[str, Any]:
    """What decides a result of any kind. Batch sizes and kernels show in the last digits, threads do not."""
    return {
        "algorithms": algorithm.versions(),
        "kind": algorithm.name,
        "library": library(),
        "model": model_sha256,
        "settings": settings,
        "n_batch": settings.n_batch,
        "n_ubatch": settings.n_ubatch,
        "kernels": kernels(),
    }


def task_fields(tasks: dict[str, TaskScore]) -> dict[str, Any]:
    """The fields of `Scores` for tasks. Their average is there if all five benchmarks are."""
    average = average_of_five({name: score.accuracy for name, score in tasks.items()})
    if average is None:
        return {"tasks": tasks}
    return {"tasks": tasks, "tasks_average": average.value, "tasks_average_error": average.error}

"""Several models, one text, any number of tasks: each measured unless its result is known, then compared in pairs."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from bitladder.engine.devices import kernels
from bitladder.engine.model import Model
from bitladder.engine.native import versions
from bitladder.evaluate.base.hidden import HiddenBase
from bitladder.evaluate.identity import Identity, identify
from bitladder.evaluate.measure import (
    Measured,
    Reference,
    check_vocabulary,
    identity_fields,
    measure,
    reference_name,
)
from bitladder.evaluate.noise import noise_floor
from bitladder.evaluate.paired import average, paired_mean, paired_perplexity, paired_task, unit
from bitladder.evaluate.results_cache import NoResults, Results
from bitladder.evaluate.scores import Noise, Paired, Scores, TaskScore
from bitladder.evaluate.settings import Settings
from bitladder.evaluate.tasks import FIVE, Task, score_task
from bitladder.progress import SILENT, Progress
from bitladder.text.texts import Text

# Raise one when its code would give other figures from the same inputs.
CODE = {"text": 1, "tasks": 1, "noise": 3}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to measure of each model.

    `text` with `settings` (None: no perplexity, unless `base` holds tokens of its own); `base` the full-precision
    model's predictions, if any; `tasks` with `task_settings`, at most `task_count` questions of each (None: all);
    `noise_chunks` of the base for the noise floor (0: none).
    """

    text: Text | None
    settings: Settings
    base: Reference | None = None
    tasks: tuple[Task, ...] = ()
    task_settings: Settings = dataclasses.field(default_factory=lambda: Settings(n_ctx=768))
    task_count: int | None = None
    noise_chunks: int = 0


def evaluate_several(
    models: list[pathlib.Path], wanted: Wanted, *, results: Results | None = None, progress: Progress = SILENT
) -> list[Scores]:
    """Scores of each model, in order; all but the first carry the paired difference from the first.

    What `results` has is not measured again. Raises BitladderError as `measure` and `tasks.score_task`.
    """
    found: list[Scores] = []
    measured = measure_several(models, wanted, results=results, progress=progress)
    for index, one in enumerate(measured):
        found.append(one.scores.model_copy(update={"paired": compare_pair(one, measured[0]) if index else None}))
    return found


def measure_several(
    models: list[pathlib.Path], wanted: Wanted, *, results: Results | None = None, progress: Progress = SILENT
) -> list[Measured]:
    """As `evaluate_several`, with what the figures are means of, so that any two can be compared (`compare_pair`)."""
    results = results or NoResults()
    identities = [identify(model) for model in models]
    if isinstance(wanted.base, HiddenBase):
        for identity in identities:  # all of them before the first is measured
            check_vocabulary(identity, wanted.base)
    noise = None
    if isinstance(wanted.base, HiddenBase) and wanted.noise_chunks:
        noise = _noise(wanted.base, wanted, results, progress)
    measured = [_measure(identity, wanted, results, progress) for identity in identities]
    return [dataclasses.replace(one, scores=one.scores.model_copy(update={"noise": noise})) for one in measured]


def _measure(identity: Identity, wanted: Wanted, results: Results, progress: Progress) -> Measured:
    began = time.monotonic()
    if wanted.text is not None or wanted.base is not None:
        measured = _measure_text(identity, wanted, results, progress)
    else:
        measured = Measured(Scores(**identity_fields(identity), seconds=0), {})
    tasks = _measure_tasks(identity, wanted, results, progress)
    update: dict[str, Any] = {"seconds": time.monotonic() - began}
    if tasks:
        update |= {"tasks": tasks, **tasks_average(tasks)}
    return Measured(measured.scores.model_copy(update=update), measured.arrays)


def _measure_text(identity: Identity, wanted: Wanted, results: Results, progress: Progress) -> Measured:
    base, text = wanted.base, wanted.text
    key = {
        **_key("text", identity.sha256, wanted.settings),
        "text": text.sha256 if text else None,
        "chunks": wanted.settings.chunks,
        "base": [type(base).__name__, reference_name(base).sha256] if base else None,
    }
    if (kept := results.get(key)) is not None:
        # The same content may have another name by now.
        names: dict[str, Any] = {"model": identity.name}
        if text:
            names["text"] = {"name": text.name, "sha256": text.sha256}
        if base:
            names["base"] = reference_name(base)
        return Measured(Scores.model_validate(kept[0] | names), kept[1])
    measured = measure(identity, text, wanted.settings, base=base, progress=progress)
    results.put(key, measured.scores.to_json(), measured.arrays)
    return measured


def _measure_tasks(identity: Identity, wanted: Wanted, results: Results, progress: Progress) -> dict[str, TaskScore]:
    settings, found = wanted.task_settings, {}
    with contextlib.ExitStack() as stack:
        model: Model | None = None
        for task in wanted.tasks:
            key = {
                **_key("tasks", identity.sha256, settings),
                "task": task.name,
                "source": task.sha256,
                "count": wanted.task_count,
            }
            if (kept := results.get(key)) is not None:
                found[task.name] = TaskScore.model_validate(kept[0] | {"source": task.source})
                continue
            model = model or stack.enter_context(settings.load(identity.path))
            score = score_task(model, task, wanted.task_settings, count=wanted.task_count, progress=progress).to_score()
            results.put(key, score.model_dump(mode="json"), {})
            found[task.name] = score
    return found


def add_tasks(
    scores: Scores,
    model: pathlib.Path,
    tasks: Sequence[Task],
    settings: Settings,
    *,
    count: int | None = None,
    progress: Progress = SILENT,
) -> Scores:
    """A model's scores with those of some tasks, at most `count` questions of each. Raises as `tasks.score_task`."""
    began = time.monotonic()
    with settings.load(model) as loaded:
        found = {
            task.name: score_task(loaded, task, settings, count=count, progress=progress).to_score() for task in tasks
        }
    seconds = scores.seconds + time.monotonic() - began
    return scores.model_copy(update={"tasks": found, "seconds": seconds, **tasks_average(found)})


def _noise(base: HiddenBase, wanted: Wanted, results: Results, progress: Progress) -> Noise:
    header = base.header
    key = {
        **_key("noise", header.model_sha256, wanted.settings),
        "text": header.text_sha256,
        "chunks": wanted.noise_chunks,
    }
    if (kept := results.get(key)) is not None:
        return Noise.model_validate(kept[0])
    noise = noise_floor(base, wanted.noise_chunks, wanted.settings, progress)
    results.put(key, noise.model_dump(mode="json"), {})
    return noise


def _key(kind: str, model: str, settings: Settings) -> dict[str, Any]:
    """What decides every kind of result. Batch sizes, device and kernels show in the last digits; threads do not."""
    return {
        "kind": kind,
        "code": CODE[kind],
        "library": versions()["llama_cpp_commit"],
        "model": model,
        "n_ctx": settings.n_ctx,
        "n_batch": settings.n_batch,
        "n_ubatch": settings.n_ubatch,
        "gpu": settings.gpu_layers != 0,
        "kernels": kernels(),
    }


def tasks_average(tasks: dict[str, TaskScore]) -> dict[str, float]:
    """The two fields of Scores for the mean accuracy over the five benchmarks; empty unless all five are there."""
    if not set(FIVE) <= tasks.keys():
        return {}
    figure = average([tasks[name].accuracy for name in FIVE])
    return {"tasks_average": figure.value, "tasks_average_error": figure.error}


def compare_pair(this: Measured, other: Measured) -> Paired:
    """The paired difference of two models measured alike: this less other."""
    found: dict[str, Any] = {"model": other.scores.model, "sha256": other.scores.sha256}
    mine, theirs, chunks = this.arrays, other.arrays, this.scores.chunks
    if "nll" in mine and "nll" in theirs and chunks is not None:
        found["per"] = unit(chunks)
        found["ln_ppl"] = paired_mean(mine["nll"], theirs["nll"], chunks)
        found["ppl"] = paired_perplexity(mine["nll"], theirs["nll"], chunks)
        if "kld" in mine and "kld" in theirs:
            found["kld"] = paired_mean(mine["kld"], theirs["kld"], chunks)
    answers = [{name: score.right() for name, score in (one.scores.tasks or {}).items()} for one in (this, other)]
    tasks = {}
    for name in answers[0].keys() & answers[1].keys():
        pair = paired_task(answers[0][name], answers[1][name])
        if pair is not None:
            tasks[name] = pair
    if tasks:
        found["tasks"] = tasks
    if set(FIVE) <= tasks.keys():
        found["tasks_average"] = average([tasks[name].difference for name in FIVE])
    return Paired(**found)

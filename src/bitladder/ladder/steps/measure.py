"""The step that measures one model: divergence from the base, token by token, and benchmarks."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitladder import evaluate
from bitladder.files import replacing, write_json
from bitladder.ladder import cost
from bitladder.ladder.context import BASE, Run
from bitladder.ladder.source import doubts
from bitladder.ladder.steps.step import Extent, Part, Product, Step
from bitladder.units import number_of

QUESTION = 0.5  # contexts that the choices of a question take


class Measure(Step):
    """quant, bases, texts → figures without speeds, and what each token scored."""

    verb = "measure"
    anywhere = True
    algorithms = (evaluate.MEASURE, evaluate.TASKS)

    @property
    def needs(self) -> tuple[str, ...]:
        """The model, what it is compared with, and the texts."""
        own = "convert" if self.label == BASE else f"quantize {self.label}" if self.rung else f"file {self.label}"
        return tuple(dict.fromkeys((own, *measured_with(self))))

    def decides(self) -> Mapping[str, Any]:
        """How texts and tasks are decoded, and how much of them."""
        return scoring(self)

    def parts(self, extent: Extent) -> list[Part]:
        """Every token is decoded, and every choice of a question."""
        parts = [] if self.label == BASE else [divergence(extent)]
        return parts + task_parts(self, extent)

    def make(self, run: Run) -> Product:
        """Measures the model."""
        out = run.layout.measured(self.label)
        facts: dict[str, Any] = {}
        files = [out]
        if self.label == BASE:
            pairs = zip(run.bases(), run.texts, strict=True)
            measured = evaluate.over_texts([evaluate.measure_base(*pair, run.settings()) for pair in pairs])
            scores = with_tasks(run, measured.scores, run.full)
            for text, _ in measured.by_text:
                if text.text and self.options.chunks is not None and (text.chunks or 0) < self.options.chunks:
                    run.progress.warn(
                        f"{text.text.name} has only {number_of(text.chunks or 0, 'chunk')}, fewer than --chunks "
                        f"{self.options.chunks}"
                    )
        else:
            measured = measure(run, run.model(self.label))
            scores = measured.scores
            files.append(keep_tokens(run, self.label, measured))
        write_json(out, scores.to_json())
        if self.label in run.others:
            other = run.others[self.label]
            facts["doubts"] = doubts(other, run.full, scores, self.options.decoding.threads, run.progress)
        return Product(files, facts)


def measured_with(step: Step) -> tuple[str, ...]:
    """What the measurement of any quant reads beside the quant."""
    return ("convert", "base", "text", *(("tasks",) if step.options.tasks else ()))


def scoring(step: Step) -> dict[str, Any]:
    """The options that decide figures."""
    options = step.options
    decides: dict[str, Any] = {"decoding": options.decoding, "chunks": options.chunks}
    if options.assistant_only:
        decides["assistant_only"] = True
    if options.tasks:
        decides |= {"task_count": options.task_count, "task_ctx": options.task_ctx}
    return decides


def divergence(extent: Extent) -> Part:
    """The work of comparing a quant with the base."""
    return Part("divergence", cost.comparing(extent.shape, extent.text, extent.chunk, quant=True))


def task_parts(step: Step, extent: Extent) -> list[Part]:
    """The work of each benchmark."""
    context = step.options.task_ctx
    question = cost.decoding(extent.shape, QUESTION * context, context)
    return [Part("questions", count * question, label=f"{name} with") for name, count in extent.questions.items()]


def measure(run: Run, path: pathlib.Path) -> evaluate.Measurement:
    """The divergence of a quant, token by token, and its benchmarks."""
    measured = evaluate.over_texts(
        [
            evaluate.measure(path, text, run.settings(), base=base, progress=run.progress)
            for text, base in zip(run.texts, run.bases(), strict=True)
        ]
    )
    return dataclasses.replace(measured, scores=with_tasks(run, measured.scores, path))


def with_tasks(run: Run, scores: evaluate.Scores, path: pathlib.Path) -> evaluate.Scores:
    """The scores, with those of the benchmarks if there are some."""
    if not run.tasks:
        return scores
    decoding = run.options.decoding
    settings = evaluate.MeasureOptions(
        n_ctx=run.options.task_ctx, threads=decoding.threads, gpu_layers=decoding.gpu_layers
    )
    count = run.options.task_count
    return evaluate.add_tasks(scores, path, run.tasks, settings, count=count, progress=run.progress)


def keep_tokens(run: Run, label: str, measured: evaluate.Measurement) -> pathlib.Path:
    """Writes what each token scored, so that a rung and its preset can be compared token by token."""
    path = run.layout.tokens(label)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        arrays = {key: measured.arrays[key] for key in ("nll", "kld", "chunk") if key in measured.arrays}
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    return path

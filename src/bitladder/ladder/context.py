"""What the steps of a run share: options, paths, texts, the records of earlier steps, and what stays open."""

import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bitladder import evaluate
from bitladder.convert import converter_file
from bitladder.engine import Decoding, give_back_memory
from bitladder.files import Closing
from bitladder.ladder.options import RunOptions
from bitladder.ladder.source import Other, Source
from bitladder.ladder.steps.step import Product, Step
from bitladder.ladder.store import Store
from bitladder.plan import RENDERED, PlanInputs, Planner
from bitladder.progress import Progress
from bitladder.recipe import TextUsed
from bitladder.refine import ModelFiles
from bitladder.rundir import Layout, StepRecord
from bitladder.text import Text
from bitladder.trial import Helpers

BASE = "base"


class Run(Closing):
    """A run at work.

    Parameters:
        options: the options of the run.
        source: the model that the run starts from.
        store: the open run directory.
        steps: the steps of the run.
        texts: the texts to measure with.
        calibration: the texts to calibrate on.
        tasks: the benchmarks to score with.
        others: files of somebody else.
        progress: gets bars and remarks.
        rounding_threads: how many threads round at once, which memory limits.
        known: records and digests of the complete steps, in a process that helps (`spread`); None reads them.

    Attributes:
        steps: the steps by name, in their order.
        helpers: makes what has other machines do parts of a step; None does all work here.
        machines: how many other machines there are, and threads of the largest.
    """

    # Eleven parameters: all that steps read is said here once, so that none of it has a default.
    def __init__(
        self,
        options: RunOptions,
        source: Source,
        store: Store,
        *,
        steps: Sequence[Step],
        texts: Sequence[Text],
        calibration: Sequence[Text],
        tasks: Sequence[evaluate.QuestionSet],
        others: Sequence[Other],
        progress: Progress,
        rounding_threads: int,
        known: tuple[Mapping[str, StepRecord], Mapping[str, Any]] | None = None,
    ) -> None:
        self.options, self.source, self.store, self.progress = options, source, store, progress
        self._rounding_threads = rounding_threads
        self.layout = Layout(store.folder)
        self.texts, self.calibration, self.tasks = list(texts), list(calibration), list(tasks)
        self.others = {other.name: other for other in others}
        self.steps = {step.name: step for step in steps}
        self._records: dict[str, StepRecord] = {} if known is None else dict(known[0])
        self._digests = self._input_digests() if known is None else dict(known[1])
        self.helpers: Callable[[Step], Helpers] | None = None
        self.machines = (0, 1)
        self._open_bases: list[evaluate.HiddenBase] = []
        self._open_planner: tuple[bool, Planner] | None = None

    def _input_digests(self) -> dict[str, Any]:
        digests: dict[str, Any] = {
            "model": self.source.digest(self.store),
            **self._text_digests(),
            "tasks": [[task.name, task.source, task.sha256] for task in self.tasks],
        }
        for other in self.others.values():
            digests[f"file {other.name}"] = self.store.sha256(other.path, f"file: {other.name}")
        if self.options.conversion.converter:
            script = converter_file(self.options.conversion.converter)
            digests["converter"] = self.store.sha256(script, f"converter: {script.name}")
        return digests

    def _text_digests(self) -> dict[str, Any]:
        used = {"text": self.texts, "calibration": self.calibration}
        return {name: [text_used(text).model_dump() for text in texts] for name, texts in used.items()}

    def _render_texts(self) -> None:
        """Renders conversations with the chat template of the full-precision model."""
        only = self.options.assistant_only
        self.texts = [text.rendered(self.full, assistant_only=only) for text in self.texts]
        self.calibration = [text.rendered(self.full) for text in self.calibration]
        self._digests |= self._text_digests()

    def close(self) -> None:
        """Frees the loaded models."""
        self._close_bases()
        self._close_planner()

    def _close_bases(self) -> None:
        for base in self._open_bases:
            base.close()
        self._open_bases = []

    def _close_planner(self) -> None:
        if self._open_planner is not None:
            self._open_planner[1].close()
        self._open_planner = None

    def records(self) -> tuple[dict[str, StepRecord], dict[str, Any]]:
        """The records of the complete steps, and what they and the inputs of the run hold, by name."""
        return dict(self._records), dict(self._digests)

    def hear(self, progress: Progress) -> None:
        """Has another one hear of the work from now on."""
        self.progress = progress
        if self._open_planner is not None:
            self._open_planner[1].progress = progress

    def due(self) -> set[str]:
        """The names of the steps that must be made, as far as that is known before the first of them is."""
        due = set[str]()
        for step in self.steps.values():
            if due.isdisjoint(step.needs) and due.isdisjoint(step.reads(self)):
                record = self.complete(step)
                if record is not None:
                    self._keep(step, record)
                    continue
            due.add(step.name)
        return due.union(*(self._deleted(self.steps[name]) for name in due))

    def before(self, step: Step) -> list[Step]:
        """The earlier steps to make again first, because files that the step reads are deleted. A complete one reads
        nothing."""
        if self.complete(step):
            return []
        return [self.steps[name] for name in self._deleted(step)]

    def waits(self, step: Step) -> bool:
        """Whether the step is complete without its files, so that it is made again only if another step reads them."""
        record = self.complete(step)
        return record is not None and not self._has_files(record)

    def complete(self, step: Step) -> StepRecord | None:
        """The record of a step that is complete, or None."""
        return self.store.complete(step.name, step.inputs(self, self._digests))

    def _has_files(self, record: StepRecord) -> bool:
        return all(self.store.path(output).is_file() for output in record.outputs)

    def _deleted(self, step: Step) -> list[str]:
        """The complete steps whose files the step reads and are deleted, and those that these read, in order."""
        names: list[str] = []
        for name in step.reads(self):
            if name in self._records and not self._has_files(self._records[name]):
                names += [*self._deleted(self.steps[name]), name]
        return list(dict.fromkeys(names))

    def do(self, step: Step, *, whole: bool = False, made: Product | None = None) -> None:
        """Does a step, unless it is complete.

        Parameters:
            step: the step.
            whole: if not, files of it may be deleted in the work folder.
            made: what other machines have made of it.
        """
        inputs = step.inputs(self, self._digests)
        self._keep(step, self.store.ensure(step.name, inputs, lambda: made or step.make(self), whole=whole))
        step.completed(self)

    def free(self, left: Sequence[Step]) -> None:
        """Frees the loaded models that none of the steps that are left uses, and memory that the last step left."""
        if RENDERED not in {step.cache for step in left}:
            self._close_planner()
        if BASE not in {name for step in left for name in step.reads(self)}:
            self._close_bases()
        give_back_memory()

    def release(self, left: Sequence[Step]) -> None:
        """Deletes the files of the work folder that none of the steps that are left reads. `free` comes first."""
        read = {name for step in left for name in step.reads(self)}
        caches = {step.cache for step in left}
        if not left:
            shutil.rmtree(self.layout.work, ignore_errors=True)
        for name, record in self._records.items():
            if name not in read:
                self.store.release(record)
        for cache in {step.cache for step in self.steps.values()} - caches:
            for folder in self.layout.blocks(cache):
                shutil.rmtree(folder, ignore_errors=True)

    def _keep(self, step: Step, record: StepRecord) -> None:
        """Keeps the record of a complete step for later ones."""
        self._records[step.name] = record
        if step.name == "convert":  # the same file may lie elsewhere under another name, given as MODEL
            self._digests[step.name] = {"model": record.facts["sha256"]}
            self._render_texts()
        else:
            self._digests[step.name] = {output.path: output.sha256 for output in record.outputs}

    def digest(self, name: str) -> Any:
        """The content hashes of what an earlier step wrote, or of an input of the run."""
        return self._digests[name]

    def facts(self, step: str) -> Mapping[str, Any]:
        """The facts of an earlier step; empty if this run has no such step."""
        record = self._records.get(step)
        return record.facts if record else {}

    def files(self, step: str) -> list[pathlib.Path]:
        """The files of an earlier step, in the order of its product."""
        record = self._records.get(step)
        return [self.store.path(output) for output in record.outputs] if record else []

    def sha256(self, step: str) -> str:
        """The content hash of the first file of an earlier step."""
        record = self._records[step]
        return record.outputs[0].sha256 if record.outputs else str(record.facts["sha256"])

    @property
    def full(self) -> pathlib.Path:
        """The full-precision GGUF."""
        files = self.files("convert")
        return files[0] if files else self.source.path

    def model(self, label: str) -> pathlib.Path:
        """The file of a label: the full-precision model, a rung, or a file of somebody else."""
        if label == BASE:
            return self.full
        return self.others[label].path if label in self.others else self.files(f"quantize {label}")[0]

    def smoothed(self, rung: str) -> bool:
        """Whether a rung is made of the smoothed model."""
        return bool(self.facts(f"trial {rung}").get("smoothed"))

    def by_library(self, *, smoothed: bool) -> list[pathlib.Path]:
        """The complete rungs that the library's kernels alone have made of the model, smoothed or not."""
        steps = [f"quantize {rung}" for rung in self.options.rungs if self.smoothed(rung) == smoothed]
        # The facts of a rung with rounded blocks tell of its guard.
        plain = [step for step in steps if step in self._records and "guard" not in self.facts(step)]
        return self._quants(plain)

    def presets(self) -> list[pathlib.Path]:
        """The plain presets that are complete and not deleted."""
        return self._quants([f"preset {rung}" for rung in self.options.rungs])

    def _quants(self, steps: Sequence[str]) -> list[pathlib.Path]:
        """The quants of those steps that are complete and whose files are there."""
        return [path for step in steps for path in self.files(step)[:1] if path.is_file()]

    def settings(self) -> evaluate.MeasureOptions:
        """How models are measured."""
        decoding = self.options.decoding
        return evaluate.MeasureOptions(
            n_ctx=decoding.n_ctx,
            n_ubatch=decoding.n_ubatch,
            threads=decoding.threads,
            gpu_layers=decoding.gpu_layers,
            chunks=self.options.chunks,
        )

    def bases(self) -> list[evaluate.HiddenBase]:
        """The base of each text, opened once for all rungs: opening one hashes the full-precision model."""
        if not self._open_bases:
            identity = evaluate.identify(self.full)
            self._open_bases = [
                evaluate.open_base(path, text, self.settings(), identity)
                for path, text in zip(self.files("base"), self.texts, strict=True)
            ]
        return self._open_bases

    @property
    def decoding(self) -> Decoding:
        """How models are decoded where tensors are rounded too: with no more threads than fit into memory."""
        decoding = self.options.decoding
        return decoding.replace(threads=self._rounding_threads) if self.options.rounds else decoding

    def material(self, *, smoothed: bool) -> ModelFiles:
        """The files that rungs are made of: a model, smoothed or not, its imatrix and its second moments."""
        if smoothed:
            model, imatrix, *moments = self.files("smooth")
        else:
            model, imatrix, moments = self.full, self.files("imatrix")[0], self.files("moments")
        return ModelFiles(model, imatrix, tuple(moments))

    def planner(self, *, smoothed: bool, step: Step | None = None) -> Planner:
        """The planner of one of the two materials. Only one is open, because it holds a loaded model.

        Other machines help it with the work of `step`, if there are some.
        """
        if self._open_planner is None or self._open_planner[0] != smoothed:
            self._close_planner()
            files, options = self.material(smoothed=smoothed), self.options
            inputs = PlanInputs(
                files.model,
                files.imatrix,
                self.calibration,
                files.moments,
                options.refine.rounding,
                self.layout.material_work(smoothed=smoothed),
            )
            decoding = self.decoding
            planning = options.planning.replace(
                threads=decoding.threads,
                gpu_layers=decoding.gpu_layers,
                device=decoding.device,
                unreached_type=options.unreached_type,
            )
            self._open_planner = (smoothed, Planner(inputs, planning, self.progress))
        planner = self._open_planner[1]
        planner.helpers = self.helpers(step) if self.helpers is not None and step is not None else None
        return planner


def text_used(text: Text) -> TextUsed:
    """A text as recipes and steps name it."""
    return TextUsed(name=text.name, sha256=text.sha256)


def read_json(path: pathlib.Path) -> Any:
    """A JSON file of the run directory."""
    return json.loads(path.read_text(encoding="utf-8"))

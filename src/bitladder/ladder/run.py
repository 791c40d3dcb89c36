"""A run: the steps of the plan, each done unless the run directory has it already."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from bitladder import calibrate, convert, evaluate, quantize
from bitladder.engine.decoding import Decoding
from bitladder.errors import UsageError
from bitladder.files import write_json
from bitladder.ladder.material import Materials
from bitladder.ladder.others import Other, about, check_headers, doubts, find_others
from bitladder.ladder.pace import pace_of
from bitladder.ladder.pairs import keep_tokens, paired_with_naive
from bitladder.ladder.plan import CODE, TASK_CTX, Kind, RunOptions, Step, plan
from bitladder.ladder.planned import PLANNED
from bitladder.ladder.records import IMATRIX, library_of, read_json, recipe_of, run_record, score_path, text_used
from bitladder.ladder.rounded import MOMENTS, PLAIN, collect, decoding, refine_rung
from bitladder.ladder.smoothed import smooth, try_rung
from bitladder.ladder.source import Source, describe, locate
from bitladder.ladder.space import check_room, parameters_of
from bitladder.ladder.speeds import speeds
from bitladder.ladder.store import Product, Store, open_store
from bitladder.ladder.tracker import Tracker, Watch
from bitladder.plan import candidates
from bitladder.progress import SILENT, Progress
from bitladder.recipe import Recipe, write_recipe
from bitladder.refine import ModelFiles, TuneOptions, guard_json, tune_in_place
from bitladder.text.chunks import Reading
from bitladder.text.texts import Text, load_text

BENCH, CANDIDATES = "bench.json", "candidates.json"


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The run directory, the steps that were really done, and the Scores JSON of the full precision, each rung and each
    file of somebody else, which `labels` name in the same order ("base" for the first).
    """

    folder: pathlib.Path
    made: tuple[str, ...]
    labels: tuple[str, ...]
    scores: list[dict[str, Any]]


def run(options: RunOptions, *, progress: Progress = SILENT, watch: Watch | None = None) -> RunResult:
    """Make (or complete) the ladder that `options` describe.

    What the run directory has already is not made again. `watch` is told of every moment: the step, the time left and
    the best so far. Raises BitladderError (UsageError for an option) before the work starts wherever that is possible;
    what was complete when something went wrong stays.
    """
    if options.converter is not None and not options.converter.is_file():
        raise UsageError(f"--converter {options.converter}: no such file")
    source = locate(options.model)
    if not source.is_gguf and options.out.resolve() == source.path.resolve():
        raise UsageError(f"--out {options.out} is the checkpoint's own directory; name another one")
    if source.is_gguf and (options.outtype != "auto" or options.converter):
        progress.warn("MODEL is a GGUF already: --outtype and --converter have no effect")
    parameters_of(source)  # what is no model is refused before a directory is made
    text, calibration = load_text(options.text), [load_text(spec) for spec in options.calibration]
    if text.sha256 in {one.sha256 for one in calibration}:
        progress.warn(f"{text.name} is measured with and calibrated on: the figures will be better than on other text")
    tasks = [evaluate.load_task(spec) for spec in evaluate.parse_specs(options.tasks)] if options.tasks else []
    others = find_others(options.compare, ("base", *quantize.preset_names()))
    steps = plan(options, [other.name for other in others])
    questions = sum(min(len(task.items), options.task_count or len(task.items)) for task in tasks)
    tracker = Tracker(pace_of(steps, options, text, calibration, questions), len(steps), progress, watch)
    with open_store(options.out, keep=source.path if source.is_gguf else None, progress=progress) as store:
        check_room(options, source, store.present())
        store.begin(run_record(options, source, others))
        with _Execution(
            options,
            source,
            store,
            text=text,
            calibration=calibration,
            tasks=tasks,
            others=others,
            progress=tracker,
        ) as execution:
            for step in steps:
                with tracker.step(step.name, made=functools.partial(store.made.__contains__, step.name)):
                    execution.do(step)
                    execution.tell(step)
        store.finish()
        names = ("base", *options.rungs, *(other.name for other in others))
        scores = [read_json(score_path(store.folder, name)) for name in names]
        return RunResult(store.folder, tuple(store.made), names, scores)


class _Execution:
    """Does the steps in order; `digests` maps what steps read to content: an earlier step's file, texts, the model."""

    def __init__(
        self,
        options: RunOptions,
        source: Source,
        store: Store,
        *,
        text: Text,
        calibration: list[Text],
        tasks: list[evaluate.QuestionSet],
        others: list[Other],
        progress: Tracker,
    ) -> None:
        self.options, self.source, self.store, self.progress = options, source, store, progress
        self.others = {other.name: other for other in others}
        self.text, self.calibration, self.tasks = text, calibration, tasks
        self.folder = store.folder
        self.full = source.path  # the full-precision GGUF, once there is one
        self._open_base: evaluate.HiddenBase | None = None
        self._made_of: Materials | None = None
        self.facts: dict[str, dict[str, Any]] = {}
        self.digests: dict[str, Any] = {
            "model": source.digest(store),
            "text": text_used(text).model_dump(),
            "calibration": [text_used(one).model_dump() for one in calibration],
            "tasks": [[task.name, task.source, task.sha256] for task in tasks],
        }
        for other in others:
            self.digests[f"file {other.name}"] = store.sha256(other.path, f"file: {other.name}")
        if options.converter:
            self.digests["converter"] = store.sha256(options.converter, f"converter: {options.converter.name}")

    def __enter__(self) -> "_Execution":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open_base is not None:
            self._open_base.close()
        if self._made_of is not None:
            self._made_of.close()

    def do(self, step: Step) -> None:
        """Make the step's files unless they are there."""
        inputs = {"code": CODE[step.kind], "options": step.options, "library": library_of(step)}
        inputs |= {need: self.digests[need] for need in step.needs}
        works: dict[Kind, Callable[[], Product]] = {
            "convert": self._convert,
            "base": self._base,
            "imatrix": self._imatrix,
            "smooth": self._smooth,
            "trial": functools.partial(self._trial, step.rung or ""),
            "moments": self._moments,
            "price": self._price,
            "plan": functools.partial(self._plan, step.rung or ""),
            "candidates": self._candidates,
            "quantize": functools.partial(self._quantize, step.rung or "", planned=f"plan {step.rung}" in step.needs),
            "naive": functools.partial(self._naive, step.rung or ""),
            "measure": functools.partial(self._measure, step.rung or step.other),
            "bench": self._bench,
            "score": functools.partial(self._score, step),
        }
        record = self.store.ensure(step.name, inputs, works[step.kind])
        self.facts[step.name] = record.facts
        if record.outputs:
            first = record.outputs[0]
            self.digests[step.name] = {"file": first.path, "sha256": first.sha256}
        else:
            # A GGUF given as MODEL is used where it is.
            self.digests[step.name] = {"file": record.facts["file"], "sha256": record.facts["sha256"]}
        if step.kind == "convert":
            if record.outputs:
                self.full = self.store.path(record.outputs[0])
            for other in self.others.values():  # before hours of work
                check_headers(other, self.full)

    def tell(self, step: Step) -> None:
        """Let those who watch know what a rung has reached."""
        if step.rung and step.kind == "measure":
            self.progress.found_scores(step.rung, read_json(self._measured_path(step.rung)))
        elif step.rung and step.kind == "naive":
            scores = read_json(score_path(self.folder, f"{step.rung}.naive"))
            self.progress.found_scores(step.rung, scores, "the preset by itself")

    def _convert(self) -> Product:
        if self.source.is_gguf:
            path = self.source.path
            return Product([], {**describe(path), "sha256": self.store.sha256(path, f"model: {path.name}")})
        # Its name follows from the metadata that conversion finds, so at first it has that of a temporary file.
        hidden = self.folder / ".converted.tmp"
        try:
            convert.convert(
                self.source.path,
                hidden,
                outtype=self.options.outtype,
                converter=self.options.converter,
                progress=self.progress,
            )
            facts = describe(hidden)
            path = self.folder / f"{facts['stem']}-{facts['encoding']}.gguf"
            hidden.replace(path)
        finally:
            hidden.unlink(missing_ok=True)
        facts |= {"file": path.name, "sha256": self.store.sha256(path, path.name)}
        return Product([path], facts)

    def _base(self) -> Product:
        out = self._base_path()
        evaluate.make_base(self.full, self.text, out, self._settings(), self.progress)
        return Product([out])

    def _imatrix(self) -> Product:
        out, wanted = self.folder / IMATRIX, self.options.imatrix_chunks
        reading = Reading(chunks=wanted, spread=False)
        result = calibrate.collect_imatrix(
            self.full, self.calibration, out, reading=reading, decoding=self._decoding(), progress=self.progress
        )
        if wanted is not None and result.chunks < wanted * len(self.calibration):
            self.progress.warn(
                f"the calibration text is shorter than --imatrix-chunks {wanted}; all {result.chunks} chunks are used"
            )
        texts = [text_used(text).model_dump() for text in self.calibration]
        return Product([out], {"entries": result.entries, "chunks": result.chunks, "texts": texts})

    def _smooth(self) -> Product:
        files, facts = smooth(self.options, self.full, self.folder, self.progress)
        return Product(files, {name: self.facts["convert"][name] for name in ("file", "sha256")} | facts)

    def _trial(self, rung: str) -> Product:
        out, helps = try_rung(self.options, self.full, self.folder, rung, self.calibration, self.progress)
        return Product([out], {"smoothed": helps})

    def _smoothed(self, rung: str) -> bool:
        """Whether a rung is made of the smoothed model."""
        return bool(self.facts.get(f"trial {rung}", {}).get("smoothed"))

    def _moments(self) -> Product:
        chunks = self.options.moments_chunks
        made = collect(self.full, self.calibration, self.folder, chunks, self._decoding(), self.progress)
        files = [self.folder / MOMENTS, self.folder / PLAIN]
        return Product(files, {"chunks": made.chunks, "weighting": made.weighting})

    def _materials(self) -> Materials:
        """What rungs are made of, with a planner; opened once for all rungs."""
        if self._made_of is None:
            self._made_of = Materials(
                self.options, self.folder, self.full, self.calibration, self._smoothed, self.progress
            )
        return self._made_of

    def _price(self) -> Product:
        return Product(self._materials().price())

    def _plan(self, rung: str) -> Product:
        return Product([self._materials().plan(rung)])

    def _candidates(self) -> Product:
        out = self.folder / CANDIDATES
        plans = [read_json(self.folder / PLANNED / f"{rung}.json") for rung in self.options.rungs]
        write_json(out, candidates(plans))
        return Product([out])

    def _quantize(self, rung: str, *, planned: bool) -> Product:
        out, recipe = self._model_path(rung), self.folder / "recipes" / f"{rung}.toml"
        plan = read_json(self.folder / PLANNED / f"{rung}.json") if planned else None
        types = None if plan is None else plan["types"]
        facts: dict[str, Any] = {}
        made_of = self._materials().of(rung)
        if self.options.rounding == "stock":
            result = self._make(rung, (made_of.model, made_of.imatrix), out, types)
        else:
            files = ModelFiles(made_of.model, made_of.imatrix, made_of.moments)
            rounded = refine_rung(self.options, files, made_of.work, out, rung, types, self.calibration, self.progress)
            result = rounded.result
            facts["guard"] = None if rounded.guard is None else guard_json(rounded.guard)
            tuning = TuneOptions(tune_chunks=self.options.tune_chunks)
            facts["tuned"] = tune_in_place(
                made_of.model, out, self.calibration, tuning, decoding(self.options), self.progress
            )
        made = self._recipe(result, out.name)
        if plan is not None:
            said = f"bitladder run --mode {plan['mode']}: {plan['made']}"
            made = made.model_copy(update={"budget": f"{plan['mode']}, like {rung}", "made": said})
        write_recipe(recipe, made)
        return Product([out, recipe], {"bytes": result.bytes, "bpw": result.bpw, **facts})

    def _naive(self, rung: str) -> Product:
        """The preset by itself: measured and forgotten, but for its recipe and its scores."""
        out, recipe = score_path(self.folder, f"{rung}.naive"), self.folder / "recipes" / f"{rung}.naive.toml"
        path = self.folder / f".{rung}.naive.gguf.tmp"
        try:
            result = self._make(rung, (self.full, self.folder / IMATRIX), path, None)
            name = f"{self.facts['convert']['stem']}-{rung}.gguf"
            measured = self._measured(path)
            scores = evaluate.RunScores.of(measured.scores, model=name, role="naive", rung=rung, mode="naive")
            write_json(out, scores.to_json())
            write_recipe(recipe, self._recipe(result, name))
            tokens = keep_tokens(self.folder, f"{rung}.naive", measured.arrays)
        finally:
            path.unlink(missing_ok=True)
        return Product([out, recipe, tokens], {"bytes": result.bytes, "bpw": result.bpw})

    def _make(
        self, rung: str, made_of: tuple[pathlib.Path, pathlib.Path], out: pathlib.Path, types: Mapping[str, str] | None
    ) -> quantize.QuantizeResult:
        model, imatrix = made_of
        return quantize.quantize(
            model,
            out,
            rung if types is None else quantize.QuantizeOptions(rung, types=types),
            imatrix=imatrix,
            threads=self.options.threads,
            progress=self.progress,
        )

    def _recipe(self, result: quantize.QuantizeResult, name: str) -> Recipe:
        digest, facts = self.digests["imatrix"]["sha256"], self.facts
        return recipe_of(result, name, facts["convert"], facts["imatrix"], digest, self.options.n_ctx, self.calibration)

    def _measure(self, rung: str | None) -> Product:
        base, wanted = self._opened_base(), self.options.chunks
        files, facts = [self._measured_path(rung)], {}
        if rung is None:
            scores = self._with_tasks(evaluate.base_scores(base, self.text, self._settings()), self.full)
            if wanted is not None and (scores.chunks or 0) < wanted:
                self.progress.warn(
                    f"{self.text.name} has only {scores.chunks} chunks (--chunks {wanted}); all are used"
                )
        else:
            measured = self._measured(self._model_path(rung))
            scores = measured.scores
            files.append(keep_tokens(self.folder, rung, measured.arrays))
        write_json(files[0], scores.to_json())
        if rung in self.others:
            facts["doubts"] = doubts(self.others[rung], self.full, scores, self.options.threads, self.progress)
        return Product(files, facts)

    def _measured(self, path: pathlib.Path) -> evaluate.Measurement:
        """A quant's divergence, token by token, and its tasks."""
        base = self._opened_base()
        found = evaluate.measure(path, self.text, self._settings(), base=base, progress=self.progress)
        return dataclasses.replace(found, scores=self._with_tasks(found.scores, path))

    def _with_tasks(self, scores: evaluate.Scores, path: pathlib.Path) -> evaluate.Scores:
        if not self.tasks:
            return scores
        settings = evaluate.Settings(n_ctx=TASK_CTX, threads=self.options.threads, gpu_layers=self.options.gpu_layers)
        count = self.options.task_count
        return evaluate.add_tasks(scores, path, self.tasks, settings, count=count, progress=self.progress)

    def _bench(self) -> Product:
        """Tokens per second of all models: label → rows of Scores.bench."""
        paths = {label or "base": self._model_path(label) for label in (None, *self.options.rungs, *self.others)}
        out = self.folder / BENCH
        write_json(out, speeds(self.options, paths, self.progress))
        return Product([out])

    def _score(self, step: Step) -> Product:
        """Put together what was measured of a model, which stays valid when only the speeds are measured again."""
        rung = step.rung or step.other
        scores = evaluate.read_document(self._measured_path(rung), evaluate.Scores)
        place: dict[str, Any] = {}
        if "bench" in step.needs:
            place["bench"] = read_json(self.folder / BENCH)[rung or "base"]
        if rung in self.others:
            place |= about(self.others[rung], self.facts[f"measure {rung}"]["doubts"])
        elif rung is not None and self.options.mode != "naive":
            plan = read_json(self.folder / PLANNED / f"{rung}.json")
            place |= {"role": "rung", "mode": plan["mode"], "predicted_kld": plan["predicted_kld"]}
        if rung in self.options.rungs and self.options.rounding != "stock":
            tuned = bool(self.facts[f"quantize {rung}"].get("tuned"))
            place |= {"rounding": self.options.rounding, "tuned": tuned}
        if rung in self.options.rungs:
            place["smoothed"] = self._smoothed(rung or "")
        if f"naive {rung}" in step.needs:
            place["paired"] = paired_with_naive(self.folder, rung or "")
        out = score_path(self.folder, rung or "base")
        write_json(out, evaluate.RunScores.of(scores, **place).to_json())
        return Product([out])

    def _model_path(self, rung: str | None) -> pathlib.Path:
        if rung in self.others:
            return self.others[rung].path
        return self.full if rung is None else self.folder / f"{self.facts['convert']['stem']}-{rung}.gguf"

    def _measured_path(self, rung: str | None) -> pathlib.Path:
        return self.folder / "measured" / f"{rung or 'base'}.json"

    def _base_path(self) -> pathlib.Path:
        """Named as `bitladder eval` names a base, so that it finds this one beside the model."""
        return self.folder / evaluate.cache_path(self.full, self.text, self.options.n_ctx).name

    def _opened_base(self) -> evaluate.HiddenBase:
        """The base, opened once for all rungs: opening it hashes the full-precision model."""
        if self._open_base is None:
            identity = evaluate.identify(self.full)
            self._open_base = evaluate.open_base(self._base_path(), self.text, self._settings(), identity)
        return self._open_base

    def _settings(self) -> evaluate.Settings:
        options = self.options
        return evaluate.Settings(
            n_ctx=options.n_ctx, chunks=options.chunks, threads=options.threads, gpu_layers=options.gpu_layers
        )

    def _decoding(self) -> Decoding:
        options = self.options
        return Decoding(n_ctx=options.n_ctx, threads=options.threads, gpu_layers=options.gpu_layers)

    def _engine(self) -> dict[str, Any]:
        options = self.options
        return {
            "n_ctx": options.n_ctx,
            "threads": options.threads,
            "gpu_layers": options.gpu_layers,
            "progress": self.progress,
        }

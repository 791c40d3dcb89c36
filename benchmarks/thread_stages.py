"""The stages of a run, each with an amount of work and a number of threads, for `threads.py`.

    python benchmarks/thread_stages.py STAGE FOLDER THREADS AMOUNT [SECONDS]

A stage calls the product's own function on the files that `prepare` made. It is run in a process of its own: once
with its least amount, so that modules are loaded, loops compiled, and files read; then it prints "ready", waits for a
line, and is timed. The last line of its output is JSON: amount, wall and CPU seconds. With SECONDS it looks for the
amount that takes about so many.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from bitladder import calibrate, convert, evaluate, plan, quantize, refine, trial
from bitladder.engine import Decoding, type_by_name
from bitladder.gguf import open_model
from bitladder.rounding import RoundingOptions
from bitladder.text import Reading, load_text

PRESET, OTHER = "Q4_K_M", "IQ3_S"
CALIBRATION, TEXT, QUESTIONS = "pydoc:calibration", "pydoc:test", "continuation:pydoc:test"
FAST = plan.PlanOptions().at_effort("fast")
KEPT_CHUNKS = {"imatrix": 32, "moments": 4, "base": 64}


@dataclasses.dataclass(frozen=True)
class Files:
    """What stages read, in one folder; `scratch` is for what a stage writes.

    Parameters:
        folder: the folder.
        scratch: a folder of this process.
    """

    folder: pathlib.Path
    scratch: pathlib.Path

    @property
    def checkpoint(self) -> pathlib.Path:
        """A link to the checkpoint; there is none if MODEL is a GGUF."""
        return self.folder / "checkpoint"

    @property
    def full(self) -> pathlib.Path:
        """The full-precision model."""
        return self.folder / "full.gguf"

    @property
    def imatrix(self) -> pathlib.Path:
        """Its importance matrix."""
        return self.folder / "imatrix.gguf"

    @property
    def moments(self) -> tuple[pathlib.Path, pathlib.Path]:
        """Its second moments: weighted by gradients, and plain."""
        return self.folder / "gradients.gguf", self.folder / "plain.gguf"

    @property
    def quant(self) -> pathlib.Path:
        """A quant by the library."""
        return self.folder / "quant.gguf"

    @property
    def base(self) -> pathlib.Path:
        """The predictions of the full-precision model."""
        return self.folder / "text.base"

    @property
    def work(self) -> pathlib.Path:
        """The planner's folder, with rendered blocks."""
        return self.folder / "work"

    @property
    def prices(self) -> pathlib.Path:
        """The prices of the band of PRESET."""
        return self.folder / "prices.json"

    def out(self, name: str) -> pathlib.Path:
        """A path to write to."""
        return self.scratch / name


def prepare(model: pathlib.Path, folder: pathlib.Path) -> None:
    """Makes what stages read, and keeps it for the next time. The folder belongs to one model."""
    folder.mkdir(parents=True, exist_ok=True)
    files = Files(folder, folder)
    if not files.full.exists():
        if model.is_dir():
            files.checkpoint.unlink(missing_ok=True)
            files.checkpoint.symlink_to(model.resolve())
            convert.convert(model, files.full)
        else:
            files.full.symlink_to(model.resolve())
    text, calibration = load_text(TEXT), load_text(CALIBRATION)
    if not files.imatrix.exists():
        reading = Reading(chunks=KEPT_CHUNKS["imatrix"], spread=False)
        calibrate.collect_imatrix(files.full, [calibration], files.imatrix, reading=reading)
    options, kinds = calibrate.RoundingMomentsOptions(moments_chunks=KEPT_CHUNKS["moments"]), ("weighted", "plain")
    for path, kind in zip(files.moments, kinds, strict=True):
        if not path.exists():
            calibrate.collect_job(calibrate.job_for_rounding(files.full, [calibration], kind, options=options), path)
    if not files.quant.exists():
        quantize.quantize(files.full, files.quant, PRESET, imatrix=files.imatrix)
    if not files.base.exists():
        evaluate.make_base(files.full, text, files.base, evaluate.MeasureOptions(chunks=KEPT_CHUNKS["base"]))
    if not files.prices.exists():
        with planner(files, files.work, None) as made:
            plan.price_band(made, plan.band_of(PRESET)).save(files.prices)


def planner(files: Files, work: pathlib.Path, threads: int | None, tokens: int | None = None) -> plan.Planner:
    """A planner of the fast effort, which prices the library's blocks."""
    options = FAST.replace(threads=threads)
    if tokens is not None:
        options = options.replace(probe_tokens=tokens)
    return plan.Planner(plan.PlanInputs(files.full, files.imatrix, [load_text(CALIBRATION)], work=work), options)


def in_parts(amount: int, most: int, work: Callable[[int], None]) -> None:
    """Does an amount of work, at most so much at once: a text has only so many chunks."""
    while amount > 0:
        work(min(amount, most))
        amount -= most


def converted(files: Files, amount: int, threads: int) -> None:
    """The checkpoint, so many times. Conversion takes no number of threads."""
    for _ in range(amount):
        convert.convert(files.checkpoint, files.out("converted.gguf"))


def imatrix(files: Files, amount: int, threads: int) -> None:
    """Chunks of text."""

    def work(chunks: int) -> None:
        reading, decoding = Reading(chunks=chunks, spread=False), Decoding(threads=threads)
        texts, out = [load_text(CALIBRATION)], files.out("imatrix.gguf")
        calibrate.collect_imatrix(files.full, texts, out, reading=reading, decoding=decoding)

    in_parts(amount, 128, work)


def moments(files: Files, amount: int, threads: int, weighting: str) -> None:
    """Chunks of text."""

    def work(chunks: int) -> None:
        calibrate.collect_moments(
            files.full,
            [load_text(CALIBRATION)],
            files.out("moments.gguf"),
            reading=Reading(chunks=chunks),
            decoding=Decoding(threads=threads),
            options=calibrate.MomentsOptions(weighting=weighting),  # type: ignore[arg-type]
        )

    in_parts(amount, 128, work)


def smoothed(files: Files, amount: int, threads: int) -> None:
    """The model and its moments, so many times. As in a run, there are no files that new ones replace."""
    for _ in range(amount):
        number = len(list(files.scratch.glob("smoothed-*")))
        folder = files.out(f"smoothed-{number}")
        folder.mkdir()
        moments = folder / "gradients.gguf", folder / "plain.gguf"
        out = refine.ModelFiles(folder / "model.gguf", folder / "imatrix.gguf", moments)
        refine.smooth_model(refine.ModelFiles(files.full, files.imatrix, files.moments), out, threads=threads)


def fresh_work(files: Files) -> pathlib.Path:
    """A planner's folder with rendered blocks and the base, in which nothing was measured."""
    work = files.out("work")
    if not work.exists():
        work.mkdir()
        for part in files.work.iterdir():
            (work / part.name).symlink_to(part)
    (work / "measured.jsonl").unlink(missing_ok=True)
    return work


def priced(files: Files, amount: int, threads: int) -> None:
    """Thousands of tokens on which swaps are measured. Blocks are rendered already."""
    with planner(files, fresh_work(files), threads, 1000 * amount) as made:
        plan.price_band(made, plan.band_of(PRESET))


def planned(files: Files, amount: int, threads: int) -> None:
    """A rung, so many times."""
    prices = plan.load_prices(files.prices)
    for _ in range(amount):
        with planner(files, fresh_work(files), threads) as made:
            plan.plan_rung(made, PRESET, "quality", prices)


def rounded(files: Files, amount: int, threads: int, options: RoundingOptions) -> None:
    """Tensors of the blocks of the model, those of its middle first; all of them again if it has too few."""
    kind = type_by_name("q4_K")
    with open_model(files.full) as file:
        opened = [calibrate.MomentsFile(path) for path in files.moments]
        matrix = calibrate.read_imatrix(files.imatrix)
        rounding = refine.OutputRounding(opened, options)
        names = [name for name, tensor in file.tensors.items() if rounding.covers(name, kind) and "blk." in name]
        names = [name for name in names if file.tensors[name].width % kind.block == 0]
        names = names[len(names) // 2 :] + names[: len(names) // 2]
        importance = {name: matrix.columns(name, file.tensors[name]) for name in names}
        known = {name: columns for name, columns in importance.items() if columns is not None}

        def work(count: int) -> None:
            with trial.Renderer(file, known, rounding=rounding, threads=threads) as renderer:
                trial.render_all(renderer, [(name, kind.name) for name in names[:count]])

        in_parts(amount, len(names), work)
        for moment in opened:
            moment.close()


def by_library(files: Files, amount: int, threads: int, preset: str) -> None:
    """A preset, so many times."""
    for _ in range(amount):
        quantize.quantize(files.full, files.out("quant.gguf"), preset, imatrix=files.imatrix, threads=threads)


def base(files: Files, amount: int, threads: int) -> None:
    """Chunks of text."""

    def work(chunks: int) -> None:
        settings = evaluate.MeasureOptions(chunks=chunks, threads=threads)
        evaluate.make_base(files.full, load_text(TEXT), files.out("made.base"), settings)

    in_parts(amount, KEPT_CHUNKS["base"], work)


def measured(files: Files, amount: int, threads: int) -> None:
    """Chunks of text, compared with the base."""
    text, identity = load_text(TEXT), evaluate.identify(files.full)
    settings = evaluate.MeasureOptions(chunks=KEPT_CHUNKS["base"], threads=threads)

    def work(chunks: int) -> None:
        with evaluate.open_base(files.base, text, settings.replace(chunks=chunks), identity) as opened:
            evaluate.measure(files.quant, text, settings.replace(chunks=chunks), base=opened)

    in_parts(amount, KEPT_CHUNKS["base"], work)


def scored(files: Files, amount: int, threads: int) -> None:
    """Questions."""
    (spec,) = evaluate.parse_specs(QUESTIONS)
    task, settings = evaluate.load_task(spec), evaluate.MeasureOptions(n_ctx=768, threads=threads)

    def work(count: int) -> None:
        request = evaluate.EvalRequest((), settings, tasks=(task,), task_settings=settings, task_count=count)
        evaluate.evaluate_several([files.quant], request)

    in_parts(amount, len(task.items), work)


def tuned(files: Files, amount: int, threads: int) -> None:
    """Chunks of text."""

    def work(chunks: int) -> None:
        options, text = refine.TuneOptions(tune_chunks=chunks), load_text(CALIBRATION)
        decoding = Decoding(threads=threads)
        refine.tune(files.full, files.quant, files.out("tuned.gguf"), [text], None, options, decoding)

    in_parts(amount, 128, work)


def in_threads(threads: int, work: Callable[[int], None], amount: int) -> None:
    """Pieces of work that release Python's lock."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(amount)))


def arithmetic(files: Files, amount: int, threads: int) -> None:
    """What this machine's CPUs give: hashes of 64 KiB, which stay in the first caches."""
    data = bytes(1 << 16)

    def work(_: int) -> None:
        for _ in range(100):
            hashlib.sha256(data).digest()

    in_threads(threads, work, amount)


def copying(files: Files, amount: int, threads: int) -> None:
    """What its main memory gives: copies of 256 MiB, larger than most caches."""
    slots = [np.zeros((2, 1 << 25)) for _ in range(threads)]

    def work(number: int) -> None:
        place = slots[number]
        for _ in range(0, amount, threads):
            np.copyto(place[0], place[1])

    in_threads(threads, work, threads)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage.

    Parameters:
        work: called with the files, an amount and a number of threads.
        unit: what the amount counts.
        least: the least amount that says something.
        needs: what must be there beside the files of `prepare`: "checkpoint" or nothing.
    """

    work: Callable[[Files, int, int], None]
    unit: str
    least: int = 1
    needs: str = ""


STAGES = {
    "(arithmetic)": Stage(arithmetic, "× 6.4 MB", 16),
    "(memory)": Stage(copying, "× 256 MiB", 8),
    "convert": Stage(converted, "times", needs="checkpoint"),
    "imatrix": Stage(imatrix, "chunks", 4),
    "moments, plain": Stage(partial(moments, weighting="tokens"), "chunks", 8),
    "moments by gradients": Stage(partial(moments, weighting="gradients"), "chunks", 16),
    "smooth": Stage(smoothed, "times"),
    "price": Stage(priced, "thousand tokens", 8),
    "plan": Stage(planned, "times"),
    "round, feedback": Stage(partial(rounded, options=RoundingOptions(method="feedback")), "tensors", 28),
    "round, two passes": Stage(partial(rounded, options=RoundingOptions(passes=2, enough=0.0)), "tensors", 28),
    f"quantize {PRESET}": Stage(partial(by_library, preset=PRESET), "times"),
    f"quantize {OTHER}": Stage(partial(by_library, preset=OTHER), "times"),
    "base": Stage(base, "chunks", 4),
    "measure": Stage(measured, "chunks", 4),
    "tasks": Stage(scored, "questions", 20),
    "tune": Stage(tuned, "chunks", 4),
}


def cpu_seconds() -> float:
    """Of this process and of those that it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def timed(stage: Stage, files: Files, amount: int, threads: int) -> dict[str, float]:
    """Wall and CPU seconds of an amount."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    stage.work(files, amount, threads)
    return {"amount": amount, "wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}


def sized(stage: Stage, files: Files, threads: int, seconds: float) -> int:
    """The amount that takes about so many seconds."""
    amount, found = stage.least, timed(stage, files, stage.least, threads)
    while found["wall"] < seconds / 3:
        amount = math.ceil(amount * min(seconds / 2 / max(found["wall"], 1e-3), 8))
        found = timed(stage, files, amount, threads)
    return max(stage.least, round(amount * seconds / found["wall"]))


def main() -> None:
    name, folder, threads = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
    stage = STAGES[name]
    scratch = folder / f"scratch-{time.time_ns()}"
    scratch.mkdir()
    files = Files(folder, scratch)
    try:
        stage.work(files, stage.least, threads)
        if len(sys.argv) > 5:
            print(json.dumps({"amount": sized(stage, files, threads, float(sys.argv[5]))}))
            return
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(timed(stage, files, int(sys.argv[4]), threads)), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()

"""A run as tables, a plot and JSON: what it would do with a model (`doctor`) and take (`estimate`), its state and the
best so far while it works, its ladder, and what comes next.
"""

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from bitladder.gguf import ranges
from bitladder.ladder import Diagnosis, Estimate, WidthMisfit, in_words
from bitladder.report import (
    USUAL_MEMORIES,
    FinishedRun,
    RunModel,
    UnfinishedRun,
    best_fitting,
    tables,
    with_error,
)
from bitladder.rundir import is_running
from bitladder.show.output import Output
from bitladder.show.table import Column, Point, Table, figures, scatter
from bitladder.units import duration, number_of

if TYPE_CHECKING:
    from bitladder.ladder import Best, Status, TimeLeft
    from bitladder.rundir import RunLog

MARKS = {"rung": "●", "naive": "◇", "third-party": "†"}
LEGEND = {"rung": "● a rung", "naive": "◇ a plain preset", "third-party": "† by others"}
ON_FRONT = "▸"
SHORTEST = 10  # seconds that are told apart in an estimate
# Figures of the report's table → headings in the terminal, and the rank by which they give way in narrow ones.
HEADS = {"PPL": ("PPL", 2), "ρPPL": ("ρPPL", 6), "KLD": ("KLD", 0), "RMS Δp": ("RMS Δp", 4)}
HEADS |= {"Same top token": ("same top", 3), tables.GAIN: (tables.GAIN, 5)}


class RunDisplay:
    """Told of every moment of a run. On a terminal a table that stays above the bars; elsewhere, and in the log, a line
    for each step that is really done and for each rung that gets better.
    """

    def __init__(self, output: Output, log: "RunLog") -> None:
        self._output, self._log = output, log
        self._status: Status | None = None
        self._told = ""
        self._best: dict[str, Best] = {}

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """While this is open the table is on the screen."""
        with self._output.header(self._table):
            yield

    def watch(self, status: "Status") -> None:
        """A new moment."""
        self._status = status
        self._log.begin()
        say = self._log.write if self._output.live else self._log.info
        if status.working and status.step != self._told:
            self._told = status.step
            left = f", {time_left_text(status.left)} left" if status.left is not None else ""
            say(f"[{status.number}/{status.count}] {status.step}{left}")
        for rung, best in status.best.items():
            if self._best.get(rung) != best and status.working:
                say(f"{rung}: {best_text(best)}")
        self._best = dict(status.best)

    def _table(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        status = self._status
        if status is None:
            return Text("Reads MODEL and measures this machine …")
        table = Table(box=None, pad_edge=False, show_header=False)
        for _ in range(2):
            table.add_column(no_wrap=True)
        for rung in status.rungs:
            best = status.best.get(rung)
            table.add_row(rung, best_text(best) if best else "–")
        left = time_left_text(status.left) if status.left is not None else "not known yet"
        head = f"step {status.number} of {status.count}, {status.step} · time left: {left}"
        return Group(Text(head, "bold"), table)


def time_left_text(left: "TimeLeft") -> str:
    """The time left: one number where it is known well enough, else from the least to the most."""
    least, most = duration(left.least), duration(left.most)
    if left.seconds is not None:
        return duration(left.seconds)
    return least if least == most else f"{least.removeprefix('about ')} to {most.removeprefix('about ')}"


def best_text(best: "Best") -> str:
    """The best of a rung in words."""
    from bitladder.evaluate import Figure

    kld = with_error(Figure(value=best.kld, error=best.error))
    size = f"{best.bytes / 1e9:.3f} GB" if best.bytes >= 1e8 else f"{best.bytes / 1e6:.2f} MB"
    return f"{size}, KLD {kld}" + (f" ({best.name})" if best.name else "")


def ladder_table(run: FinishedRun) -> Table:
    """A table of the full precision and every quant from the smallest to the largest.

    Figures within noise of the best are bold. "▸" marks the models on the Pareto front.
    """
    quality, speeds = tables.quality(run), tables.speeds(run)
    table = Table(
        [
            Column(""),
            Column("quant", fold=True),
            *figures("GB"),
            *figures("bpw", rank=1),
            *(Column(name, right=True, rank=rank) for name, rank in map(HEADS.__getitem__, quality.heads)),
            *figures(*(speeds.heads if speeds else ()), rank=7),
        ]
    )
    best = front(run.quants)
    # The report leaves out rows without figures, so rows are found by their names.
    measured = {line.label: line.cells for line in quality.lines}
    timed = {line.label: line.cells for line in speeds.lines} if speeds else {}
    none = tables.Cell(tables.DASH)
    for model in run.models:
        label = tables.label(model)
        cells = [*measured.get(label, (none,) * len(quality.heads))]
        if speeds:
            cells += timed.get(label, (none,) * len(speeds.heads))
        table.add(
            ON_FRONT if model in best else "",
            " ".join(label.split()),
            f"{model.scores.bytes / 1e9:.4g}",
            f"{model.scores.bpw:.2f}",
            *(Text(cell.text, "bold" if cell.best else "") for cell in cells),
        )
    return table


def unfinished_table(run: UnfinishedRun) -> Table:
    """What there is of a run that is not complete: the figures of each rung that was measured."""
    table = Table([Column("quant"), *figures("GB"), *figures("bpw", rank=2), *figures("PPL", rank=1), *figures("KLD")])
    for label, scores in run.measured.items():
        kld = with_error(scores.kld) if scores.kld else tables.DASH
        size = f"{scores.bytes / 1e9:.4g}", f"{scores.bpw:.2f}"
        table.add(label, *size, with_error(scores.ppl) if scores.ppl else tables.DASH, kld)
    for rung in run.missing:
        table.add(rung, *[tables.DASH] * 4)
    return table


def unfinished_json(run: UnfinishedRun, command: str) -> dict[str, Any]:
    """The Scores JSON of each model that was measured, and the command that goes on."""
    models = [{**scores.to_json(), "label": label} for label, scores in run.measured.items()]
    return {"complete": False, "command": command, "models": models, "missing": list(run.missing)}


def text_table(run: FinishedRun) -> Table:
    """A table of the KLD of every quant on each of several texts. Figures within noise of the best are bold."""
    shown = tables.by_text(run) or tables.ModelTable((), ())
    table = Table([Column("quant", fold=True), *figures(*shown.heads)])
    for line in shown.lines:
        cells = (Text(cell.text, "bold" if cell.best else "") for cell in line.cells)
        table.add(" ".join(line.label.split()), *cells)
    return table


def mixed_lines(run: FinishedRun) -> list[str]:
    """A line for each two quants that texts order in two ways."""
    return [f"Better on one text, worse on another: {sentence}" for sentence in tables.mixed(run)]


def pareto_plot(run: FinishedRun, *, width: int, height: int) -> list[str]:
    """Lines that plot size against KLD, both logarithmic; empty if no model has a KLD above 0.

    Parameters:
        run: the run to show.
        width: characters of a line.
        height: lines of the plot, without heading, axis and legend.
    """
    # Rungs are drawn last, so that they hide other marks at the same place.
    models = sorted(run.quants, key=lambda model: (model.role == "rung", -model.scores.bytes))
    points = [
        Point(
            model.scores.bytes,
            model.scores.kld.value,
            MARKS[model.role],
            model.label if model.role == "rung" else "",
        )
        for model in models
        if model.scores.kld
    ]
    lines = scatter(points, width=width, height=height, x_text=short_size)
    if not lines:
        return []
    roles = [role for role in LEGEND if any(model.role == role and model.scores.kld for model in models)]
    legend = [*(LEGEND[role] for role in roles), f"{ON_FRONT} in the table: on the Pareto front"]
    return ["KLD (nats per token) against size", *lines, *_lines_of(legend, width)]


def _lines_of(entries: Sequence[str], width: int) -> list[str]:
    """Entries side by side, as many in a line as its width has room for."""
    lines = list[str]()
    for entry in entries:
        if lines and len(joined := f"{lines[-1]}   {entry}") <= width:
            lines[-1] = joined
        else:
            lines.append(entry)
    return lines


def front(models: Sequence[RunModel]) -> list[RunModel]:
    """The Pareto front: models for which no other one is at least as small and as good, and better in one of both."""
    with_kld = [model for model in models if model.scores.kld]
    best: list[RunModel] = []
    for model in sorted(with_kld, key=lambda model: (model.scores.bytes, _kld(model))):
        if not best or _kld(model) < _kld(best[-1]):
            best.append(model)
    return best


def ladder_json(run: FinishedRun) -> dict[str, Any]:
    """The Scores JSON of each model, with its label, its role, and whether it is on the Pareto front."""
    best = front(run.quants)
    models = [
        {**model.scores.to_json(), "label": model.label, "role": model.role, "pareto": model in best}
        for model in run.models
    ]
    return {"name": run.name, "base_model": run.origin, "command": run.record.command, "models": models}


def _kld(model: RunModel) -> float:
    return model.scores.kld.value if model.scores.kld else float("inf")


def short_size(count: float) -> str:
    """A size in three digits: "9.64 MB", "1.23 GB"."""
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def estimate_table(estimate: Estimate) -> Table:
    """What each step of a run takes. The steps of one kind for several rungs are one line, of which the most counts."""
    table = Table([Column("step"), *figures("wall", "core min", "memory GB", "disk GB")])
    verbs = dict.fromkeys(stage.name.split()[0] for stage in estimate.stages)
    for verb in verbs:
        stages = [stage for stage in estimate.stages if stage.name.split()[0] == verb]
        seconds, cores = (sum(getattr(stage, name) for stage in stages) for name in ("seconds", "core_seconds"))
        if cores < 1:
            continue
        memory, disk = (max(getattr(stage, name) for stage in stages) for name in ("memory_bytes", "disk_bytes"))
        table.add(
            verb if len(stages) == 1 else f"{verb} × {len(stages)}",
            duration(seconds).removeprefix("about ") if seconds >= SHORTEST else f"< {SHORTEST} s",
            *(f"{figure:.{1 if figure >= 1 else 2}f}" for figure in (cores / 60, memory / 1e9, disk / 1e9)),
        )
    return table


def estimate_lines(estimate: Estimate) -> list[str]:
    """The total in words, and what it was estimated for."""
    machine = estimate.machine
    speeds = f"products {machine.products:.2f}, NumPy {machine.blas:.2f}, rounding {machine.kernels:.2f}, "
    speeds += f"the library's blocks {machine.quantization:.2f}"
    return [
        f"total: {in_words(estimate)}, of which {estimate.kept_bytes / 1e9:.3g} GB stay",
        f"{number_of(machine.threads, 'thread')}; speed of a core, of that of the reference: {speeds}",
    ]


SHOWN = 4  # kinds of tensors of a width that are named


def diagnosis_json(diagnosis: Diagnosis, cost: Estimate | None = None) -> dict[str, Any]:
    """The diagnosis as a JSON value, with what a run takes."""
    facts = dataclasses.asdict(dataclasses.replace(diagnosis, shape=None))
    del facts["shape"]  # the estimate follows from it
    return {"works": diagnosis.works, **facts, "estimate": None if cost is None else cost.sums()}


def diagnosis_table(diagnosis: Diagnosis, cost: Estimate | None = None) -> Table:
    """A line for each thing that matters to a run, and what the whole ladder takes; the verdict comes last."""
    table = Table([Column(""), Column("", fold=True)])
    for topic, text in _lines(diagnosis):
        table.add(Text(topic, "bold"), text)
    if cost is not None:
        table.add(Text("a run", "bold"), f"{in_words(cost)} (`bitladder estimate` for other options)")
    for remark in diagnosis.remarks:
        table.add(Text("remark", "bold"), remark)
    if diagnosis.works:
        table.add(Text("verdict", "bold"), "it works, as far as headers show")
    for reason in diagnosis.reasons:
        table.add(Text("cannot work", "bold"), reason)
    return table


def _lines(about: Diagnosis) -> Iterator[tuple[str, str]]:
    """Topic and text."""
    yield "model", f"{about.model} ({about.source})"
    if about.classes:
        yield "class", ", ".join(about.classes)
    if about.architecture is None:
        return
    yield "architecture", about.architecture
    if about.converter:
        yield "converter", "bitladder's own" if about.converter == "bitladder" else "llama.cpp's, run by bitladder"
    yield "weights", f"{about.weights:,} in {number_of(about.blocks, 'block')}, {about.encoding}"
    if about.tokenizer:
        yield "tokenizer", about.tokenizer
    if about.tied_head is not None:
        yield "head", "tied to the embeddings" if about.tied_head else "a matrix of its own"
    if about.experts:
        yield (
            "experts",
            f"{about.experts} in a block, {about.experts_used} for a token, {about.expert_share:.0%} of the weights; "
            "all experts of a tensor get one type",
        )
    if about.recurrent:
        text = f"{len(about.recurrent)} of the blocks ({ranges(about.recurrent)})"
        if about.recurrent_kept:
            text += f"; {', '.join(about.recurrent_kept)} stay in full precision"
        yield "recurrent", text
    if about.prediction:
        yield (
            "prediction heads",
            f"{number_of(about.prediction, 'weight')} for further tokens; no text reaches them, so they get Q8_0",
        )
    if about.perception:
        done = "converted to a projector beside the model" if about.projector else "left out"
        yield "images, sounds", f"{number_of(about.perception, 'weight')}, {done}"
    yield from _widths(about)
    why = f"positions: {about.no_gradients}" if about.no_gradients else "gradients"
    yield "moments", f"tokens are weighted by {why}"
    links = ", ".join(f"{count} × {kind}" for kind, count in about.links.items())
    yield "smoothing", links or "no scale can move; rungs are made of the original model"


def _widths(about: Diagnosis) -> Iterator[tuple[str, str]]:
    """A line for all widths in whose place the same types are used."""
    groups: dict[str, list[WidthMisfit]] = {}
    for misfit in about.misfits:
        groups.setdefault(", ".join(f"{kind} becomes {used}" for kind, used in misfit.instead.items()), []).append(
            misfit
        )
    for types, members in groups.items():
        kinds = list(dict.fromkeys(kind for misfit in members for kind in misfit.kinds))
        named = ", ".join(kinds[:SHOWN]) + (" and others" if len(kinds) > SHOWN else "")
        share = sum(misfit.weights for misfit in members) / about.weights
        part = "less than 1%" if share < 0.01 else f"{share:.0%}"
        widths = ", ".join(str(misfit.width) for misfit in members)
        yield f"rows of {widths}", f"{named} ({part} of the weights) hold no super-blocks of 256: {types}"
    if not about.misfits:
        yield "rows", "all hold super-blocks of 256"


def next_steps(run: FinishedRun) -> list[str]:
    """What comes after a run: its pages, the rung for usual memories, and the commands that show and publish it."""
    folder = shlex.quote(str(run.layout.folder))
    lines = [f"card: {run.layout.card}", f"report: {run.layout.report}"]
    if run.usual_context is not None:
        lines += _for_memories(run, run.usual_context)
    lines += [f"show: bitladder show {folder}", f"publish: bitladder push {folder} {run.record.repo or 'OWNER/NAME'}"]
    return lines + deletable(run)


def _for_memories(run: FinishedRun, context: int) -> list[str]:
    """The best rung for each usual memory with a context of so many tokens."""
    lines, chosen = list[str](), dict[str, list[int]]()
    for memory in USUAL_MEMORIES:
        if best := best_fitting(run, memory):
            chosen.setdefault(best.label, []).append(memory)
        else:
            lines.append(f"for {memory} GB: no rung with a context of {number_of(context, 'token')}")
    for rung in run.rungs:
        if memories := chosen.get(rung.label):
            sizes = " or ".join(", ".join(map(str, memories)).rsplit(", ", 1))
            file = shlex.quote(str(run.layout.model(rung.scores.model)))
            lines.append(f"for {sizes} GB: {rung.label}, llama-server -m {file} -c {context}")
    return lines


def deletable(run: FinishedRun) -> list[str]:
    """What may be deleted of a run directory, its bytes, and what is lost; empty if nothing may be, as during a run."""
    work = run.layout.work
    size = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    if not size or is_running(run.layout.folder):
        return []
    steps = run.manifest.steps
    again = [name for name in ("base", "moments", "smooth") if name in steps and steps[name].outputs]
    parts = [f"{name} ({duration(steps[name].seconds)})" for name in again]
    parts += ["the blocks that its plan tries"] if any(name.startswith("plan ") for name in steps) else []
    text = f"may be deleted: {work} ({short_size(size)})."
    if parts:
        text += f" A run that adds a rung would then repeat: {', '.join(parts)}."
    if again != ["base"]:
        text += " `bitladder verify` would not work any more."
    return [text]

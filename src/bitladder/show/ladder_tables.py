"""The ladder of a run as tables, a plot and JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from bitladder.evaluate import RunScores
from bitladder.ladder import Estimate, in_words
from bitladder.report import FinishedRun, RunModel, by_size, gigabytes, percent, tables, with_error
from bitladder.show.scatter import Point, scatter
from bitladder.units import duration

MARKS = {"rung": "●", "naive": "◇", "third-party": "†"}
LEGEND = {
    "rung": "● a rung",
    "naive": "◇ a plain preset",
    "third-party": "† by others",
}
# Columns of the report's table → their headings in the terminal.
COLUMNS = {"PPL": "PPL", "ρPPL": "ρPPL", "KLD": "KLD", "RMS Δp": "RMS Δp", "Same top token": "same top"}
ON_FRONT = "▸"
# Lines that are narrower than these have no speeds, and not all figures.
WITH_SPEEDS, WITH_ALL = 160, 110


def ladder_table(run: FinishedRun, width: int = 240) -> Table:
    """A table of the full precision and every quant from the smallest to the largest.

    Figures within noise of the best are bold. "▸" marks the models on the Pareto front.

    Parameters:
        run: the run to show.
        width: characters of a line; if it is short, some columns are left out.
    """
    quality, speeds = tables.quality(run), tables.speeds(run) if width >= WITH_SPEEDS else None
    shown_columns = list(COLUMNS) if width >= WITH_ALL else ["PPL", "KLD", "RMS Δp"]
    picked = [(index, COLUMNS[head]) for index, head in enumerate(quality.heads) if head in shown_columns]
    gain = [index for index, head in enumerate(quality.heads) if head == tables.GAIN]
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("")
    table.add_column("quant", overflow="fold")
    heads = ["GB", "bpw", *(name for _, name in picked), *(tables.GAIN for _ in gain)]
    for head in [*heads, *(speeds.heads if speeds else ())]:
        table.add_column(head, justify="right", overflow="fold")
    best = front(run.quants)
    # The report leaves out rows without figures, so rows are found by their names.
    measured = {line.label: line.cells for line in quality.lines}
    timed = {line.label: line.cells for line in speeds.lines} if speeds else {}
    none = tables.Cell(tables.DASH)
    for model in run.models:
        label = tables.label(model)
        row = measured.get(label, (none,) * len(quality.heads))
        cells = [row[index] for index in [*(index for index, _ in picked), *gain]]
        if speeds:
            cells += timed.get(label, (none,) * len(speeds.heads))
        shown = [Text(cell.text, "bold" if cell.best else "") for cell in cells]
        scores = model.scores
        table.add_row(
            ON_FRONT if model in best else "",
            _cell(label),
            f"{scores.bytes / 1e9:.4g}",
            f"{scores.bpw:.2f}",
            *shown,
        )
    return table


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
    lines = scatter(points, width=width, height=height, x_text=_size)
    if not lines:
        return []
    roles = [role for role in LEGEND if any(model.role == role and model.scores.kld for model in models)]
    legend = "   ".join(LEGEND[role] for role in roles) + f"   {ON_FRONT} in the table: on the Pareto front"
    return ["KLD (nats per token) against size", *lines, legend]


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


@dataclasses.dataclass(frozen=True)
class LadderRow:
    """A model of the table at the end of a run, every field as it is shown."""

    label: str
    file: str
    size: str
    bpw: str
    ppl: str
    rho: str
    kld: str
    rms: str
    same_top: str


def ladder_row(label: str, scores: RunScores) -> LadderRow:
    """A model's figures as text. What was not measured is a dash."""
    return LadderRow(
        label=label,
        file=scores.model,
        size=gigabytes(scores.bytes),
        bpw=f"{scores.bpw:.2f}",
        ppl=with_error(scores.ppl),
        rho=percent(scores.rho_ppl) if scores.rho_ppl is not None else tables.DASH,
        kld=with_error(scores.kld) if scores.kld else tables.DASH,
        rms=f"{with_error(scores.delta_p.rms, 100)} %" if scores.delta_p else tables.DASH,
        same_top=f"{with_error(scores.same_top_p, 100)} %" if scores.same_top_p else tables.DASH,
    )


def ladder_rows(measured: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[LadderRow]:
    """Rows of Scores JSON values: the first (full precision), then the others from the smallest file to the largest.

    Parameters:
        measured: the scores of each model.
        labels: the label of each model.
    """
    scores = [(label, RunScores.model_validate(document)) for label, document in zip(labels, measured, strict=True)]
    return [ladder_row(label, model) for label, model in [scores[0], *by_size(scores[1:])]]


def _kld(model: RunModel) -> float:
    return model.scores.kld.value if model.scores.kld else float("inf")


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _cell(text: str) -> Text:
    return Text(" ".join(text.split()))


def estimate_table(estimate: Estimate) -> Table:
    """What each step of a run takes. The steps of one kind for several rungs are one line, of which the most counts."""
    columns = (Column(head, justify="right") for head in ("wall", "core min", "memory GB", "disk GB"))
    table = Table("step", *columns, box=None, pad_edge=False, collapse_padding=True)
    verbs = dict.fromkeys(stage.name.split()[0] for stage in estimate.stages)
    for verb in verbs:
        stages = [stage for stage in estimate.stages if stage.name.split()[0] == verb]
        seconds, cores = (sum(getattr(stage, name) for stage in stages) for name in ("seconds", "core_seconds"))
        if cores < 1:
            continue
        memory, disk = (max(getattr(stage, name) for stage in stages) for name in ("memory_bytes", "disk_bytes"))
        table.add_row(
            verb if len(stages) == 1 else f"{verb} × {len(stages)}",
            duration(seconds).removeprefix("about "),
            f"{cores / 60:.1f}",
            f"{memory / 1e9:.1f}",
            f"{disk / 1e9:.1f}",
        )
    return table


def estimate_lines(estimate: Estimate) -> list[str]:
    """The total in words, and what it was estimated for."""
    machine = estimate.machine
    speeds = f"products {machine.products:.2f}, NumPy {machine.blas:.2f}, rounding {machine.kernels:.2f}"
    return [
        f"total: {in_words(estimate)}, of which {estimate.kept_bytes / 1e9:.3g} GB stay",
        f"{machine.threads} threads; speed of a core, of that of the reference: {speeds}",
    ]

"""The ladder of a run directory as a table, a plot and JSON."""

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from bitladder.report import tables
from bitladder.report.rundir import Measured, Run
from bitladder.show.scatter import Point, scatter

MARKS = {"rung": "●", "naive": "◇", "third-party": "†"}
LEGEND = {
    "rung": "● a rung",
    "naive": "◇ the preset by itself",
    "third-party": "† somebody else's",
}
# Columns of the report's table that the terminal's has too, with what they are called here.
COLUMNS = {"PPL": "PPL", "ρPPL": "ρPPL", "KLD": "KLD", "RMS Δp": "RMS Δp", "Same top token": "same top"}
ON_FRONT = "▸"
# Narrower lines than these have no speeds, and only the first figures.
WITH_SPEEDS, WITH_ALL = 160, 110


def ladder_table(run: Run, width: int = 240) -> Table:
    """Every quant from the smallest to the largest below the full precision; figures within noise of the best in bold.

    "▸" is before what is on the Pareto front. In lines of less than `width` characters some columns are left out.
    """
    quality, speeds = tables.quality(run), tables.speeds(run) if width >= WITH_SPEEDS else None
    shown_columns = list(COLUMNS) if width >= WITH_ALL else ["PPL", "KLD", "RMS Δp"]
    picked = [(index, COLUMNS[head]) for index, head in enumerate(quality.heads) if head in shown_columns]
    gain = [index for index, head in enumerate(quality.heads) if head.startswith("KLD less")]
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("")
    table.add_column("quant", overflow="fold")
    heads = ["GB", "bpw", *(name for _, name in picked), *("KLD − preset" for _ in gain)]
    for head in [*heads, *(speeds.heads if speeds else ())]:
        table.add_column(head, justify="right", overflow="fold")
    best = front(run.quants)
    # The report leaves out rows in which nothing was measured, so rows are found by their names.
    measured = {line.label: line.cells for line in quality.lines}
    timed = {line.label: line.cells for line in speeds.lines} if speeds else {}
    none = tables.Cell(tables.DASH)
    for model in [run.base, *run.quants]:
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


def pareto_plot(run: Run, *, width: int, height: int) -> list[str]:
    """Size against KLD, both logarithmic, with a heading and a legend; empty if nothing has a KLD above 0."""
    # Rungs are drawn last, over whatever falls on the same place.
    models = sorted((one for one in run.quants if one.scores.kld), key=lambda one: (one.role == "rung", -one.size[0]))
    points = [
        Point(one.scores.bytes, one.scores.kld.value, MARKS[one.role], one.label if one.role == "rung" else "")
        for one in models
        if one.scores.kld
    ]
    lines = scatter(points, width=width, height=height, x_text=_size)
    if not lines:
        return []
    roles = [role for role in LEGEND if any(one.role == role for one in models)]
    legend = "   ".join(LEGEND[role] for role in roles) + f"   {ON_FRONT} in the table: on the Pareto front"
    return ["KLD (nats per token) against size", *lines, legend]


def front(models: Sequence[Measured]) -> list[Measured]:
    """The Pareto front: for none of them is another file as small, with as little KLD, and better in one of the two."""
    with_kld = sorted((one for one in models if one.scores.kld), key=lambda one: (one.scores.bytes, _kld(one)))
    found: list[Measured] = []
    for one in with_kld:
        if not found or _kld(one) < _kld(found[-1]):
            found.append(one)
    return found


def ladder_json(run: Run) -> dict[str, Any]:
    """The Scores JSON of each model as the run wrote it, with its label, its role, and whether it is on the front."""
    best = front(run.quants)
    names = {**{one.label: one.label for one in [*run.rungs, *run.others]}, run.base.label: "base"}
    models = []
    for one in [run.base, *run.quants]:
        name = names.get(one.label) or f"{one.label.removesuffix(' preset')}.naive"
        path = run.folder / "scores" / f"{name}.json"
        scores = json.loads(path.read_text(encoding="utf-8"))
        models.append({**scores, "label": one.label, "role": one.role, "pareto": one in best})
    return {"name": run.name, "base_model": run.origin, "command": run.record.command, "models": models}


def _kld(model: Measured) -> float:
    return model.scores.kld.value if model.scores.kld else float("inf")


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _cell(text: str) -> Text:
    return Text(" ".join(text.split()))

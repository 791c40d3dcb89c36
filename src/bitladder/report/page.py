"""report.html: one file that shows a run. It opens from disk and needs no network.

The page contains plotly.js, compressed. Its security policy forbids every connection.
"""

import base64
import functools
import gzip
import importlib.resources
import json
import pathlib
from typing import Any

import jinja2
import markupsafe

from bitladder.report import tables
from bitladder.report.card import facts, write_if_changed
from bitladder.report.divergence_charts import agreement, pareto, predicted, prediction_pairs
from bitladder.report.finished_run import FinishedRun, read_run
from bitladder.report.score_charts import percentiles, speed, task_bars
from bitladder.report.tables import gigabytes, with_error
from bitladder.report.tensors import PRICED_MODELS, read_tensors
from bitladder.rundir import Layout

STYLES = ("report.css",)
SCRIPTS = ("theme.js", "charts.js", "tables.js", "tensors.js", "main.js")


def write_report(folder: pathlib.Path) -> bool:
    """Writes the report of a finished run, and returns whether it changed.

    Raises:
        BitladderError: the directory has no finished run, or a file of it cannot be read.
    """
    return write_if_changed(Layout(folder).report, render_report(folder))


def render_report(folder: pathlib.Path) -> str:
    """The HTML of the page. The same run directory gives the same text. Raises BitladderError as `write_report`."""
    run = read_run(folder)
    charts = make_charts(run)
    tensors = read_tensors(run)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bitladder.report"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        **facts(run),
        charts=charts,
        tried=run.tried,
        other_text=run.other_text,
        agreement=agreement(prediction_pairs(run)),
        tensors=tensors,
        checks={PRICED_MODELS[smoothed]: prices.check for smoothed, prices in run.prices.items() if prices.check},
        data=_json({"charts": charts, "tensors": tensors.to_json()}),
        style=_web(STYLES),
        script=_web(SCRIPTS),
        plotly=_plotly(),
        count_text=tables.count_text,
        gigabytes=gigabytes,
        significant=tables.significant,
        with_error=with_error,
    )


def make_charts(run: FinishedRun) -> dict[str, dict[str, Any]]:
    """Every chart that the run has figures for: section → name of the choice → figure of plotly.js."""
    charts: dict[str, dict[str, Any]] = {}
    # The first choice is the mean of several texts.
    views = {"mean of the texts": run} if run.texts else {"": run}
    views |= {text: run.on(index) for index, text in enumerate(run.texts)}
    if pareto(run):
        charts["pareto"] = {name: chart for name, view in views.items() if (chart := pareto(view))}
    if chart := predicted(prediction_pairs(run)):
        charts["predicted"] = {"": chart}
    if percentiles(run):
        charts["percentiles"] = {name: chart for name, view in views.items() if (chart := percentiles(view))}
    if table := tables.tasks(run):
        charts["tasks"] = {name: task_bars(run, name) for name in reversed(table.heads)}
    if tests := tables.speed_tests(run):
        # Most readers look for generation, so it comes first.
        charts["speed"] = {test: speed(run, test) for test in sorted(tests, key=lambda test: not test.startswith("tg"))}
    return charts


def _json(value: Any) -> markupsafe.Markup:
    """JSON that cannot end the script element which contains it."""
    return markupsafe.Markup(json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"))


def _web(names: tuple[str, ...]) -> markupsafe.Markup:
    folder = importlib.resources.files("bitladder.report") / "web"
    return markupsafe.Markup("\n".join((folder / name).read_text(encoding="utf-8") for name in names))


@functools.cache
def _plotly() -> str:
    """plotly.js, compressed, in Base64: about 2 MB instead of 4.8."""
    data = importlib.resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()

"""report.html: one file that shows a run, opens from disk, and asks nothing of any network.

plotly.js draws; it is put into the page compressed, and the page's own security policy forbids every connection.
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

from bitladder.files import write_text
from bitladder.report import tables
from bitladder.report.card import facts
from bitladder.report.charts.bars import percentiles, task_bars
from bitladder.report.charts.pareto import pareto
from bitladder.report.charts.predicted import agreement, pairs, predicted
from bitladder.report.charts.speed import speed
from bitladder.report.numbers import gigabytes, with_error
from bitladder.report.rundir import Run, read_run
from bitladder.report.tensors import read_tensors

NAME = "report.html"
STYLES = ("report.css",)
SCRIPTS = ("theme.js", "charts.js", "tables.js", "tensors.js", "main.js")


def write_report(folder: pathlib.Path) -> bool:
    """Write the report of a finished run; return whether it differs from what was there.

    Raises BitladderError if the directory holds no finished run, or a file of it cannot be read.
    """
    text, path = render_report(folder), folder / NAME
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    write_text(path, text)
    return True


def render_report(folder: pathlib.Path) -> str:
    """The page's HTML. The same run directory gives the same text. Raises BitladderError as `write_report`."""
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
        tried=run.candidates,
        other_text=_other_text(run),
        agreement=agreement(pairs(run)),
        tensors=tensors,
        check=run.sensitivity.check if run.sensitivity else None,
        data=_json({"charts": charts, "tensors": tensors.to_json()}),
        style=_web(STYLES),
        script=_web(SCRIPTS),
        plotly=_plotly(),
        count_text=tables.count_text,
        gigabytes=gigabytes,
        with_error=with_error,
    )


def make_charts(run: Run) -> dict[str, dict[str, Any]]:
    """Every chart that the run has figures for: section → name of the choice → figure of plotly.js."""
    made: dict[str, dict[str, Any]] = {}
    if chart := pareto(run):
        made["pareto"] = {"": chart}
    if chart := predicted(pairs(run)):
        made["predicted"] = {"": chart}
    if chart := percentiles(run):
        made["percentiles"] = {"": chart}
    if found := tables.tasks(run):
        made["tasks"] = {name: task_bars(run, name) for name in reversed(found.heads)}
    if tests := tables.speed_tests(run):
        # Generation first: it is what most readers look for.
        made["speed"] = {test: speed(run, test) for test in sorted(tests, key=lambda test: not test.startswith("tg"))}
    return made


def _other_text(run: Run) -> str | None:
    """The text that candidates were measured on, if it is not the one of the scores."""
    tried = run.candidates
    if not tried or not tried.text or not any(one.kld for one in tried.candidates):
        return None
    return tried.text.name if tried.text.sha256 != run.base.scores.text.sha256 else None


def _json(value: Any) -> markupsafe.Markup:
    """JSON that nothing in it can end the script element of."""
    return markupsafe.Markup(json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"))


def _web(names: tuple[str, ...]) -> markupsafe.Markup:
    folder = importlib.resources.files("bitladder.report") / "web"
    return markupsafe.Markup("\n".join((folder / name).read_text(encoding="utf-8") for name in names))


@functools.cache
def _plotly() -> str:
    """plotly.js, compressed, in Base64: some 2 MB in place of 4.8."""
    data = importlib.resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()

"""report.html: one file that shows a run, with what is known of each tensor. It opens from disk and needs no network.

The page contains plotly.js, compressed. Its security policy forbids every connection.
"""

import base64
import contextlib
import dataclasses
import functools
import gzip
import importlib.resources
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
import markupsafe

from bitladder.calibrate import TensorStatistics
from bitladder.engine import type_by_name
from bitladder.errors import BitladderError
from bitladder.gguf import block_of, kind_of, reading_order
from bitladder.report import tables
from bitladder.report.card import facts, write_if_changed
from bitladder.report.charts import agreement, pareto, percentiles, predicted, prediction_pairs, speed, task_bars
from bitladder.report.finished_run import FinishedRun, Prices, RunModel, read_importance, read_run, read_shapes
from bitladder.report.tables import gigabytes, with_error
from bitladder.rundir import Layout
from bitladder.units import number_of

# What prices are of, by whether that model is smoothed.
PRICED_MODELS = {True: "the smoothed model", False: "the original model"}
# Field of the statistics, its heading, and whether it is shown in percent.
STATISTICS = (
    ("sum", "Σ(Act²)", False),
    ("entropy_norm", "E(norm)", True),
    ("zd", "ZD", True),
    ("cossim", "CosSim", False),
)
STYLES = ("report.css",)
SCRIPTS = ("theme.js", "charts.js", "tables.js", "tensors.js", "main.js")


@dataclasses.dataclass(frozen=True)
class Tensors:
    """All tensors of a run, for the page's script.

    Parameters:
        tensors: name, place, size, statistics and prices of each tensor, in reading order. A price is found by the
            name of the prices, as of `named_prices`, and the type.
        files: by label, the type of each tensor in that order; "" if the file does not have the tensor.
        priced_by: by label, the name of the prices of the file; "" if there are none.
        presets: by rung, the label of the preset by itself.
        opened: the file that is shown first: the rung in the middle of the ladder.
        bpw: bits per weight of every type that occurs.
        priced: the types for which any tensor has a price.
        statistics: key, title and unit of the statistics that are known.
    """

    tensors: list[dict[str, Any]]
    files: dict[str, list[str]]
    priced_by: dict[str, str]
    presets: dict[str, str]
    opened: str | None
    bpw: dict[str, float]
    priced: list[str]
    statistics: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The value as JSON."""
        return dataclasses.asdict(self)


def read_tensors(run: FinishedRun) -> Tensors:
    """Reads what the directory has. Raises BitladderError if the importance matrix or a GGUF is damaged."""
    files = {model.label: _types(model.recipe.tensors) for model in run.quants if model.recipe}
    names = sorted({name for types in files.values() for name in types}, key=reading_order)
    shapes, statistics = read_shapes(run), {entry.tensor: entry for entry in read_importance(run)}
    named = named_prices(run)
    prices = {name: _prices(named, name) for name in names}
    priced = {kind for by_name in prices.values() for by_type in by_name.values() for kind in by_type}
    known = bits(priced.union(*(types.values() for types in files.values())))
    return Tensors(
        tensors=[_tensor(name, shapes.get(name), statistics.get(name), prices[name]) for name in names],
        files={label: [types.get(name, "") for name in names] for label, types in files.items()},
        priced_by={model.label: _price_of(run, model) for model in run.quants if model.recipe},
        presets={rung: naive.label for rung, naive in run.naive.items() if naive.recipe},
        opened=run.rungs[len(run.rungs) // 2].label if run.rungs else None,
        bpw=known,
        priced=sorted(priced, key=lambda kind: (known.get(kind, 0.0), kind)),
        statistics=[
            {"key": key, "title": title, "percent": percent}
            for key, title, percent in STATISTICS
            if any(getattr(entry, key) is not None for entry in statistics.values())
        ],
    )


def bits(kinds: Iterable[str]) -> dict[str, float]:
    """Bits per weight of types. Types that this library does not know are left out."""
    known = {}
    for kind in sorted(kinds):
        with contextlib.suppress(BitladderError):
            known[kind] = type_by_name(kind).bpw
    return known


def canonical(kind: str) -> str:
    """The name of a type as ggml spells it, such as "q4_K"; in lower case if this library does not know the type."""
    try:
        return type_by_name(kind).name
    except BitladderError:
        return kind.lower()


def _types(tensors: Mapping[str, str]) -> dict[str, str]:
    return {name: canonical(kind) for name, kind in tensors.items()}


def named_prices(run: FinishedRun) -> dict[str, Prices]:
    """All prices, by a name for readers: the model, and the rungs where there are several files of one model."""
    named = {}
    for smoothed, files in run.prices.items():
        for prices in files.values():
            rungs = f" ({prices.rungs[0]} to {prices.rungs[-1]})" if len(files) > 1 and prices.rungs else ""
            named[f"{PRICED_MODELS[smoothed]}{rungs}"] = prices
    return named


def _price_of(run: FinishedRun, model: RunModel) -> str:
    prices = run.prices_for(model)
    return next((name for name, each in named_prices(run).items() if each is prices), "")


def _prices(named: Mapping[str, Prices], tensor: str) -> dict[str, dict[str, float]]:
    """The prices of a tensor, by the name of the prices and the type."""
    return {
        name: {canonical(kind): price for kind, price in prices.tensors[tensor].kld.items()}
        for name, prices in named.items()
        if tensor in prices.tensors
    }


def _tensor(
    name: str,
    shape: tuple[int, ...] | None,
    statistics: TensorStatistics | None,
    prices: dict[str, dict[str, float]],
) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": name, "layer": block_of(name), "kind": kind_of(name)}
    if shape:
        fields |= {"shape": " × ".join(map(str, shape)), "elements": math.prod(shape)}
    if statistics:
        fields["statistics"] = {key: getattr(statistics, key) for key, _, _ in STATISTICS}
    if prices:
        fields["prices"] = prices
    return fields


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
    environment.filters["number_of"] = number_of
    return environment.get_template("report.html.jinja").render(
        **facts(run),
        charts=charts,
        tried=run.tried,
        other_text=run.other_text,
        agreement=agreement(prediction_pairs(run)),
        tensors=tensors,
        checks={name: prices.check for name, prices in named_prices(run).items() if prices.check},
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

"""What the HTML report holds; how it behaves in a browser is in test_report_browser.py."""

import base64
import gzip
import html.parser
import importlib.resources
import json
import math
import random
import re
import shutil

import plotly.graph_objects
import pytest
from click.testing import CliRunner
from report_card_run import change_manifest
from report_runs import CHECK, HIGH, LOW, RUNGS

from bitladder.errors import BitladderError
from bitladder.evaluate import Figure
from bitladder.gguf import GgufFile
from bitladder.plan import band_name
from bitladder.report import read_run, render_card, render_report, write_report
from bitladder.report.chart import LOOKS, log_ticks
from bitladder.report.charts import PredictionPair, agreement
from bitladder.report.page import make_charts, read_tensors
from bitladder.rundir import Layout

COLOUR = "#123456"


@pytest.fixture(scope="module")
def folder(report_run):
    return report_run


@pytest.fixture(scope="module")
def page(folder):
    return render_report(folder)


class Parser(html.parser.HTMLParser):
    """Every element with its attributes, and the text of those with an id."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if "id" in attributes:
            self._open = attributes["id"]
            self.texts[self._open] = ""

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open:
            self.texts[self._open] += data

    def ids(self):
        return {attributes["id"] for _, attributes in self.elements if "id" in attributes}


def painted(value):
    """A figure with real colours, for plotly's own check."""
    if isinstance(value, str):
        return COLOUR if value.startswith("@") else value
    if isinstance(value, list):
        return [painted(one) for one in value]
    if isinstance(value, dict):
        return {key: painted(one) for key, one in value.items()}
    return value


def test_every_chart_is_what_plotly_takes(folder):
    """plotly refuses an attribute that it does not know, and a value that an attribute cannot have."""
    charts = make_charts(read_run(folder))
    assert set(charts) == {"pareto", "predicted", "percentiles", "tasks", "speed"}
    for choices in charts.values():
        for chart in choices.values():
            figure = plotly.graph_objects.Figure(painted(chart))
            assert len(figure.data) == len(chart["data"])
    with pytest.raises(ValueError, match="colour"):
        plotly.graph_objects.Figure({"data": [{"type": "scatter", "colour": 1}]})


def test_points_are_where_the_scores_say(folder):
    chart = make_charts(read_run(folder))["pareto"][""]
    found = {trace["meta"]: trace for trace in chart["data"]}
    assert set(found) == {"candidate", "front", "naive", "third-party", "rung"}
    files = {"rung": RUNGS, "naive": ["Q4_K_M.naive"], "third-party": ["someone-Q5_K_M"]}
    for group, names in files.items():
        scores = [json.loads((folder / "scores" / f"{name}.json").read_text()) for name in names]
        expected = sorted((s["bytes"] / 1e9, s["kld"]["value"], s["kld"]["error"]) for s in scores)
        trace = found[group]
        assert list(zip(trace["x"], trace["y"], trace["error_y"]["array"], strict=True)) == expected
    assert len(found["candidate"]["x"]) == 2 * len(RUNGS)
    assert "token_embd: " in found["rung"]["hovertext"][0]


def test_the_front_goes_through_what_no_smaller_file_equals(folder):
    chart = make_charts(read_run(folder))["pareto"][""]
    points = [
        (x, y)
        for trace in chart["data"]
        if trace["meta"] in ("rung", "naive", "third-party")
        for x, y in zip(trace["x"], trace["y"], strict=True)
    ]
    front = next(trace for trace in chart["data"] if trace["meta"] == "front")
    for x, y in zip(front["x"], front["y"], strict=True):
        assert not [other for other in points if other[0] < x and other[1] < y]


def test_each_group_has_a_symbol_of_its_own():
    assert len({symbol for _, _, symbol in LOOKS.values()}) == len(LOOKS)


def test_sizes_of_tensors_are_those_of_the_file(folder):
    run = read_run(folder)
    tensors = read_tensors(run)
    with GgufFile(folder / run.rungs[1].scores.model) as file:
        label = run.rungs[1].label
        assert {one["name"] for one in tensors.tensors} == set(file.tensors)
        for one, kind in zip(tensors.tensors, tensors.files[label], strict=True):
            assert kind == file.tensors[one["name"]].type.name
            assert one["elements"] * tensors.bpw[kind] / 8 == file.tensors[one["name"]].nbytes
            assert one["shape"] == " × ".join(map(str, file.tensors[one["name"]].shape))
    assert tensors.presets == {"Q4_K_M": "Q4_K_M preset"}
    assert tensors.priced == ["q4_K", "q8_0"]
    assert [one["key"] for one in tensors.statistics] == ["sum", "entropy_norm", "zd", "cossim"]


def test_each_file_has_the_prices_of_its_band_and_of_the_model_that_it_is_made_of(folder, tmp_path):
    """Q8_0 is made of the smoothed model, and IQ3_S is of another band than the others: three files of prices."""
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    scores = mixed / "scores" / "Q8_0.json"
    scores.write_text(json.dumps(json.loads(scores.read_text()) | {"smoothed": True}))
    of_others, of_low, of_smoothed = (
        Layout(mixed).sensitivity(band_name(band), smoothed=smoothed)
        for band, smoothed in ((HIGH, False), (LOW, False), (HIGH, True))
    )
    for path, band, factor, pairs in ((of_low, LOW, 2, 18), (of_smoothed, HIGH, 3, 12)):
        prices = json.loads(of_others.read_text())
        for tensor in prices["tensors"].values():
            tensor["kld"] = {kind: factor * price for kind, price in tensor["kld"].items()}
        path.write_text(json.dumps(prices | {"rungs": band, "check": CHECK | {"pairs": pairs}}))
    page = render_report(mixed)
    data = json.loads(Parser(page).texts["data"])["tensors"]
    expected = {}
    for path in (of_others, of_low, of_smoothed):
        document = json.loads(path.read_text())["tensors"]
        expected[path] = {tensor: entry["kld"] for tensor, entry in document.items()}
    for label in data["files"]:
        own = expected[{"Q8_0": of_smoothed, "IQ3_S": of_low}.get(label, of_others)]
        shown = {one["name"]: one["prices"][data["priced_by"][label]] for one in data["tensors"] if "prices" in one}
        assert shown == own
    for pairs, named in (
        (12, "of the smoothed model"),
        (18, r"of the original model \(IQ3_S to Q3_K_L\)"),
        (24, r"Q8_0\)"),
    ):
        assert re.search(rf"Prices [^.]*{named} were checked against {pairs} measured swaps", page)
    # Files of others and presets are made of the model as it is: prices of the smoothed model alone are not theirs.
    for path in (mixed / "scores" / f"{rung}.json" for rung in RUNGS):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"smoothed": True}))
    data = json.loads(Parser(render_report(mixed)).texts["data"])["tensors"]
    assert {label for label, name in data["priced_by"].items() if name in data["tensors"][0]["prices"]} == set(RUNGS)


def test_how_well_prices_fit_is_told(page):
    assert "24 measured swaps" in page and "rank correlation 0.988, measured 1.23 ×" in page


def test_nothing_on_the_page_comes_from_elsewhere(page):
    """Links are for the reader to follow; everything that a browser would fetch by itself is inside."""
    for tag, attributes in Parser(page).elements:
        assert "src" not in attributes and "srcset" not in attributes
        if tag == "link":
            assert attributes["href"].startswith("data:")
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy":
            policy = attributes["content"]
    assert policy.startswith("default-src 'none';") and "http" not in policy
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_plotly_is_inside_as_its_package_has_it(page):
    packed = Parser(page).texts["plotly"]
    original = importlib.resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    assert gzip.decompress(base64.b64decode(packed)) == original


def test_every_link_within_the_page_has_its_place(page):
    parser = Parser(page)
    links = [attributes["href"] for tag, attributes in parser.elements if tag == "a"]
    assert {link[1:] for link in links if link.startswith("#")} <= parser.ids()
    assert all(re.match(r"#|https://huggingface\.co/|[\w./-]+\.(gguf|toml)$", link) for link in links)


def test_every_linked_file_is_there(folder, page):
    links = [attributes["href"] for tag, attributes in Parser(page).elements if tag == "a"]
    files = [link for link in links if not link.startswith(("#", "https:"))]
    assert len(files) > 6
    assert all((folder / link).is_file() for link in files)


def test_what_is_absent_leaves_its_part_out(run_dir):
    """A directory with scores and recipes only: no GGUF, matrix, candidates, prices, benchmarks or speeds."""
    parser = Parser(render_report(run_dir))
    assert {"choose", "pareto", "types", "made"} <= parser.ids()
    assert not {"predicted", "tasks", "speed", "heat-prices", "heat-statistics"} & parser.ids()
    # The text of JSON keys is not shown, so it must say nothing of what is unknown.
    assert "None" not in "".join(parser.texts[name] for name in parser.texts if name not in ("plotly", "data"))


def test_names_cannot_break_out_of_the_page(run_dir):
    nasty = '</script><img src=x onerror="alert(1)">&"\''
    path = run_dir / "ladder.json"
    value = json.loads(path.read_text())
    value["steps"]["convert"]["facts"]["general"]["name"] = nasty
    path.write_text(json.dumps(value))
    recipe = run_dir / "recipes" / "Q8_0.toml"
    recipe.write_text(recipe.read_text().replace("a = ", f"{json.dumps(nasty)} = "))
    text = render_report(run_dir)
    parser = Parser(text)
    assert not [tag for tag, _ in parser.elements if tag == "img"]
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert nasty in {one["name"] for one in data["tensors"]["tensors"]}


def test_the_report_is_written_only_if_it_differs(run_dir):
    assert write_report(run_dir)
    before = (run_dir / "report.html").stat().st_mtime_ns
    assert not write_report(run_dir)
    assert (run_dir / "report.html").stat().st_mtime_ns == before
    change_manifest(run_dir, complete=False)
    with pytest.raises(BitladderError, match="not finished"):
        write_report(run_dir)


def test_the_command_writes_card_and_report(run_dir):
    from bitladder.cli.run import card_command

    done = CliRunner().invoke(card_command, [str(run_dir), "--json"], catch_exceptions=False)
    names = {"README.md", "report.html"}
    assert json.loads(done.stdout) == [{"path": str(run_dir / name), "changed": True} for name in sorted(names)]
    assert (run_dir / "README.md").read_text() == render_card(run_dir)
    assert (run_dir / "report.html").read_text() == render_report(run_dir)
    done = CliRunner().invoke(card_command, [str(run_dir)], catch_exceptions=False)
    assert done.stdout.count("unchanged") == 2


@pytest.mark.parametrize("name", ["candidates.json", "sensitivity-IQ4_XS-Q8_0.json"])
def test_a_damaged_file_is_one_line(run_dir, name):
    (run_dir / name).write_text('{"candidates": [{"rung": 1}], "tensors": {"a": {"kld": "x"}}}')
    with pytest.raises(BitladderError, match=rf"{name}: (candidates|tensors)"):
        render_report(run_dir)


def test_any_span_has_some_ticks_and_not_too_many():
    draw = random.Random(0)
    for _ in range(2000):
        least = 10 ** draw.uniform(-7, 4)
        most = least * 10 ** draw.uniform(0.1, 6)
        inside = [tick for tick in log_ticks(least, most) if least <= tick <= most]
        assert 1 <= len(inside) <= 13, (least, most)


def test_rank_correlation_is_spearmans():
    """Without ties ρ = 1 − 6 Σd²/(n(n²−1))."""
    draw = random.Random(1)
    said = [draw.random() + 0.1 for _ in range(9)]
    seen = [draw.random() + 0.1 for _ in range(9)]
    ranks = [[sorted(values).index(one) for one in values] for values in (said, seen)]
    expected = 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (9 * 80)
    found = agreement(
        [PredictionPair("rung", "", p, Figure(value=m, error=0), "") for p, m in zip(said, seen, strict=True)]
    )
    assert found and math.isclose(found.ranks, expected)
    assert math.isclose(found.ratio, sorted(m / p for p, m in zip(said, seen, strict=True))[4])
    assert agreement([]) is None

"""The report in a real browser: skipped where there is no Chromium with its driver."""

import colorsys
import itertools
import json
import re
import shutil
import time

import pytest
from report_colours import BLIND, contrast, rgb, seen_by
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from bitladder.recipe import read_recipe
from bitladder.report import write_report

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver")


@pytest.fixture(scope="module")
def folder(report_run):
    write_report(report_run)
    return report_run


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The report, open in the browser."""

    def __init__(self, browser, folder):
        self.browser, self.folder = browser, folder

    def open(self, *, width=1280, height=900, theme="light", phone=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
        self.theme(theme)
        self.browser.get("about:blank")
        for kind in ("browser", "performance"):
            self.browser.get_log(kind)
        self.browser.get((self.folder / "report.html").as_uri())
        self.wait("document.documentElement.dataset.ready || !document.getElementById('trouble').hidden")
        return self

    def theme(self, name):
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        # The page redraws its charts some time after the browser has changed its colours.
        self.wait(
            "!document.documentElement.dataset.ready || ("
            f"matchMedia('(prefers-color-scheme: {name})').matches && "
            "document.getElementById('chart-pareto')._fullLayout.font.color === colour('text'))"
        )

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def wait(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"never: {condition}"
            time.sleep(0.05)

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def traces(self, chart):
        return self.run(f"return document.getElementById('{chart}').data.map(t => t.name)")

    def requests(self):
        messages = (json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance"))
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent]


@pytest.fixture(scope="module")
def page(browser, folder):
    return Page(browser, folder).open()


def test_it_loads_without_an_error_or_a_request(browser, folder):
    page = Page(browser, folder).open()
    assert page.run("return document.documentElement.dataset.ready") == "yes"
    assert browser.get_log("browser") == []
    own = (folder / "report.html").as_uri()
    assert [url for url in page.requests() if not url.startswith(("data:", "blob:"))] == [own]
    for chart in ("chart-pareto", "chart-predicted", "chart-percentiles", "chart-tasks", "chart-speed"):
        assert page.run(f"return document.querySelectorAll('#{chart} .main-svg .trace').length") > 0, chart
    for chart in ("heat-types", "heat-prices", "heat-statistics"):
        assert page.run(f"return document.querySelectorAll('#{chart} .heatmaplayer image').length") == 1, chart


def test_nothing_offers_to_send_the_charts_anywhere(page):
    """plotly.js has a button that uploads a chart; it must not be there."""
    titles = page.run("return [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title || '')")
    assert titles and not [title for title in titles if re.search("cloud|share|link|edit", title, re.IGNORECASE)]
    refused = page.browser.execute_async_script(
        "const done = arguments[0];"
        "document.addEventListener('securitypolicyviolation', event => done(event.violatedDirective));"
        "fetch('http://127.0.0.1:9/').catch(() => {})"
    )
    assert refused == "connect-src"
    page.browser.get_log("browser")


def test_groups_and_axes_of_the_plot(page):
    everything = page.traces("chart-pareto")
    assert set(everything) == {"better than every smaller file", "plain presets", "by others", "rungs"}
    # Candidates were measured on another text: they are hidden at first, and have an axis of their own.
    box = page.find("[data-group=candidate]")
    assert not box.is_selected()
    box.click()
    page.wait("document.getElementById('chart-pareto').data.some(t => t.name === 'candidates')")
    drawn = "document.getElementById('chart-pareto')._fullData.find(t => t.name === 'candidates')"
    assert page.run(f"return [{drawn}.yaxis, {drawn}.visible]") == ["y2", True]
    box.click()
    page.wait("!document.getElementById('chart-pareto').data.some(t => t.name === 'candidates')")
    kind = "return document.getElementById('chart-pareto')._fullLayout.yaxis.type"
    assert page.run(kind) == "log"
    box = page.find("[data-axis=yaxis]")
    box.click()
    page.wait("document.getElementById('chart-pareto')._fullLayout.yaxis.type === 'linear'")
    box.click()
    page.wait("document.getElementById('chart-pareto')._fullLayout.yaxis.type === 'log'")


def test_the_page_opens_on_a_rung(browser, folder):
    """Of IQ3_S, Q4_K_M and Q8_0 the middle one, with the types of its own file."""
    page = Page(browser, folder).open()
    assert Select(page.find("#file")).first_selected_option.text == page.find("#tensors-of").text == "Q4_K_M"


def test_another_file_changes_heat_map_and_table(page):
    for label, name in (("IQ3_S", "IQ3_S"), ("Q4_K_M preset", "Q4_K_M.naive"), ("Q4_K_M", "Q4_K_M")):
        Select(page.find("#file")).select_by_visible_text(label)
        types = read_recipe(page.folder / "recipes" / f"{name}.toml").tensors
        assert page.find("#tensors-of").text == label
        shown = page.run(
            "return [...document.querySelectorAll('#tensor-table tbody tr')].map(r => [r.cells[0], r.cells[1]]"
            ".map(c => c.textContent))"
        )
        assert dict(shown) == types
        told = page.run("return document.getElementById('heat-types').data[0].hovertext.flat().filter(Boolean)")
        matrices = {key for key, kind in types.items() if kind != "f32"}
        assert {re.match("<b>(.*?)</b><br>(.*?),", one).groups() for one in told} == {
            (key, types[key]) for key in matrices
        }


def test_prices_and_statistics_can_be_chosen(page):
    values = "return document.getElementById('heat-{}').data[0].z.flat().filter(v => v !== null)"
    before = page.run(values.format("prices"))
    Select(page.find("#price")).select_by_visible_text("q8_0")
    assert page.run(values.format("prices")) != before
    assert page.run(values.format("prices"))[0] == pytest.approx(-5)  # the first tensor costs 1e-5 nats as Q8_0
    before = page.run(values.format("statistics"))
    Select(page.find("#statistic")).select_by_visible_text("CosSim")
    assert page.run(values.format("statistics")) != before
    assert page.find("#statistic-name").text == "CosSim"
    Select(page.find("#price")).select_by_index(0)


def test_the_table_of_tensors_is_searched(page):
    Select(page.find("#file")).select_by_visible_text("Q4_K_M")
    types = read_recipe(page.folder / "recipes" / "Q4_K_M.toml").tensors
    field = page.find("#search")
    visible = (
        "return [...document.querySelectorAll('#tensor-table tbody tr')].filter(r => !r.hidden)"
        ".map(r => r.cells[0].textContent)"
    )
    for words, wanted in (
        ("ffn_down q6_k", {n for n, kind in types.items() if "ffn_down" in n and kind == "q6_K"}),
        ("blk.1.", {n for n in types if "blk.1." in n}),
        ("nothing of that kind", set()),
    ):
        field.clear()
        field.send_keys(words)
        assert set(page.run(visible)) == wanted
        assert page.find("#found").text == f"{len(wanted)} of {len(types)}"
    field.send_keys(Keys.CONTROL, "a", Keys.DELETE)
    assert len(page.run(visible)) == len(types)


def test_tables_are_sorted_by_mouse_and_keyboard(page):
    column = (
        "const t = document.querySelector(arguments[0]); const i = [...t.tHead.rows[0].cells]"
        ".findIndex(c => c.textContent === arguments[1]);"
        "return [...t.tBodies[0].rows].map(r => r.cells[i].dataset.value ?? null)"
    )
    button = (
        "return [...document.querySelectorAll(arguments[0] + ' th button')].find(b => b.textContent === arguments[1])"
    )
    for table, head in (("#tensor-table", "MB"), ("#tensor-table", "Adds, nats"), ("#pareto table", "KLD")):
        page.run("document.querySelector(arguments[0]).closest('details')?.setAttribute('open', '')", table)
        for descending in (False, True):
            page.run(button, table, head).send_keys(Keys.ENTER)
            values = page.run(column, table, head)
            known = [float(one) for one in values if one is not None]
            assert len(known) > 3 and known == sorted(known, reverse=descending)
            assert values[len(known) :] == [None] * (len(values) - len(known))  # unknown ones stay last
        sort = page.run(button, table, head).find_element(By.XPATH, "..").get_attribute("aria-sort")
        assert sort == "descending"


def test_choices_of_benchmark_and_speed(page):
    Select(page.find("[data-for=speed] select")).select_by_visible_text("pp32")
    page.wait("document.getElementById('chart-speed').layout.yaxis.title.text.includes('pp32')")
    scores = json.loads((page.folder / "scores" / "Q8_0.json").read_text())
    wanted = next(row["tokens_per_second"]["value"] for row in scores["bench"] if row["test"] == "pp32")
    shown = page.run("return document.getElementById('chart-speed').data.find(t => t.name === 'rungs').y")
    assert any(one == pytest.approx(wanted) for one in shown)


def test_everything_is_reached_by_the_tab_key(page):
    page.run("window.scrollTo(0, 0); document.activeElement.blur()")
    stops = (
        "return [...document.querySelectorAll('a, button, select, input, summary, [tabindex=\"0\"]')]"
        ".filter(e => e.checkVisibility())"
    )
    wanted = page.run(f"{stops}.length")
    page.run("document.querySelectorAll('*').forEach((e, i) => { e.dataset.number = i })")
    body = page.run("return document.body.dataset.number")
    seen = set()
    for _ in range(wanted + 5):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        number, outline = page.run(
            "const e = document.activeElement; return [e.dataset.number, getComputedStyle(e).outlineStyle]"
        )
        seen.add(number)
        assert outline != "none" or number == body  # what has the focus can be seen to have it
    unseen = ".filter(e => !arguments[0].includes(e.dataset.number)).map(e => e.outerHTML.slice(0, 90))"
    missing = page.run(stops + unseen, list(seen))
    assert not missing


@pytest.mark.parametrize("chart", ["chart-pareto", "chart-percentiles", "chart-tasks", "heat-types"])
def test_arrow_keys_tell_what_hovering_tells(page, chart):
    element = page.find(f"#{chart}")
    page.run("arguments[0].focus()", element)
    told = []
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.END, Keys.HOME):
        element.send_keys(key)
        told.append(page.run("return document.getElementById('live').textContent"))
        # A chart draws at most one label in 50 ms, so that of the key before may still stand.
        name = told[-1].split(";")[0].split(":")[0].strip()
        label = f"document.querySelector('#{chart} .hoverlayer .hovertext')"
        page.wait(f"{label} && {label}.textContent.includes({json.dumps(name)})")
    assert told[0] == told[-1] and len(set(told)) > 2
    element.send_keys(Keys.ESCAPE)
    page.wait(f"!document.querySelector('#{chart} .hoverlayer .hovertext')")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_readable_in_both_themes_and_without_a_kind_of_cone(page, theme):
    page.theme(theme)
    names = ("paper", "text", "muted", "link", "rung", "naive", "other", "candidate", *(f"seq{i}" for i in range(1, 7)))
    colours = {name: page.run(f"return colour('{name}')") for name in names}
    for name in ("text", "muted", "link"):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name
    for name in names[4:]:
        assert contrast(colours[name], colours["paper"]) >= 3, name
    roles = ("rung", "naive", "other")
    for kind in BLIND:
        for i, one in enumerate(roles):
            for two in roles[i + 1 :]:
                gap = max(
                    abs(a - b) for a, b in zip(seen_by(kind, colours[one]), seen_by(kind, colours[two]), strict=True)
                )
                assert gap > 0.12, (kind, one, two)
    page.theme("light")


def test_the_text_of_a_cell_stands_out_from_its_colour(page):
    page.run("drawTensors()")
    heat, texts = page.run("const {data} = document.getElementById('heat-types'); return [data[0], data[1]]")
    values = {(x, y): z for y, row in zip(heat["y"], heat["z"], strict=True)
              for x, z in zip(heat["x"], row, strict=True) if z is not None}  # fmt: skip
    least, most = min(values.values()), max(values.values())
    assert len(values) == len(texts["text"]) and most > least and all(texts["text"])
    for x, y, ink in zip(texts["x"], texts["y"], texts["textfont"]["color"], strict=True):
        share = (values[x, y] - least) / (most - least)
        low, high = next(pair for pair in itertools.pairwise(heat["colorscale"]) if share <= pair[1][0])
        part = (share - low[0]) / (high[0] - low[0])
        cell = [a + part * (b - a) for a, b in zip(rgb(low[1]), rgb(high[1]), strict=True)]
        assert contrast("#" + "".join(f"{round(255 * one):02x}" for one in cell), ink) >= 4.5, (x, y)


@pytest.mark.parametrize("width", [390, 700, 1280])
def test_no_label_lies_under_a_mark_and_no_legend_under_the_toolbar(browser, folder, width):
    page = Page(browser, folder).open(width=width)
    for chart in ("chart-pareto", "chart-speed"):
        inner = (
            "const inner = e => { const r = e.getBoundingClientRect();"
            " return [r.left + 1, r.right - 1, r.top + 2, r.bottom - 2]; };"
            f"const found = [...document.querySelectorAll('#{chart} ' + arguments[0])];"
            "return found.filter(e => e.textContent || arguments[1]).map(inner)"
        )
        labels, marks = page.run(inner, ".textpoint text", False), page.run(inner, ".scatterlayer .point", True)
        assert len(labels) >= 2 and len(marks) > len(labels)
        pairs = [*itertools.combinations(labels, 2), *itertools.product(labels, marks)]
        assert not [pair for pair in pairs if overlap(*pair)], chart
    bars = page.run(
        "return [...document.querySelectorAll('.modebar')].filter(e => e.checkVisibility()).map(e => {"
        "const [a, b] = [e, e.closest('.chart').querySelector('.legend')].map(e => e && e.getBoundingClientRect());"
        "return b && [[a.left, a.right, a.top, a.bottom], [b.left, b.right, b.top, b.bottom]]; }).filter(Boolean)"
    )
    assert bool(bars) == (width > 640) and not [pair for pair in bars if overlap(*pair)]


def overlap(one, two):
    return one[0] < two[1] and two[0] < one[1] and one[2] < two[3] and two[2] < one[3]


def test_the_charts_follow_the_theme(page):
    colour = "return document.getElementById('chart-pareto')._fullLayout.font.color"
    light = page.run(colour)
    page.theme("dark")
    assert page.run(colour) != light
    dark = colorsys.rgb_to_hls(
        *rgb(page.run("return getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()"))
    )
    assert dark[1] < 0.2
    assert page.run(colour) == page.run("return colour('text')")
    page.theme("light")
    assert page.run(colour) == light


def test_paper_is_light_and_nothing_is_folded(page):
    page.theme("dark")
    page.run(
        "addEventListener('beforeprint', () => { window.seen = [colour('paper'),"
        " document.querySelectorAll('details:not([open])').length,"
        " Math.max(...[...document.querySelectorAll('.js-plotly-plot .main-svg')].map(s => s.clientWidth))] })"
    )
    folded = page.run("return document.querySelectorAll('details:not([open])').length")
    pdf = page.browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
    assert len(pdf["data"]) > 100_000
    paper, still_folded, widest = page.run("return window.seen")
    assert (paper, still_folded) == ("#ffffff", 0)
    assert widest <= 700  # pixels of 1/96 inch: A4 less its margins
    assert page.run("return document.querySelectorAll('details:not([open])').length") == folded
    page.theme("light")


def test_a_phone_scrolls_in_one_direction_only(browser, folder):
    page = Page(browser, folder).open(width=390, height=844, phone=True)
    assert page.run("return document.documentElement.scrollWidth") <= 390
    assert page.run("return document.getElementById('chart-pareto')._fullLayout.dragmode") is False
    for selector in ("select", "input[type=search]", "summary", "nav a"):
        sizes = page.run(
            f"return [...document.querySelectorAll('{selector}')].map(e => e.getBoundingClientRect().height)"
        )
        assert min(sizes) >= 20, selector
    assert browser.get_log("browser") == []


def test_an_old_browser_has_the_tables_and_is_told_why(browser, folder):
    script = browser.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument", {"source": "delete window.DecompressionStream"}
    )
    try:
        page = Page(browser, folder).open()
        assert "browser of 2023" in page.find("#trouble").text
        assert page.find("#choose table").is_displayed()
        assert browser.get_log("browser") == []
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)

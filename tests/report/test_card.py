import dataclasses
import json
import re

import gguf
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers.utils.chat_template_utils import render_jinja_template

from bitladder.cli import invoke
from bitladder.errors import BitladderError
from bitladder.evaluate import FIVE, Figure, RunScores
from bitladder.evaluate.scores import TaskScore
from bitladder.evaluate.several import task_fields
from bitladder.evaluate.tasks.load import BENCHMARKS, parse_specs, task_meanings, task_names
from bitladder.recipe import FileUsed, ImatrixUsed, Recipe, TextUsed, write_recipe
from bitladder.report import gigabytes, percent, read_run, render_card, with_error, worth_their_size, write_card
from bitladder.report.publish import record_repository
from bitladder.report.tables import METRICS, signed
from bitladder.rundir import Manifest, OutputFile, RunRecord, StepRecord, load_manifest
from bitladder.show import next_steps

RUNGS = ("Q8_0", "IQ3_S", "Q4_K_M", "IQ4_NL")
# bytes, bpw, KLD and its error, RMS Δp, ρ
MEASURED = {
    "Q8_0": (8_520_000_000, 8.5, (0.00012345, 0.0000012), 0.00321, 0.99987),
    "IQ3_S": (3_660_000_000, 3.7, (0.1234, 0.0021), 0.0812, 0.9712),
    "Q4_K_M": (4_920_000_000, 4.9, (0.02345, 0.00034), 0.0342, 0.9951),
    "IQ4_NL": (4_990_000_000, 5.0, (0.02301, 0.00035), 0.0339, 0.9952),
}
TEXT = {"name": "wiki.test.raw", "sha256": "ee" * 32}
VERSIONS = {"bitladder": "0.1.0", "llama_cpp_python": "0.3.36", "llama_cpp_commit": "abc1234"}


PERCENTILES = dict.fromkeys(("p999", "p99", "p95", "p90", "median", "p10", "p05", "p01", "p001", "min"), 0.0)
SPEED = {"stddev": 1.0, "repetitions": 3, "n_prompt": 0, "n_gen": 128, "n_depth": 0, "n_batch": 2048, "n_ubatch": 512,
         "threads": 2, "gpu_layers": 0, "flash_attn": "auto", "backend": "CPU", "cpu": "Some CPU"}  # fmt: skip


def figure(value, error):
    return {"value": value, "error": error}


def scores(rung):
    common = {"sha256": "aa" * 32, "text": TEXT, "n_ctx": 512, "chunks": 40, "tokens_scored": 10200}
    common |= {"versions": VERSIONS}
    if rung == "base":
        return common | {"model": "X-F16.gguf", "bytes": 16 * 10**9, "bpw": 16.0, "ppl": figure(9.12345, 0.0654)}
    size, bpw, kld, rms, rho = MEASURED[rung]
    return common | {
        "model": f"X-{rung}.gguf", "bytes": size, "bpw": bpw, "ppl": figure(9.2, 0.066), "rho_ppl": rho,
        "kld": figure(*kld) | {"max": 3.0} | PERCENTILES,
        "delta_p": {"mean": figure(0.0, 0.01), "rms": figure(rms, rms / 50), "max": 1.0, "p75": 0.0, "p25": 0.0}
        | PERCENTILES,
        "same_top_p": figure(0.93, 0.0025),
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    general = {"name": "X | Instruct", "license": "apache-2.0", "languages": ["en", "no"]}
    facts = {
        "file": "X-F16.gguf", "stem": "X", "architecture": "llama", "encoding": "F16", "parameters": 8_000_000_000,
        "general": general, "origin": None, "sha256": "bb" * 32,
    }  # fmt: skip
    full = OutputFile(path="X-F16.gguf", bytes=1, sha256="bb" * 32)
    Manifest(
        run=RunRecord(
            command="bitladder run org/X --out out", model="org/X", model_id="org/X", rungs=RUNGS, n_ctx=512,
            quantized_by="someone", complete=True,
        ),
        steps={
            "convert": StepRecord(key="k", inputs={}, outputs=[full], facts=facts),
            "imatrix": StepRecord(key="k", inputs={}, outputs=[], facts={"texts": [{"name": "c.txt", "sha256": "cc"}]}),
        },
    ).save(tmp_path)  # fmt: skip
    texts = [TextUsed(name="c.txt", sha256="cc" * 32)]
    for rung in RUNGS:
        write_recipe(
            tmp_path / "recipes" / f"{rung}.toml",
            Recipe(
                model="X", file=f"X-{rung}.gguf", preset=rung, bytes=1, bpw=1.0, versions=VERSIONS,
                tensors={"a": "q8_0"}, source=FileUsed(name="X-F16.gguf", sha256="bb" * 32),
                imatrix=ImatrixUsed(name="imatrix.gguf", sha256="dd" * 32, chunks=100, n_ctx=512, texts=texts),
            ),
        )  # fmt: skip
    (tmp_path / "scores").mkdir()
    for name in ("base", *RUNGS):
        (tmp_path / "scores" / f"{name}.json").write_text(json.dumps(scores(name)))
    return tmp_path


def change_manifest(folder, **changes):
    path = folder / "ladder.json"
    value = json.loads(path.read_text())
    value["run"] |= changes
    path.write_text(json.dumps(value))


def tables(card):
    """Every table as a renderer of GitHub's Markdown sees it: heading it stands under → rows of the source's cells."""
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("\n---\n", 1)[1])
    found, heading, row = {}, "", None
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = tokens[place + 1].content
        elif token.type == "table_open":
            found.setdefault(heading, []).append([])
        elif token.type == "tr_open":
            row = []
        elif token.type in ("th_open", "td_open"):
            row.append(tokens[place + 1].content)
        elif token.type == "tr_close":
            found[heading][-1].append(row)
    return found


def table(card, heading):
    """The rows of the first table under a heading, without its head."""
    return tables(card)[heading][0][1:]


def test_the_front_matter_is_what_the_hub_reads(run_dir):
    data = ModelCard(render_card(run_dir)).data
    assert (data.base_model, data.base_model_relation) == ("org/X", "quantized")
    assert (data.license, data.language) == ("apache-2.0", ["en", "no"])
    assert (data.pipeline_tag, data.library_name) == ("text-generation", "gguf")
    assert data.tags == ["gguf", "quantized", "imatrix", "llama.cpp", "bitladder"]
    assert data.quantized_by == "someone"


def test_what_is_not_known_is_left_out(run_dir):
    change_manifest(run_dir, model_id=None, quantized_by=None)
    card = render_card(run_dir)
    data = ModelCard(card).data.to_dict()
    assert not {"base_model", "base_model_relation", "quantized_by"} & data.keys()
    assert "None" not in card


def test_one_row_per_rung_from_small_to_large(run_dir):
    card = render_card(run_dir)
    by_size = ["IQ3_S", "Q4_K_M", "IQ4_NL", "Q8_0"]
    full = ["F16 (full precision)", "[X-F16.gguf](X-F16.gguf)", "16.00", "16.00"]
    assert [row[0] for row in table(card, "Files")] == [*by_size, full[0]]
    assert table(card, "Files")[-1] == full
    assert table(card, "Files")[0] == ["IQ3_S", "[X-IQ3_S.gguf](X-IQ3_S.gguf)", "3.66", "3.70"]
    rows = table(card, "Quality")
    assert rows[0] == ["F16 (full precision)", "9.123 ± 0.065", "–", "–", "–", "–"]
    assert [row[0] for row in rows[1:]] == by_size


def test_the_numbers_are_those_of_the_scores(run_dir):
    rows = {row[0]: row for row in table(render_card(run_dir), "Quality")}
    assert rows["Q4_K_M"][1:5] == ["9.200 ± 0.066", "99.51 %", "0.02345 ± 0.00034", "3.420 ± 0.068 %"]
    for rung, (_, _, kld, rms, _) in MEASURED.items():
        value, error = map(float, rows[rung][3].strip("*").split(" ± "))
        assert value == pytest.approx(kld[0], abs=kld[1] / 10)
        assert error == pytest.approx(kld[1], rel=0.05)
        assert float(rows[rung][4].strip("*").split()[0]) == pytest.approx(rms * 100, rel=0.01)


def test_what_is_recommended_is_better_by_more_than_noise(run_dir):
    rows = table(render_card(run_dir), "Choose a file")
    bold = [match[1] for row in rows if (match := re.match(r"\[\*\*(\w+)\*\*]", row[0]))]
    assert bold == ["IQ3_S", "Q4_K_M", "Q8_0"]  # IQ4_NL is larger than Q4_K_M, and lower by less than the noise
    sentences = {re.match(r"\[\W*(\w+?)\W*]", row[0])[1]: row[-1] for row in rows}
    assert len(set(sentences.values())) == len(RUNGS)
    assert sentences["IQ4_NL"] == "Small loss: same next token 93.0 % of the time. Q4_K_M is smaller and as good."
    assert sentences["Q8_0"] == "Nearly identical: same next token 93.0 % of the time."


def test_how_it_was_made_is_said(run_dir):
    card = render_card(run_dir)
    for said in ("wiki.test.raw", "ee" * 32, "40 chunks", "10,200 tokens", "abc1234", "c.txt", "cc" * 32, "dd" * 32,
                 "8,000,000,000 weights",
                 "bitladder run org/X --out out", "WikiText", "llama.cpp", "X \\| Instruct"):  # fmt: skip
        assert said in card
    assert "Python Software Foundation" not in card
    assert str(run_dir) not in card


def test_a_measurement_on_the_calibration_text_says_so(run_dir):
    assert "computed on the same text" not in render_card(run_dir)
    for path in (run_dir / "recipes").iterdir():
        path.write_text(path.read_text().replace("cc" * 32, "ee" * 32))
    assert "computed on the same text" in render_card(run_dir)


def test_benchmarks_stand_side_by_side_with_their_average(run_dir):
    assert "Benchmarks" not in render_card(run_dir)
    for rung in (*RUNGS, "base"):
        path = run_dir / "scores" / f"{rung}.json"
        tasks = {
            name: {"accuracy": figure(0.5, 0.02), "chance": 0.25, "count": 625, "source": f"{name}.bin"}
            for name in FIVE
        }
        extra = {"tasks": tasks, "tasks_average": 0.5, "tasks_average_error": 0.014}
        path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    card = render_card(run_dir)
    rows = table(card, "Benchmarks")
    assert card.count("| Model | arc | hellaswag | mmlu | truthfulqa | winogrande | average |\n") == 1
    assert len(rows) == 1 + len(RUNGS) + 1
    found = [one for several in tables(card).values() for one in several]
    lines = [line for line in card.splitlines() if line.startswith("|")]
    assert len(lines) == sum(len(one) + 1 for one in found)  # a table has a line that is no row
    assert rows[-1] == ["guessing", *["25.0 %"] * 5, "–"]
    assert all(row[1:] == ["50.0 ± 2.0 %"] * 5 + ["50.0 ± 1.4 %"] for row in rows[:-1])
    assert "**" not in "".join(cell for row in rows for cell in row)  # all are alike
    assert "**arc** (625 questions of `arc.bin`)" in card


def test_the_card_is_written_only_if_it_differs(run_dir):
    assert write_card(run_dir)
    before = (run_dir / "README.md").stat().st_mtime_ns
    assert not write_card(run_dir)
    assert (run_dir / "README.md").stat().st_mtime_ns == before


def test_an_unfinished_run_has_no_card(run_dir, tmp_path_factory):
    change_manifest(run_dir, complete=False)
    with pytest.raises(BitladderError, match="not finished. Continue it with: bitladder run org/X --out out"):
        render_card(run_dir)
    with pytest.raises(BitladderError, match="not a run directory"):
        render_card(tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": None}, r"Q8_0\.json: sha256: "),
        ({"perplexity": 1.0}, r"Q8_0\.json: perplexity: "),
        ({"smoothed": "yes"}, r"Q8_0\.json: smoothed: "),
        ({"mode": "best"}, r"Q8_0\.json: mode: "),
        ({"kld": {"value": "0.1", "error": 0.1}}, r"Q8_0\.json: kld\."),
        ({"text": None}, r"Q8_0\.json: text: "),
    ],
)
def test_a_wrong_score_is_one_line_that_names_file_and_key(run_dir, change, message):
    rewrite(run_dir, "Q8_0", **change)
    with pytest.raises(BitladderError, match=message) as caught:
        render_card(run_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3456, 0.0723, "12.346 ± 0.072"),
        (9.1234, 0.0996, "9.12 ± 0.10"),
        (1234.5, 67.8, "1234 ± 68"),
        (1234.5, 678.9, "1234 ± 679"),
        (0.02345, 0.00034, "0.02345 ± 0.00034"),
        (0.00012345, 0.0000012, "0.0001234 ± 0.0000012"),
        (0.0000012345, 0.000000012, "1.234e-06 ± 1.2e-08"),
        (0.0, 0.0012, "0.0000 ± 0.0012"),
        (0.5, 0.0, "0.5"),
    ],
)
def test_an_error_has_two_digits_and_the_value_ends_where_it_does(value, error, text):
    assert with_error(Figure(value=value, error=error)) == text


def test_shares_and_sizes():
    shares = {0.9531: "95.31 %", 0.99876: "99.88 %", 0.999987: "99.9987 %", 1.0: "100.00 %"}
    assert {share: percent(share) for share in shares} == shares
    sizes = {4_920_000_000: "4.92", 49_200_000_000: "49.20", 12_300_000: "0.0123"}
    assert {size: gigabytes(size) for size in sizes} == sizes


def test_a_larger_and_worse_file_is_never_recommended():
    labelled = [(rung, RunScores.model_validate(scores(rung))) for rung in RUNGS]
    worse = labelled[0][1].model_copy(update={"bytes": 10**10, "kld": Figure(value=0.5, error=0.01)})
    assert worth_their_size([*labelled, ("Q9", worse)]) == ["IQ3_S", "Q4_K_M", "Q8_0"]


def rewrite(folder, name, **changes):
    """Change a scores file; a name that is not there yet begins as Q4_K_M's."""
    path = folder / "scores" / f"{name}.json"
    value = json.loads(path.read_text()) if path.is_file() else scores("Q4_K_M")
    changed = {key: field for key, field in (value | changes).items() if field is not None}
    path.write_text(json.dumps(changed))


def test_the_preset_by_itself_and_files_of_others_stand_in_the_same_tables(run_dir):
    change_manifest(run_dir, mode="size", compared=["someone-Q4_K_M"])
    rewrite(run_dir, "Q4_K_M.naive", role="naive", rung="Q4_K_M", sha256="ab" * 32, bytes=6_000_000_000, bpw=6.0)
    rewrite(run_dir, "someone-Q4_K_M", role="third-party", source="someone/X-GGUF", sha256="cd" * 32,
            doubts=["PPL is below the full precision's"])  # fmt: skip
    gain = {"model": "X-Q4_K_M.gguf", "sha256": "ab" * 32, "kld": figure(-0.0123, 0.0004)}
    rewrite(run_dir, "Q4_K_M", role="rung", mode="size", rounding="best", paired=gain)
    card = render_card(run_dir)
    rows = {row[0]: row for row in table(card, "Files")}
    assert rows["Q4_K_M"][2:] == ["4.92", "4.90", "6.00", "6.00", "18.0 %"]
    assert rows["Q8_0"][2:] == ["8.52", "8.50", "–", "–", "–"]
    assert rows["someone-Q4_K_M †"][1] == "X-Q4_K_M.gguf"  # not in this repository, so no link
    names = [row[0] for row in table(card, "Quality")]
    assert names == [
        "F16 (full precision)",
        "IQ3_S",
        "Q4_K_M",
        "someone-Q4_K_M †",
        "IQ4_NL",
        "Q4_K_M preset ◇",
        "Q8_0",
    ]
    gained = {row[0]: row[-1] for row in table(card, "Quality")}
    assert gained["Q4_K_M"] == "−0.01230 ± 0.00040"
    assert "were measured on different texts" not in card
    rewrite(run_dir, "Q4_K_M", paired=None)
    rewrite(run_dir, "Q4_K_M.naive", kld=figure(0.03, 0.0005) | {"max": 3.0} | PERCENTILES)
    unpaired = {row[0]: row[-1] for row in table(render_card(run_dir), "Quality")}
    value, error = map(float, unpaired["Q4_K_M"].replace("−", "-").split(" ± "))
    assert (value, error) == (pytest.approx(0.02345 - 0.03), pytest.approx((0.00034**2 + 0.0005**2) ** 0.5, rel=0.02))
    assert "were measured on different texts" in render_card(run_dir)
    assert {gained[name] for name in gained if name != "Q4_K_M"} == {"–"}
    assert "◇ the plain preset" in card and "† made by others (someone/X-GGUF)" in card
    assert "Compared with: `someone/X-GGUF`" in card
    assert "| a plan for size; rounding: best |" in card
    assert "someone-Q4_K_M † may be from another checkpoint: PPL is below the full precision's." in card


def test_what_noise_cannot_part_from_the_best_is_bold_with_it(run_dir):
    """Each model's bold cells are worked out here from the raw figures."""
    speeds = {"IQ3_S": (50.0, 0.5), "Q4_K_M": (60.0, 1.0), "IQ4_NL": (58.0, 0.9), "Q8_0": (30.0, 0.1)}
    ratios = {"IQ3_S": 0.2, "Q4_K_M": 0.03, "IQ4_NL": 0.031, "Q8_0": 0.02}
    for rung in RUNGS:
        bench = [SPEED | {"test": "tg128", "tokens_per_second": figure(*speeds[rung])}]
        rewrite(run_dir, rung, bench=bench, ln_ppl_ratio=figure(ratios[rung], 0.003))
    card = render_card(run_dir)
    bold = {row[0]: row[1].startswith("**") for row in table(card, "Speed")}
    assert bold == {"IQ3_S": False, "Q4_K_M": True, "IQ4_NL": True, "Q8_0": False}
    # All have the same PPL ± 0.066, but their ratios to the base are known to 0.003.
    bold = {row[0]: row[1].startswith("**") for row in table(card, "Quality")}
    assert bold == {"F16 (full precision)": False, "IQ3_S": False, "Q4_K_M": False, "IQ4_NL": False, "Q8_0": True}
    assert "Some CPU, 2 threads" in card
    assert table(card, "Choose a file")[1][3] == "60.0 ± 1.0"
    # The noise of what was measured once is not known.
    for rung in RUNGS:
        rewrite(run_dir, rung, bench=[SPEED | {"test": "tg64", "tokens_per_second": figure(speeds[rung][0], 0.0)}])
    card = render_card(run_dir)
    assert [row[1] for row in table(card, "Speed")] == ["50", "60", "58", "30"]
    assert [row[3] for row in table(card, "Choose a file")] == ["50", "60", "58", "30"]


def test_answers_decide_what_is_bold_question_by_question(run_dir):
    """50 % and 54 % of 100 questions are within noise by themselves; where one answers a subset, they are not."""
    first = " ".join(f"{n}:{0 if n <= 54 else 1}:0" for n in range(1, 101))
    fewer = " ".join(f"{n}:{0 if n <= 44 else 1}:0" for n in range(1, 101))
    for rung, answers, share in (("Q8_0", first, 0.54), ("Q4_K_M", fewer, 0.44)):
        score = {"accuracy": figure(share, 0.05), "chance": 0.25, "count": 100}
        rewrite(run_dir, rung, tasks={"arc": score | {"answers": answers}})
    rows = {row[0]: row for row in table(render_card(run_dir), "Benchmarks")}
    assert rows["Q8_0"][1] == "**54.0 ± 5.0 %**"
    assert rows["Q4_K_M"][1] == "44.0 ± 5.0 %"
    for rung in ("Q8_0", "Q4_K_M"):
        path = run_dir / "scores" / f"{rung}.json"
        path.write_text(re.sub(r', "answers": "[^"]*"', "", path.read_text()))
    rows = {row[0]: row for row in table(render_card(run_dir), "Benchmarks")}
    assert rows["Q4_K_M"][1] == "44.0 ± 5.0 %" and rows["Q8_0"][1] == "54.0 ± 5.0 %"  # all within noise


def test_the_average_and_its_bold_are_of_the_five_benchmarks(run_dir, monkeypatch):
    """A sixth benchmark, in which Q8_0 is far ahead, changes neither the average nor which averages are bold."""
    sixth = dataclasses.replace(BENCHMARKS["arc"], name="sixth")
    monkeypatch.setitem(BENCHMARKS, "sixth", sixth)
    assert parse_specs("sixth:x.bin")[0].name == "sixth"
    shares = {"Q8_0": 0.50, "Q4_K_M": 0.52, "IQ4_NL": 0.48, "IQ3_S": 0.40}
    for rung, share in shares.items():
        score = {"accuracy": figure(share, 0.01), "chance": 0.25, "count": 1000}
        tasks = dict.fromkeys(FIVE, score)
        tasks["sixth"] = score | {"accuracy": figure(0.99 if rung == "Q8_0" else 0.1, 0.01)}
        fields = task_fields({name: TaskScore.model_validate(value) for name, value in tasks.items()})
        assert fields["tasks_average"] == pytest.approx(share)
        assert fields["tasks_average_error"] == pytest.approx(0.01 / 5**0.5)
        rewrite(run_dir, rung, **RunScores.model_validate(scores(rung)).model_copy(update=fields).to_json())
    rows = {row[0]: row[-1] for row in table(render_card(run_dir), "Benchmarks")}
    assert rows["Q4_K_M"] == "**52.00 ± 0.45 %**"
    # Two standard errors of a difference are 2 · 0.01 · √(2/5) = 1.3 points.
    assert rows["Q8_0"] == "50.00 ± 0.45 %"
    assert rows["IQ4_NL"] == "48.00 ± 0.45 %"


def test_the_data_sets_of_the_calibration_are_named(run_dir):
    assert "datasets" not in ModelCard(render_card(run_dir)).data.to_dict()
    change_manifest(run_dir, datasets=["org/texts"])
    path = run_dir / "ladder.json"
    path.write_text(path.read_text().replace('"c.txt"', '"wiki.train.raw"'))
    assert ModelCard(render_card(run_dir)).data.datasets == ["org/texts", "Salesforce/wikitext"]


def test_every_metric_is_explained_in_two_sentences():
    meanings = task_meanings()
    assert set(meanings) == set(task_names())
    for text in (*METRICS.values(), *meanings.values()):
        assert len(re.findall(r"\.(?:\s|$)", text)) == 2, text


EVIL = (
    "Evil\x1b[2J\x07\u202e|`<script>alert(1)</script> <img src=x onerror=y> [click](http://phish.test) "
    "![i](http://track.test/p) https://bare.test www.bare.test &lt;b&gt; ``` \n# heading\n---\n"
)


def test_names_of_strangers_are_nothing_but_text(run_dir):
    """Judged by a renderer of Markdown: no HTML, no link, no heading but the card's own."""
    plain = render_card(run_dir)
    path = run_dir / "ladder.json"
    value = json.loads(path.read_text())
    value["run"]["command"] = f"bitladder run '{EVIL}' --out x"
    facts = value["steps"]["convert"]["facts"]
    facts["general"] |= {"name": EVIL, "license": EVIL, "license.name": EVIL}
    facts["architecture"] = EVIL
    for text in value["steps"]["imatrix"]["facts"].get("texts", []):
        text["name"] = EVIL
    path.write_text(json.dumps(value))
    base = json.loads((run_dir / "scores" / "base.json").read_text())
    base["text"]["name"] = EVIL
    (run_dir / "scores" / "base.json").write_text(json.dumps(base))
    card = render_card(run_dir)
    assert not [letter for letter in card if (ord(letter) < 32 and letter != "\n") or 127 <= ord(letter) < 160]
    assert "\u202e" not in card
    front, body = card.split("\n---\n", 1)
    assert yaml.safe_load(front.removeprefix("---\n"))["license"]

    def seen(text):
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        flat = [inner for token in tokens for inner in [token, *(token.children or [])]]
        return (
            [token.content for token in flat if token.type in ("html_block", "html_inline", "image")],
            {token.attrs["href"] for token in flat if token.type == "link_open"},
            sum(token.type == "heading_open" for token in tokens),
            sum(token.type == "fence" for token in tokens),
            [token.content for token in flat if token.type == "text"],
        )

    html, links, headings, fences, texts = seen(body)
    _, links_before, headings_before, fences_before, _ = seen(plain.split("\n---\n", 1)[1])
    assert not html and links <= links_before and (headings, fences) == (headings_before, fences_before)
    # Programs that link bare addresses find none.
    assert not any(address in text for text in texts for address in ("https://bare", "http://phish", "www.bare"))


def change_step(folder, name, **facts):
    path = folder / "ladder.json"
    value = json.loads(path.read_text())
    step = value["steps"].setdefault(name, {"key": "k", "inputs": {}, "outputs": [], "facts": {}})
    step["facts"] |= facts
    path.write_text(json.dumps(value))


def test_memory_is_that_of_the_file_and_of_what_the_context_takes(run_dir):
    beside = {"4096": 600_000_000, "8192": 1_200_000_000, "32768": 4_800_000_000}
    change_step(run_dir, "memory", beside=beside)
    card = render_card(run_dir)
    head, *rows = tables(card)["Choose a file"][0]
    assert head[:5] == ["File", "Size (GB)", "4k context (GB)", "8k context (GB)", "32k context (GB)"]
    for row, rung in zip(rows, ["IQ3_S", "Q4_K_M", "IQ4_NL", "Q8_0"], strict=True):
        assert [float(cell) for cell in row[2:5]] == [
            pytest.approx((MEASURED[rung][0] + more) / 1e9, abs=0.005) for more in beside.values()
        ]
    # 3.66 + 1.2, 4.92 + 1.2 and 8.52 + 1.2 GB; IQ4_NL is not worth its size.
    assert "With 8k tokens of context: 6 GB → **IQ3_S**, 8 GB → **Q4_K_M**, 12 GB → **Q8_0**." in card
    change_step(run_dir, "memory", beside={"512": 1000})
    for name, rung in enumerate(RUNGS):
        rewrite(run_dir, rung, bytes=1000 + name)  # all fit into the smallest memory
    assert "With 512 tokens of context: 1 GB → **Q8_0**." in render_card(run_dir)
    change_step(run_dir, "memory", beside={})
    assert "context (GB)" not in render_card(run_dir)


def test_one_rung_is_recommended_wherever_a_command_names_one(run_dir, capsys):
    """The card, the end of the run and `push` name the best rung for the smallest usual memory that has room."""
    change_manifest(run_dir, repo="me/X-GGUF")
    for name in ("X-F16.gguf", "imatrix.gguf", *(f"X-{rung}.gguf" for rung in RUNGS)):
        (run_dir / name).write_bytes(b"1")
    for beside, memory, rung in ((1_000_000, 8, "Q4_K_M"), (4_000_000_000, 8, "IQ3_S"), (7_000_000_000, 16, "Q8_0")):
        change_step(run_dir, "memory", beside={"8192": beside})
        card = render_card(run_dir)
        assert f"llama-server -hf me/X-GGUF:{rung}\n" in card and f"hf download me/X-GGUF X-{rung}.gguf" in card
        assert f"They name {rung}, the best file for a memory of {memory} GB." in card
        assert re.search(rf"for {memory}\b[^:]* GB: {rung}, llama-server", "\n".join(next_steps(read_run(run_dir))))
        plain = "Without `:" + rung + "`, `-hf me/X-GGUF` takes Q4_K_M: llama.cpp's own rule prefers Q4_K_M, "
        plain += "then Q8_0, then the first file."
        assert (plain in card) == (rung != "Q4_K_M")
        write_card(run_dir)
        assert invoke(["push", str(run_dir), "me/X-GGUF", "--dry-run"]) == 0
        said = f"The card recommends {rung}, the best file for a memory of {memory} GB."
        said += "" if rung == "Q4_K_M" else " -hf me/X-GGUF takes Q4_K_M: llama.cpp's own rule"
        assert said in capsys.readouterr().out


def test_a_card_that_gets_a_repository_is_written_and_says_so(run_dir, capsys):
    write_card(run_dir)
    assert invoke(["card", str(run_dir), "--repo", "me/X-GGUF"]) == 0
    assert f"{run_dir / 'README.md'}: written" in capsys.readouterr().out
    assert invoke(["card", str(run_dir), "--repo", "me/X-GGUF"]) == 0
    assert f"{run_dir / 'README.md'}: unchanged" in capsys.readouterr().out


def test_a_repository_is_named_for_the_ladder_before_and_for_the_run_that_extends_it(run_dir):
    manifest = load_manifest(run_dir)
    manifest.before, manifest.run = manifest.run, manifest.run.model_copy(update={"rungs": (*RUNGS, "Q6_K")})
    manifest.save(run_dir)
    record_repository(run_dir, "me/X-GGUF")
    manifest = load_manifest(run_dir)
    assert (manifest.run.repo, manifest.before.repo) == ("me/X-GGUF", "me/X-GGUF")
    assert (manifest.run.rungs, manifest.before.rungs) == ((*RUNGS, "Q6_K"), RUNGS)


def test_no_zero_is_negative():
    tiny = Figure(value=-0.0000102, error=0.0021)
    assert with_error(tiny) == "0.0000 ± 0.0021" and with_error(Figure(value=-0.0, error=0.0)) == "0"
    assert signed(tiny) == "+0.0000 ± 0.0021"
    assert signed(Figure(value=-0.0123, error=0.0004)) == "−0.01230 ± 0.00040"


def test_the_speed_stands_beside_that_of_the_preset(run_dir):
    change_manifest(run_dir, mode="quality")
    for label, speed in (("Q4_K_M", 60.0), ("Q4_K_M.naive", 61.0), ("IQ3_S", 50.0), ("IQ3_S.naive", None)):
        rung = label.removesuffix(".naive")
        bench = [SPEED | {"test": "tg128", "tokens_per_second": figure(speed, 1.0)}] if speed else None
        place = {"role": "naive", "rung": rung} if rung != label else {}
        rewrite(run_dir, label, bench=bench, **(scores(rung) | place))
        types = {"a": "q4_K" if label == "Q4_K_M.naive" else "q8_0"}
        recipe = (run_dir / "recipes" / f"{rung}.toml").read_text()
        if rung != label:
            (run_dir / "recipes" / f"{label}.toml").write_text(recipe.replace('"q8_0"', f'"{types["a"]}"'))
    head, *rows = tables(render_card(run_dir))["Choose a file"][0]
    assert head[3:5] == ["Tokens/s", "Preset's tokens/s"]
    assert {row[0].strip("[]*").split("*")[0]: row[3:5] for row in rows} == {
        "Q4_K_M": ["60.0 ± 1.0", "61.0 ± 1.0"], "IQ3_S": ["50.0 ± 1.0", "same types"],
        "Q8_0": ["–", "–"], "IQ4_NL](X-IQ4_NL.gguf)": ["–", "–"],
    }  # fmt: skip


def test_commands_and_links_name_the_repository_if_it_is_known(run_dir):
    card = render_card(run_dir)
    assert "llama-server -m X-Q4_K_M.gguf\nllama-cli -m X-Q4_K_M.gguf\n" in card and "-hf" not in card
    change_manifest(run_dir, repo="me/X-GGUF")
    card = render_card(run_dir)
    for line in (
        "llama-server -hf me/X-GGUF:Q4_K_M", "llama-cli -hf me/X-GGUF:Q4_K_M", "ollama run hf.co/me/X-GGUF:Q4_K_M",
        "lms get https://huggingface.co/me/X-GGUF@q4_k_m", "hf download me/X-GGUF X-Q4_K_M.gguf --local-dir .",
    ):  # fmt: skip
        assert f"\n{line}\n" in card
    for rung in RUNGS:
        assert f"(https://huggingface.co/me/X-GGUF/resolve/main/X-{rung}.gguf?download=true)" in card


def test_built_in_texts_are_warned_of(run_dir):
    assert "built-in" not in render_card(run_dir)
    change_step(run_dir, "imatrix", texts=[{"name": "pydoc:calibration", "sha256": "cc"}])
    assert "These quants were calibrated on Python's language reference, which" in " ".join(
        render_card(run_dir).split()
    )
    for name in ("base", *RUNGS):
        rewrite(run_dir, name, text=TEXT | {"name": "pydoc:test"})
    card = " ".join(render_card(run_dir).replace("\n> ", "\n").split())
    assert "These quants were calibrated on, and measured with, Python's language reference" in card
    assert "Compare the figures with each other only" in card


def test_the_prompt_format_is_that_of_the_template_in_the_file(run_dir):
    template = (
        "{{ bos_token }}{% for m in messages %}```{{ m.role }}\n{{ m.content }}```\n{% endfor %}"
        "{% if add_generation_prompt %}```assistant{% endif %}"
    )
    writer = gguf.GGUFWriter(run_dir / "X-F16.gguf", "llama")
    writer.add_chat_template(template)
    writer.add_token_list(["<unk>", "<s>"])
    writer.add_bos_token_id(1)
    writer.add_tensor("a", np.zeros(32, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    messages = [{"role": "system", "content": "{system_prompt}"}, {"role": "user", "content": "{prompt}"}]
    [expected], _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )
    fences = [token.content for token in MarkdownIt().parse(render_card(run_dir)) if token.type == "fence"]
    assert expected + "\n" in fences


def test_a_file_that_is_better_on_one_text_and_worse_on_another_is_named(run_dir):
    names = ("wiki.test.raw", "chat.jsonl")
    klds = {"Q4_K_M": (0.02, 0.05), "IQ4_NL": (0.04, 0.03)}
    for rung in ("base", *RUNGS):
        whole = scores(rung)
        parts = []
        for place, name in enumerate(names):
            part = {key: whole[key] for key in ("n_ctx", "chunks", "tokens_scored", "ppl", "kld") if key in whole}
            part["text"] = {"name": name, "sha256": f"{place}e" * 32}
            if rung in klds:
                part["kld"] = whole["kld"] | figure(klds[rung][place], 0.0005)
            parts.append(part)
        rewrite(run_dir, rung, texts=parts)
    card = render_card(run_dir)
    gaps = "+0.02000 ± 0.00071 on wiki.test.raw, −0.02000 ± 0.00071 on chat.jsonl."
    assert f"KLD of IQ4_NL less that of Q4_K_M: {gaps}" in card
    rows = {row[0]: row for row in table(card, "On each text")}
    assert [cell.strip("*") for cell in rows["Q4_K_M"][1:]] == ["0.02000 ± 0.00050", "0.05000 ± 0.00050"]

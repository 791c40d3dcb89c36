"""The tables of the model card: what is bold, and what is recommended."""

import dataclasses
import json
import re

import pytest
from report_card_run import (
    MEASURED,
    PERCENTILES,
    RUNGS,
    SPEED,
    change_manifest,
    change_step,
    figure,
    rewrite,
    scores,
    table,
    tables,
)

from bitladder.cli import invoke
from bitladder.evaluate import FIVE, Figure, RunScores
from bitladder.evaluate.scores import TaskScore
from bitladder.evaluate.several import task_fields
from bitladder.evaluate.tasks.load import BENCHMARKS, parse_specs
from bitladder.report import read_run, render_card, worth_their_size, write_card
from bitladder.show import next_steps


def test_what_is_recommended_is_better_by_more_than_noise(run_dir):
    rows = table(render_card(run_dir), "Choose a file")
    bold = [match[1] for row in rows if (match := re.match(r"\[\*\*(\w+)\*\*]", row[0]))]
    assert bold == ["IQ3_S", "Q4_K_M", "Q8_0"]  # IQ4_NL is larger than Q4_K_M, and lower by less than the noise
    sentences = {re.match(r"\[\W*(\w+?)\W*]", row[0])[1]: row[-1] for row in rows}
    assert len(set(sentences.values())) == len(RUNGS)
    assert sentences["IQ4_NL"] == "Small loss: same next token 93.0 % of the time. Q4_K_M is smaller and as good."
    assert sentences["Q8_0"] == "Nearly identical: same next token 93.0 % of the time."


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


def test_a_larger_and_worse_file_is_never_recommended():
    labelled = [(rung, RunScores.model_validate(scores(rung))) for rung in RUNGS]
    worse = labelled[0][1].model_copy(update={"bytes": 10**10, "kld": Figure(value=0.5, error=0.01)})
    assert worth_their_size([*labelled, ("Q9", worse)]) == ["IQ3_S", "Q4_K_M", "Q8_0"]


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

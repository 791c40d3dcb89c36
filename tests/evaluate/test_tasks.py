"""Benchmarks: formats read and written, bad records, the draw, and the answers of llama-perplexity."""

import bz2
import json
import re
import struct

import numpy as np
import pytest

from bitladder import evaluate as ev
from bitladder.cli import invoke
from bitladder.errors import BitladderError, UsageError
from bitladder.evaluate.tasks.answer import draw, mersenne_twister, score_task
from bitladder.evaluate.tasks.load import export_task, load_task, parse_specs, task_names
from bitladder.evaluate.tasks.task import Question, QuestionSet, TaskKind
from bitladder.text import load_text

SETTINGS = ev.MeasureOptions(n_ctx=256, threads=1)
WORDS = load_text("pydoc:test").text.split()


def words(start, count):
    return " ".join(re.sub(r"[^A-Za-z]", "x", word) for word in WORDS[start : start + count])


def load(name, path):
    (spec,) = parse_specs(f"{name}:{path}")
    return load_task(spec)


def questions(count, choices=4):
    return tuple(
        Question(words(40 * i, 12), tuple(words(40 * i + 12 + 5 * j, 4 + j % 3) for j in range(choices)), i % choices)
        for i in range(count)
    )


def hellaswag(count=30):
    return QuestionSet("hellaswag", "made", "0", TaskKind.HELLASWAG, questions(count))


def multiple_choice(count=30):
    return QuestionSet("mmlu", "made", "0", TaskKind.MULTIPLE_CHOICE, questions(count, 5))


def winogrande(count=30):
    items = tuple(
        Question(words(50 * i, 6), (words(50 * i + 6, 1), words(50 * i + 9, 2)), i % 2, " " + words(50 * i + 12, 7))
        for i in range(count)
    )
    return QuestionSet("winogrande", "made", "0", TaskKind.WINOGRANDE, items)


def test_specs():
    specs = parse_specs("arc:/a/b.bin, mmlu,continuation:pydoc:test")
    assert [(spec.name, spec.source) for spec in specs] == [
        ("arc", "/a/b.bin"), ("mmlu", None), ("continuation", "pydoc:test"),
    ]  # fmt: skip
    for wrong in ("chess:x", "arc:a,arc:b", "continuation", ""):
        with pytest.raises(UsageError):
            parse_specs(wrong)
    assert len(task_names()) == 6


@pytest.mark.parametrize("make", [hellaswag, multiple_choice, winogrande])
def test_what_is_written_is_read(make, tmp_path):
    task = make()
    export_task(task, tmp_path / "out")
    found = load(task.name, tmp_path / "out")
    assert found.items == task.items
    assert found.kind == task.kind
    (tmp_path / "out.bz2").write_bytes(bz2.compress((tmp_path / "out").read_bytes()))
    packed = load(task.name, tmp_path / "out.bz2")
    assert (packed.items, packed.sha256) == (found.items, found.sha256)


def test_the_data_sets_own_formats(tmp_path):
    arc = {
        "question": {"stem": "Why?", "choices": [{"text": "yes", "label": "A"}, {"text": "no", "label": "B"}]},
        "answerKey": "B",
    }
    (tmp_path / "arc.jsonl").write_text(json.dumps(arc) + "\n")
    (question,) = load("arc", tmp_path / "arc.jsonl").items
    assert question.choices == ("yes", "no")
    assert question.correct == 1
    assert "Why?" in question.text
    row = {"sentence": "Ann thanked _ for help.", "option1": "Bea", "option2": "Cy", "answer": "2"}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = load("winogrande", tmp_path / "dev.jsonl").items
    assert question.texts == ("Ann thanked Bea for help.", "Ann thanked Cy for help.")
    assert question.correct == 1


def test_records_that_are_malformed(tmp_path):
    record = ["a b", "0", "1 x", "2 x", "3 x", "4 x"]
    (tmp_path / "h.txt").write_text("\n".join([*record, record[0], "7", *record[2:]]) + "\n")
    with pytest.raises(BitladderError, match=r"h\.txt, record 2 \(line 7\): .*'7'"):
        load("hellaswag", tmp_path / "h.txt")
    (tmp_path / "w.csv").write_text("0,Ann met _ there.,Bea,Cy,1\n1,no blank here,a,b,1\n\n")
    with pytest.raises(BitladderError, match=r"w\.csv.*2.*blank"):
        load("winogrande", tmp_path / "w.csv")
    (tmp_path / "arc.jsonl").write_text('{"question": 3}\n')
    with pytest.raises(BitladderError, match=r"arc\.jsonl.*1"):
        load("arc", tmp_path / "arc.jsonl")
    export_task(multiple_choice(), tmp_path / "m.bin")
    whole = (tmp_path / "m.bin").read_bytes()
    for size in (0, 3, 50, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.bin").write_bytes(whole[:size])
        with pytest.raises(BitladderError, match=r"cut\.bin") as caught:
            load("mmlu", tmp_path / "cut.bin")
        assert "\n" not in str(caught.value)
    (tmp_path / "many.bin").write_bytes(struct.pack("<I", 1 << 31))
    with pytest.raises(BitladderError, match=r"many\.bin.*truncated"):
        load("mmlu", tmp_path / "many.bin")


def test_the_generator_is_the_one_of_the_standard():
    numbers = mersenne_twister(1)
    reference = np.random.RandomState(1)  # seeded as std::mt19937 is, MT19937's init_genrand
    assert [next(numbers) for _ in range(1500)] == list(reference.randint(0, 1 << 32, 1500, np.uint32))
    assert [next(mersenne_twister(5489))] == [3499211612]  # the first of the C++ standard's default seed


@pytest.mark.parametrize("kind", TaskKind)
def test_a_draw_takes_each_once(kind):
    drawn = draw(kind, 100, 40)
    assert len(set(drawn)) == 40
    assert set(drawn) <= set(range(100))
    assert sorted(draw(kind, 100, None)) == list(range(100))


def test_a_text_makes_the_same_questions_again(tmp_path):
    (tmp_path / "t.txt").write_text(load_text("pydoc:test").text[:20_000])
    first, again = (load("continuation", tmp_path / "t.txt") for _ in range(2))
    assert first == again
    source = " ".join((tmp_path / "t.txt").read_text().split())
    for question in first.items:
        right = " ".join(f"{question.text} {question.choices[question.correct]}".split())
        assert right in source
        assert len(set(question.choices)) == 4
    assert {question.correct for question in first.items} == {0, 1, 2, 3}
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(BitladderError, match=r"short\.txt is too short"):
        load("continuation", tmp_path / "short.txt")


def test_what_does_not_fit_is_counted_and_named(tiny_gguf):
    long = Question(words(0, 900), (words(1000, 3), words(1010, 3)), 0)
    task = QuestionSet("mmlu", "made", "0", TaskKind.MULTIPLE_CHOICE, (*questions(4), long))
    with SETTINGS.load(tiny_gguf) as model:
        score = score_task(model, task, SETTINGS).to_score()
    assert (score.count, score.skipped) == (4, 1)
    assert score.skipped_records[0].record == 5
    assert score.chance == 0.25
    right = score.right()
    assert score.accuracy.value == sum(right.values()) / 4
    share = score.accuracy.value
    assert score.accuracy.error == pytest.approx((share * (1 - share) / 3) ** 0.5)


def answers_of(tools, model, task, folder, option, *more):
    path = folder / option
    export_task(task, path)
    draw = ["-c", 256, "-t", 1, "--no-escape", f"--{option}", f"--{option}-tasks", 20]
    out = tools.run("llama-perplexity", "-m", model, *more, *draw, until=r"^20\t")
    found = re.findall(r"^(\d+)\t\s*([\d.]+)", out, re.M)
    return {int(number): float(percent) for number, percent in found}


@pytest.mark.parametrize("make", [hellaswag, multiple_choice, winogrande])
def test_the_answers_of_llama_perplexity(make, tiny_gguf, tools, tmp_path):
    task = make()
    option = task.kind.value
    export_task(task, tmp_path / option)
    file = "-bf" if task.kind == TaskKind.MULTIPLE_CHOICE else "-f"
    running = answers_of(tools, tiny_gguf, task, tmp_path, option, file, tmp_path / option, "-np", 5)
    with SETTINGS.load(tiny_gguf) as model:
        result = score_task(model, load(task.name, tmp_path / option), SETTINGS, count=20)
    assert len(result.answers) == 20
    right = np.cumsum([answer.right for answer in result.answers])
    for number, percent in running.items():
        assert percent == pytest.approx(100 * right[number - 1] / number, abs=1e-3), number
    assert 20 in running


def test_command(tmp_path, capsys):
    export_task(winogrande(), tmp_path / "w.csv")
    assert invoke(["tasks", f"winogrande:{tmp_path / 'w.csv'}", "-o", str(tmp_path / "again.csv")]) == 0
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "w.csv").read_bytes()
    assert "chance 50.00 %" in capsys.readouterr().out
    assert invoke(["tasks", f"winogrande:{tmp_path / 'absent.csv'}"]) == 2
    assert "absent.csv" in capsys.readouterr().err
    assert invoke(["tasks"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(task_names())

"""The data sets' public formats: one question in each of them, and records that are malformed, named by number."""

import csv
import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from bitladder.cli import invoke
from bitladder.errors import BitladderError
from bitladder.evaluate.tasks.load import BENCHMARKS, load_task, parse_specs
from bitladder.evaluate.tasks.task import Question

FIRST, SECOND = "Why is the sky blue?", "What do cats eat, mostly?"


def load(name, path):
    (spec,) = parse_specs(f"{name}:{path}")
    return load_task(spec).items


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def comma_separated(path, rows):
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return path


def asked(text, choices, correct):
    return Question(f"Question: {text}\nAnswer:", choices, correct)


ARC = [asked(FIRST, ("Scattering", "Paint", "Water"), 0), asked(SECOND, ("Grass", "Meat"), 1)]
ARC_ROWS = [
    (FIRST, ["A", "B", "C"], ["Scattering", " Paint", "Water "], "A"),
    (SECOND, ["1", "2"], ["Grass", "Meat"], "2"),
]


def arc_json(rows=ARC_ROWS):
    return [
        {
            "id": "x",
            "question": {
                "stem": stem,
                "choices": [{"text": text, "label": label} for label, text in zip(labels, texts, strict=True)],
            },
            "answerKey": key,
        }
        for stem, labels, texts, key in rows
    ]


def arc_hub(rows=ARC_ROWS):
    return [
        {"id": "x", "question": stem, "choices": {"text": texts, "label": labels}, "answerKey": key}
        for stem, labels, texts, key in rows
    ]


def test_arc(tmp_path):
    assert list(load("arc", jsonl(tmp_path / "a.jsonl", arc_json()))) == ARC
    assert list(load("arc", table(tmp_path / "a.parquet", arc_hub()))) == ARC
    # In a folder Easy and Challenge are taken together, in this order; Dev is left alone.
    for name, rows in (("Easy-Test", ARC_ROWS[1:]), ("Challenge-Test", ARC_ROWS[:1]), ("Easy-Dev", ARC_ROWS)):
        jsonl(tmp_path / f"ARC-{name}.jsonl", arc_json(rows))
    assert list(load("arc", tmp_path)) == ARC[::-1]
    (tmp_path / "hub").mkdir()
    for folder, rows in (("ARC-Easy", ARC_ROWS[1:]), ("ARC-Challenge", ARC_ROWS[:1])):
        (tmp_path / "hub" / folder).mkdir()
        table(tmp_path / "hub" / folder / "test-00000-of-00001.parquet", arc_hub(rows))
    assert list(load("arc", tmp_path / "hub")) == ARC[::-1]


MMLU = [asked(FIRST, ("Paint, thick", "Water", "Scattering", "Air"), 2), asked(SECOND, ("a", "b", "c", "d"), 0)]
MMLU_ROWS = [[FIRST, "Paint, thick", "Water", "Scattering", "Air"], [SECOND, "a", "b", "c", "d"]]


def test_mmlu(tmp_path):
    header = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
    letters = [[*row, letter] for row, letter in zip(MMLU_ROWS, "CA", strict=True)]
    numbers = [[*row, number] for row, number in zip(MMLU_ROWS, "20", strict=True)]
    assert list(load("mmlu", comma_separated(tmp_path / "plain.csv", letters))) == MMLU
    assert list(load("mmlu", comma_separated(tmp_path / "named.csv", [header, *numbers]))) == MMLU
    hub = [
        {"question": r[0], "subject": "x", "choices": r[1:], "answer": n}
        for r, n in zip(MMLU_ROWS, (2, 0), strict=True)
    ]
    assert list(load("mmlu", table(tmp_path / "m.parquet", hub))) == MMLU
    (tmp_path / "test").mkdir()
    for subject, rows in (("b_test", numbers[:1]), ("a_test", numbers[1:])):
        comma_separated(tmp_path / "test" / f"{subject}.csv", [header, *rows])
    assert list(load("mmlu", tmp_path)) == MMLU[::-1]  # subjects by name


TRUTH = [asked(FIRST, ("It scatters", "It is painted"), 0), asked(SECOND, ("Meat", "Grass", "Nothing; ever"), 0)]
TRUTH_CSV = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]


def test_truthfulqa(tmp_path):
    targets = [dict.fromkeys(one.choices, 0) | {one.choices[0]: 1} for one in TRUTH]
    texts = [FIRST, SECOND]
    rows = [{"question": text, "mc1_targets": one} for text, one in zip(texts, targets, strict=True)]
    (tmp_path / "mc_task.json").write_text(json.dumps(rows))
    assert list(load("truthfulqa", tmp_path)) == TRUTH
    hub = [
        {"question": text, "mc1_targets": {"choices": list(one), "labels": list(one.values())}}
        for text, one in zip(texts, targets, strict=True)
    ]
    assert list(load("truthfulqa", table(tmp_path / "t.parquet", hub))) == TRUTH
    lines = [
        TRUTH_CSV,
        ["A", "B", FIRST, "It scatters", "It scatters; It bends", "It is painted; ", "http://x"],
        ["A", "B", SECOND, "Meat", "Meat", "Grass; Water", "http://y"],
    ]
    first, second = load("truthfulqa", comma_separated(tmp_path / "t.csv", lines))
    assert first == TRUTH[0]  # the empty answer behind the last semicolon is none
    assert second == asked(SECOND, ("Meat", "Grass", "Water"), 0)


def test_hellaswag(tmp_path):
    rows = [
        {"activity_label": "Cooking", "ctx": "A man [header] cooks.  He", "endings": list("abcd"), "label": "3"},
        {"activity_label": "Sport", "ctx": "She runs. [title] She", "endings": list("efgh"), "label": "0"},
    ]
    expected = [
        Question("Cooking: A man cooks. He", tuple("abcd"), 3),
        Question("Sport: She runs.. She", tuple("efgh"), 0),
    ]
    assert list(load("hellaswag", jsonl(tmp_path / "h.jsonl", rows))) == expected
    assert list(load("hellaswag", table(tmp_path / "h.parquet", rows))) == expected


def test_winogrande(tmp_path):
    rows = [
        {"sentence": "Ann met Bea, and _ smiled.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        {"sentence": "_ was late.", "option1": "He", "option2": "She", "answer": "1"},
    ]
    expected = [
        Question("Ann met Bea, and ", ("Ann", "Bea"), 1, " smiled."),
        Question("", ("He", "She"), 0, " was late."),
    ]
    assert list(load("winogrande", jsonl(tmp_path / "w.jsonl", rows))) == expected
    assert list(load("winogrande", table(tmp_path / "w.parquet", rows))) == expected
    bare = [{key: value for key, value in row.items() if key != "answer"} for row in rows]
    jsonl(tmp_path / "dev.jsonl", bare)
    (tmp_path / "dev-labels.lst").write_text("2\n1\n")
    assert list(load("winogrande", tmp_path)) == expected
    (tmp_path / "dev-labels.lst").write_text("2\n")
    with pytest.raises(BitladderError, match=r"dev\.jsonl, line 2: no field answer"):
        load("winogrande", tmp_path)


def without(rows, key):
    """The rows, the last of them without a field."""
    return [*rows[:-1], {name: value for name, value in rows[-1].items() if name != key}]


TRUTH_HUB = {"question": FIRST, "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]}}
HELLA = {"activity_label": "x", "ctx": "y", "endings": list("abcd"), "label": "0"}
WINO = {"sentence": "a _ b.", "option1": "c", "option2": "d", "answer": "1"}


@pytest.mark.parametrize(
    ("task", "write", "name", "rows", "message"),
    [
        ("arc", jsonl, "a.jsonl", without(arc_json(), "answerKey"), "line 2: no field answerKey"),
        ("arc", jsonl, "a.jsonl", [*arc_json(), [1]], "line 3: not an object"),
        (
            "arc",
            jsonl,
            "a.jsonl",
            arc_json([*ARC_ROWS, ("?", ["A", "B"], ["x", ""], "A")]),
            "line 3: choice 2 is empty",
        ),
        (
            "arc",
            jsonl,
            "a.jsonl",
            arc_json([*ARC_ROWS, ("?", ["A", "B"], ["x", "y"], "E")]),
            "line 3: the answer E is none",
        ),
        ("arc", jsonl, "a.jsonl", arc_json([*ARC_ROWS, ("?", ["A"], ["x"], "A")]), "line 3: 1 choice"),
        ("arc", table, "a.parquet", arc_hub([*ARC_ROWS, ("?", ["A", "B"], ["x", "y"], "E")]), "row 3: the answer E"),
        ("arc", table, "a.parquet", without(arc_hub(), "choices"), "row 2: no field choices"),
        ("mmlu", comma_separated, "m.csv", [[*MMLU_ROWS[0], "A"], [*MMLU_ROWS[1], "E"]], "line 2: the answer is 'E'"),
        ("mmlu", comma_separated, "m.csv", [[*MMLU_ROWS[0], "A"], MMLU_ROWS[1]], "line 2: 5 cells"),
        (
            "mmlu",
            table,
            "m.parquet",
            [{"question": "q", "choices": list("abcd"), "answer": 7}],
            "row 1: the right answer",
        ),
        ("mmlu", table, "m.parquet", [{"question": "q", "choices": "abcd", "answer": 1}], "row 1: the field choices"),
        ("truthfulqa", comma_separated, "t.csv", [TRUTH_CSV, ["A"]], "line 2: 1 cell"),
        (
            "truthfulqa",
            comma_separated,
            "t.csv",
            [TRUTH_CSV[:3], ["A", "B", "C"]],
            "line 2: no field Incorrect Answers",
        ),
        (
            "truthfulqa",
            table,
            "t.parquet",
            [TRUTH_HUB, TRUTH_HUB | {"mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}}],
            "row 2: 2 right answers",
        ),
        (
            "truthfulqa",
            table,
            "t.parquet",
            [TRUTH_HUB | {"mc1_targets": {"choices": ["a", "b"], "labels": [1]}}],
            "row 1: 1 right answer of 2",
        ),
        ("hellaswag", jsonl, "h.jsonl", [HELLA, HELLA | {"endings": list("abc")}], "line 2: 3 endings"),
        ("hellaswag", jsonl, "h.jsonl", [HELLA, HELLA | {"label": ""}], "line 2: label is ''"),
        ("hellaswag", table, "h.parquet", [HELLA, HELLA | {"label": "4"}], "row 2: the right answer is none"),
        ("winogrande", jsonl, "w.jsonl", [WINO, WINO | {"answer": "3"}], "line 2: the answer is '3'"),
        ("winogrande", table, "w.parquet", [WINO, WINO | {"sentence": "no blank"}], "row 2: the sentence has no blank"),
    ],
)
def test_a_malformed_record_is_named_by_its_number(task, write, name, rows, message, tmp_path, capsys):
    path = write(tmp_path / name, rows)
    with pytest.raises(BitladderError, match=f"^{re.escape(name)}, {re.escape(message)}") as caught:
        load(task, path)
    assert "\n" not in str(caught.value)
    # The command says so before it looks for the model's weights, and leaves nothing.
    assert invoke(["tasks", f"{task}:{path}", "-o", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", list(BENCHMARKS))
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".json", ".bin", ".txt", ".bz2"])
def test_no_file_of_that_kind_is_one_line(name, suffix, tmp_path):
    path = tmp_path / f"noise{suffix}"
    for data in (b"", b"PAR1 nothing of it", b"\xff\x00\x07" * 50, b'{"a": 1'):
        path.write_bytes(data)
        with pytest.raises(BitladderError, match="noise") as caught:
            load(name, path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_without_a_source_the_hub_is_asked(monkeypatch, tmp_path, capsys):
    """The hub's files come from huggingface_hub; where it gives none, one line says what to do."""
    import huggingface_hub

    asked_for = []
    rows = {"ARC-Easy": ARC_ROWS[:1], "ARC-Challenge": ARC_ROWS[1:]}

    def give(repository, name, *, repo_type, revision):
        asked_for.append((repository, repo_type, len(revision)))
        return str(table(tmp_path / f"{len(asked_for)}.parquet", arc_hub(rows[name.split("/")[0]])))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", give)
    (spec,) = parse_specs("arc")
    assert list(load_task(spec).items) == ARC
    assert asked_for == [("allenai/ai2_arc", "dataset", 40)] * 2

    def refuse(*arguments, **options):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert invoke(["tasks", "mmlu"]) == 1
    assert "cais/mmlu: the hub cannot be reached; name a file instead: mmlu:FILE" in capsys.readouterr().err

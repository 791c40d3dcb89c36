"""TruthfulQA: questions that many people answer wrongly. MC1: one of the answers is true."""

from collections.abc import Iterator

from bitladder.errors import BitladderError
from bitladder.evaluate.tasks.question_files import (
    HubData,
    QuestionFile,
    QuestionRecord,
    csv_records,
    json_records,
    parquet_records,
)
from bitladder.evaluate.tasks.task import Benchmark, Question, TaskKind, question, question_prompt, read_binary
from bitladder.units import number_of


def read_json(file: QuestionFile) -> Iterator[Question]:
    """The project's mc_task.json: question, and mc1_targets as an object of answer → 1 or 0."""
    for record in json_records(file):
        targets = record.inner("mc1_targets").fields
        yield _question(record, list(targets), list(targets.values()))


def read_parquet(file: QuestionFile) -> Iterator[Question]:
    """The hub's rows: question, mc1_targets.choices[], mc1_targets.labels[]."""
    for record in parquet_records(file):
        targets = record.inner("mc1_targets")
        labels = targets.get("labels")
        if not isinstance(labels, list):
            raise BitladderError(f"{record.where}: the field labels is not a list")
        yield _question(record, targets.texts("choices"), labels)


def read_csv(file: QuestionFile) -> Iterator[Question]:
    """The project's TruthfulQA.csv: the best answer, and the incorrect ones with semicolons between."""
    for record in csv_records(file):
        wrong = record.text("Incorrect Answers").split(";")
        yield _question(record, [record.text("Best Answer"), *wrong], [1] + [0] * len(wrong), field="Question")


def _question(record: QuestionRecord, texts: list[str], labels: list[int], field: str = "question") -> Question:
    if len(texts) != len(labels) or labels.count(1) != 1:
        raise BitladderError(
            f"{record.where}: {number_of(labels.count(1), 'right answer')} of {len(texts)}; there must be one"
        )
    # In some records a semicolon at the end has become an empty wrong answer, which is left out.
    pairs = [(text.strip(), label) for text, label in zip(texts, labels, strict=True) if text.strip() or label == 1]
    correct = [label for _, label in pairs].index(1)
    return question(record.where, question_prompt(record.text(field)), [text for text, _ in pairs], correct)


TRUTHFULQA = Benchmark(
    name="truthfulqa",
    meaning=(
        "Questions that many people answer wrongly, with several answers to choose from (TruthfulQA, one right). A "
        "model that repeats what it read often falls below guessing."
    ),
    kind=TaskKind.MULTIPLE_CHOICE,
    readers={".bin": read_binary, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet},
    default=".bin",
    layouts=(("mc_task.json",), ("TruthfulQA.csv",), ("multiple_choice/validation-*.parquet",)),
    hub=HubData(
        "truthfulqa/truthful_qa",
        "741b8276f2d1982aa3d5b832d3ee81ed3b896490",
        ("multiple_choice/validation-00000-of-00001.parquet",),
    ),
)

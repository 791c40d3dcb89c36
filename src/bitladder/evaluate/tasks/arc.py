"""ARC (AI2 Reasoning Challenge): school science questions, the Easy and the Challenge set together."""

from collections.abc import Iterator

from bitladder.errors import BitladderError
from bitladder.evaluate.tasks.question_files import HubData, QuestionFile, QuestionRecord, json_records, parquet_records
from bitladder.evaluate.tasks.task import Benchmark, Question, TaskKind, question, question_prompt, read_binary


def read_json(file: QuestionFile) -> Iterator[Question]:
    """AllenAI's jsonl: question.stem, question.choices[] with text and label, answerKey."""
    for record in json_records(file):
        inner = record.inner("question")
        choices = inner.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise BitladderError(f"{record.where}: the field choices is not a list of objects")
        records = [QuestionRecord(record.where, choice) for choice in choices]
        labels, texts = [choice.text("label") for choice in records], [choice.text("text") for choice in records]
        yield _question(record, inner.text("stem"), labels, texts)


def read_parquet(file: QuestionFile) -> Iterator[Question]:
    """The hub's rows: question, choices.text[], choices.label[], answerKey."""
    for record in parquet_records(file):
        choices = record.inner("choices")
        yield _question(record, record.text("question"), choices.texts("label"), choices.texts("text"))


def _question(record: QuestionRecord, text: str, labels: list[str], texts: list[str]) -> Question:
    key = record.text("answerKey")
    if key not in labels:
        raise BitladderError(f"{record.where}: the answer {key} is none of the labels {', '.join(labels)}")
    return question(record.where, question_prompt(text), texts, labels.index(key))


ARC = Benchmark(
    name="arc",
    meaning=(
        "Science questions from school exams with mostly four answers (AI2 ARC). It asks for facts and some reasoning."
    ),
    kind=TaskKind.MULTIPLE_CHOICE,
    readers={".bin": read_binary, ".jsonl": read_json, ".parquet": read_parquet},
    default=".bin",
    layouts=(
        ("*Easy-Test.jsonl", "*Challenge-Test.jsonl"),
        ("ARC-Easy/test-*.parquet", "ARC-Challenge/test-*.parquet"),
    ),
    hub=HubData(
        "allenai/ai2_arc",
        "210d026faf9955653af8916fad021475a3f00453",
        ("ARC-Easy/test-00000-of-00001.parquet", "ARC-Challenge/test-00000-of-00001.parquet"),
    ),
)

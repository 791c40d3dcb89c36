"""HellaSwag: which of four endings continues a description of everyday life."""

import re
from collections.abc import Iterator

from bitladder.errors import BitladderError
from bitladder.evaluate.tasks.question_files import HubData, QuestionFile, RecordReader, json_records, parquet_records
from bitladder.evaluate.tasks.task import Benchmark, Question, TaskKind, question, read_binary
from bitladder.units import number_of

_LINES, _ENDINGS = 6, 4


def read_text(file: QuestionFile) -> Iterator[Question]:
    """llama-perplexity's text with six lines a question: the context, the index of the right ending, four endings."""
    text = file.text.removesuffix("\n")
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines or len(lines) % _LINES:
        raise BitladderError(f"{file.name}: {number_of(len(lines), 'line')}; there must be {_LINES} for each question")
    for start in range(0, len(lines), _LINES):
        where = f"{file.name}, record {start // _LINES + 1} (line {start + 1})"
        label = lines[start + 1].strip()
        if label not in ("0", "1", "2", "3"):
            raise BitladderError(f"{where}: the right ending is {label!r}, not one of 0 to 3")
        yield question(where, lines[start], lines[start + 2 : start + _LINES], int(label))


def write_text(questions: list[Question]) -> bytes:
    """Questions in the same format. Raises BitladderError if a question does not fit it."""
    lines = []
    for number, item in enumerate(questions, 1):
        record = [item.text, str(item.correct), *item.choices]
        if len(record) != _LINES or any("\n" in line for line in record):
            raise BitladderError(f"question {number} does not have {_ENDINGS} endings, or it has a line break")
        lines += record
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def read_json(file: QuestionFile) -> Iterator[Question]:
    """The project's jsonl: activity_label, ctx, endings[], label."""
    return _read_records(file, json_records)


def read_parquet(file: QuestionFile) -> Iterator[Question]:
    """The hub's rows, with the same fields."""
    return _read_records(file, parquet_records)


def _read_records(file: QuestionFile, records: RecordReader) -> Iterator[Question]:
    for record in records(file):
        text = clean(f"{record.text('activity_label')}: {record.text('ctx')}")
        endings = [clean(ending) for ending in record.texts("endings")]
        if len(endings) != _ENDINGS:
            raise BitladderError(f"{record.where}: {number_of(len(endings), 'ending')}; there must be {_ENDINGS}")
        yield question(record.where, text, endings, record.index("label"))


def clean(text: str) -> str:
    """The text without WikiHow's marks, as in lm-evaluation-harness and llama-perplexity's file."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


HELLASWAG = Benchmark(
    name="hellaswag",
    meaning=(
        "Which of four endings continues a description of everyday events (HellaSwag). Models wrote the wrong "
        "endings, which sound right, so it takes common sense."
    ),
    kind=TaskKind.HELLASWAG,
    readers={".txt": read_text, ".bin": read_binary, ".jsonl": read_json, ".parquet": read_parquet},
    default=".txt",
    layouts=(("hellaswag_val*.txt*",), ("hellaswag_val*.jsonl*",), ("data/validation-*.parquet",)),
    hub=HubData(
        "Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76", ("data/validation-00000-of-00001.parquet",)
    ),
)

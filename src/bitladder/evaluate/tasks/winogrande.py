"""WinoGrande: which of two words belongs into a sentence's blank."""

from collections.abc import Iterator

from bitladder.errors import BitladderError
from bitladder.evaluate.tasks.hub_data import HubData, parquet_records
from bitladder.evaluate.tasks.question_files import QuestionFile, QuestionRecord, RecordReader, json_records
from bitladder.evaluate.tasks.task import Benchmark, Question, TaskKind, question

_COMMAS = 4


def read_csv(file: QuestionFile) -> Iterator[Question]:
    """llama-perplexity's csv: index, sentence with "_", choice 1, choice 2, answer 1 or 2; no line of names.

    It is no common csv: quotes around a sentence are taken off, and any other quote is part of the text.
    """
    for number, line in enumerate(_seen(file), 1):
        where = f"{file.name}, line {number}"
        if line.strip():
            yield _parse(line, where)


def unseen(file: QuestionFile) -> str | None:
    """A note on the last line of a csv, which llama-perplexity does not read unless an empty line follows."""
    if file.suffix != ".csv":
        return None
    lost = file.text.removesuffix("\n").split("\n")[-1]
    if not lost.strip():
        return None
    return (
        f"the last line of {file.name} is left out, as llama-perplexity leaves it out; "
        "an empty line after it would keep it"
    )


def _seen(file: QuestionFile) -> list[str]:
    # The tool drops one newline at the end of the file, and then the line that no newline ends.
    return file.text.removesuffix("\n").split("\n")[:-1]


def _parse(line: str, where: str) -> Question:
    commas: list[int] = []
    quoted = False
    for place, character in enumerate(line):
        if character == '"':
            quoted = not quoted
        elif character == "," and not quoted and len(commas) < _COMMAS:
            commas.append(place)
    if len(commas) < _COMMAS:
        raise BitladderError(f"{where}: {len(commas) + 1} cells; there must be index,sentence,choice1,choice2,answer")
    cells = [line[start + 1 : stop] for start, stop in zip(commas, [*commas[1:], len(line)], strict=True)]
    sentence = cells[0][1:-1] if cells[0].startswith('"') else cells[0]
    return _question(where, sentence, cells[1], cells[2], cells[3].strip())


def write_csv(questions: list[Question]) -> bytes:
    """The same format, with the empty line at the end that makes llama-perplexity read the last question.

    Raises BitladderError if a question cannot be written so that it is read as it was.
    """
    lines = []
    for index, one in enumerate(questions):
        sentence = f"{one.text}_{one.after}"
        rest = f",{','.join(one.choices)},{one.correct + 1}"
        ways = [f"{index},{sentence}{rest}", f'{index},"{sentence}"{rest}']
        line = next((way for way in ways if "\n" not in way and _reads_as(way, one)), None)
        if line is None:
            raise BitladderError(f"question {index + 1} cannot be written as csv: its quotes and commas would mix")
        lines.append(line)
    return "".join(f"{line}\n" for line in [*lines, ""]).encode("utf-8", "surrogateescape")


def _reads_as(line: str, one: Question) -> bool:
    try:
        return _parse(line, "") == one
    except BitladderError:
        return False


def read_json(file: QuestionFile) -> Iterator[Question]:
    """AllenAI's jsonl: sentence, option1, option2, answer; without answers, those of NAME-labels.lst beside it."""
    labels = file.path.with_name(f"{file.path.stem}-labels.lst")
    try:
        answers = labels.read_text(encoding="utf-8").split() if labels.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise BitladderError(f"cannot read {labels}: it is no readable text file") from error

    def with_answers(file: QuestionFile) -> Iterator[QuestionRecord]:
        for number, record in enumerate(json_records(file)):
            known = {"answer": answers[number]} if number < len(answers) else {}
            yield QuestionRecord(record.where, known | record.fields)

    return _read_records(file, with_answers)


def read_parquet(file: QuestionFile) -> Iterator[Question]:
    """The hub's rows, which have the same fields."""
    return _read_records(file, parquet_records)


def _read_records(file: QuestionFile, records: RecordReader) -> Iterator[Question]:
    for record in records(file):
        sentence, answer = record.text("sentence"), record.text("answer")
        yield _question(record.where, sentence, record.text("option1"), record.text("option2"), answer)


def _question(where: str, sentence: str, first: str, second: str, answer: str) -> Question:
    before, blank, after = sentence.partition("_")
    if not blank or not after:
        raise BitladderError(f"{where}: the sentence has no blank (_) with words after it")
    if answer not in ("1", "2"):
        raise BitladderError(f"{where}: the answer is {answer!r}, not 1 or 2")
    return question(where, before, [first, second], int(answer) - 1, after)


WINOGRANDE = Benchmark(
    name="winogrande",
    meaning=("Which of two names fills the blank of a sentence (WinoGrande). Grammar does not tell, the meaning does."),
    kind=TaskKind.WINOGRANDE,
    readers={".csv": read_csv, ".jsonl": read_json, ".parquet": read_parquet},
    default=".csv",
    note=unseen,
    layouts=(("dev.jsonl",), ("winogrande*.csv",), ("winogrande_xl/validation-*.parquet",)),
    hub=HubData(
        "allenai/winogrande",
        "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
        ("winogrande_xl/validation-00000-of-00001.parquet",),
    ),
)

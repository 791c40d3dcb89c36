"""WinoGrande: which of two words fills the blank of a sentence."""

from collections.abc import Iterator

from bitladder.errors import BitladderError
from bitladder.evaluate.tasks.question_files import (
    HubData,
    QuestionFile,
    QuestionRecord,
    RecordReader,
    json_records,
    parquet_records,
)
from bitladder.evaluate.tasks.task import Benchmark, Question, TaskKind, question
from bitladder.units import number_of

_COMMAS = 4


def read_csv(file: QuestionFile) -> Iterator[Question]:
    """llama-perplexity's csv: index, sentence with "_", choice 1, choice 2, answer 1 or 2. It has no line of names.

    It differs from a common csv: quotes around a sentence are removed, and every other quote is part of the text.
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
    return f"the last line of {file.name} is left out, as in llama-perplexity; an empty line after it keeps it"


def _seen(file: QuestionFile) -> list[str]:
    # llama-perplexity drops one newline at the end of the file, and then the line that does not end with a newline.
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
        raise BitladderError(
            f"{where}: {number_of(len(commas) + 1, 'cell')}; there must be index,sentence,choice1,choice2,answer"
        )
    cells = [line[start + 1 : stop] for start, stop in zip(commas, [*commas[1:], len(line)], strict=True)]
    sentence = cells[0][1:-1] if cells[0].startswith('"') else cells[0]
    return _question(where, sentence, cells[1], cells[2], cells[3].strip())


def write_csv(questions: list[Question]) -> bytes:
    """Questions in the same format, with an empty line at the end so that llama-perplexity reads the last question.

    Raises:
        BitladderError: no line can be written that is read as the same question.
    """
    lines = []
    for index, item in enumerate(questions):
        sentence = f"{item.text}_{item.after}"
        rest = f",{','.join(item.choices)},{item.correct + 1}"
        ways = [f"{index},{sentence}{rest}", f'{index},"{sentence}"{rest}']
        line = next((way for way in ways if "\n" not in way and _reads_as(way, item)), None)
        if line is None:
            raise BitladderError(f"question {index + 1} cannot be written as csv: its quotes and commas are ambiguous")
        lines.append(line)
    return "".join(f"{line}\n" for line in [*lines, ""]).encode("utf-8", "surrogateescape")


def _reads_as(line: str, item: Question) -> bool:
    try:
        return _parse(line, "") == item
    except BitladderError:
        return False


def read_json(file: QuestionFile) -> Iterator[Question]:
    """AllenAI's jsonl: sentence, option1, option2, answer. Missing answers are read from NAME-labels.lst beside it."""
    labels = file.path.with_name(f"{file.path.stem}-labels.lst")
    try:
        answers = labels.read_text(encoding="utf-8").split() if labels.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise BitladderError(f"cannot read {labels}: it is not a readable text file") from error

    def with_answers(file: QuestionFile) -> Iterator[QuestionRecord]:
        for number, record in enumerate(json_records(file)):
            known = {"answer": answers[number]} if number < len(answers) else {}
            yield QuestionRecord(record.where, known | record.fields)

    return _read_records(file, with_answers)


def read_parquet(file: QuestionFile) -> Iterator[Question]:
    """The hub's rows, with the same fields."""
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
    meaning="Which of two names fills the blank of a sentence (WinoGrande). The meaning decides, not the grammar.",
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

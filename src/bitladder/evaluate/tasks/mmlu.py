"""MMLU: exam questions of 57 subjects. The texts of the answers are scored, not their letters."""

from collections.abc import Iterator

from bitladder.errors import BitladderError
from bitladder.evaluate.tasks.question_files import HubData, QuestionFile, csv_rows, parquet_records
from bitladder.evaluate.tasks.task import Benchmark, Question, TaskKind, question, question_prompt, read_binary
from bitladder.units import number_of

_CELLS = 6  # the question, four choices, the answer
_ANSWERS = ("0A", "1B", "2C", "3D")


def read_csv(file: QuestionFile) -> Iterator[Question]:
    """A subject's csv: question, four choices, the answer as A–D or 0–3. A first line of names is possible."""
    for number, (where, row) in enumerate(csv_rows(file)):
        if len(row) != _CELLS:
            raise BitladderError(
                f"{where}: {number_of(len(row), 'cell')}; there must be a question, four choices and the answer"
            )
        cells = [cell.strip() for cell in row]
        if number == 0 and cells[-1].lower() == "answer":
            continue
        correct = next((index for index, names in enumerate(_ANSWERS) if cells[-1] in list(names)), -1)
        if correct < 0:
            raise BitladderError(f"{where}: the answer is {cells[-1]!r}, not one of A–D or 0–3")
        yield question(where, question_prompt(cells[0]), cells[1:5], correct)


def read_parquet(file: QuestionFile) -> Iterator[Question]:
    """The hub's rows: question, choices[], answer 0–3."""
    for record in parquet_records(file):
        text = question_prompt(record.text("question"))
        yield question(record.where, text, record.texts("choices"), record.index("answer"))


MMLU = Benchmark(
    name="mmlu",
    meaning=(
        "Exam questions with four answers from 57 subjects, from school to profession (MMLU). It asks for knowledge "
        "more than for reasoning."
    ),
    kind=TaskKind.MULTIPLE_CHOICE,
    readers={".bin": read_binary, ".csv": read_csv, ".parquet": read_parquet},
    default=".bin",
    layouts=(("test/*.csv",), ("*.csv",), ("all/test-*.parquet",), ("test-*.parquet",)),
    hub=HubData("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe", ("all/test-00000-of-00001.parquet",)),
)

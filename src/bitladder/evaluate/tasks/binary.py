"""llama-perplexity's file of multiple-choice questions (--multiple-choice -bf).

All numbers have 32 bits, little-endian. The file has the number of questions, the offset of each question, and the
questions. A text is its length in bytes and its bytes. A question is its text and two lists of answers, one with a
single right answer and one with several. A list is its length, its texts, and a label for each text, 1 for right. The
second list is not scored: it is checked, and written empty.
"""

import dataclasses
import struct
from collections.abc import Iterator

from bitladder.errors import BitladderError
from bitladder.evaluate.tasks.question_files import QuestionFile
from bitladder.evaluate.tasks.task import MAX_CHOICES, Question, question


def read(file: QuestionFile) -> Iterator[Question]:
    """The questions of a file.

    Raises:
        BitladderError: the file is truncated or a record is malformed; the error names the record, counted from 1.
    """
    table = _Reader(file.data, file.name, 0)
    count = table.number()
    if count == 0:
        raise BitladderError(f"{file.name}: no questions")
    if 4 * (count + 1) > len(file.data):
        raise BitladderError(
            f"{file.name}: ends before its table of {count} records: it is truncated, or not such a file"
        )
    bytes_read = 0
    for record in range(1, count + 1):
        where = f"{file.name}, record {record}"
        place = table.number()
        reader = _Reader(file.data, where, place)
        text = reader.text()
        choices, labels = reader.answers()
        reader.answers()
        # Many records at one place would be far more than the file.
        bytes_read += reader.offset - place
        if bytes_read > len(file.data):
            raise BitladderError(f"{where}: the records overlap: the file is damaged, or not such a file")
        if labels.count(1) != 1:
            raise BitladderError(f"{where}: {labels.count(1)} right answers; there must be one")
        yield question(where, text, choices, labels.index(1))


def write(questions: list[Question]) -> bytes:
    """The content of a file with these questions."""
    bodies = [_body(question) for question in questions]
    offset = 4 * (len(bodies) + 1)
    numbers = [len(bodies)]
    for body in bodies:
        numbers.append(offset)
        offset += len(body)
    return struct.pack(f"<{len(numbers)}I", *numbers) + b"".join(bodies)


def _body(item: Question) -> bytes:
    labels = [int(index == item.correct) for index in range(len(item.choices))]
    parts = [_text(item.text), struct.pack("<I", len(labels)), *map(_text, item.choices)]
    return b"".join([*parts, struct.pack(f"<{len(labels)}i", *labels), struct.pack("<I", 0)])


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<I", len(data)) + data


@dataclasses.dataclass
class _Reader:
    data: bytes
    where: str
    offset: int

    def take(self, size: int) -> bytes:
        start, self.offset = self.offset, self.offset + size
        if self.offset > len(self.data):
            raise BitladderError(f"{self.where}: ends beyond the end of the file: it is truncated, or not such a file")
        return self.data[start : self.offset]

    def number(self) -> int:
        (value,) = struct.unpack("<I", self.take(4))
        return int(value)

    def text(self) -> str:
        return self.take(self.number()).decode("utf-8", "surrogateescape")

    def answers(self) -> tuple[list[str], list[int]]:
        count = self.number()
        if count > MAX_CHOICES:
            raise BitladderError(f"{self.where}: {count} answers; there can be {MAX_CHOICES} at most")
        texts = [self.text() for _ in range(count)]
        return texts, list(struct.unpack(f"<{count}i", self.take(4 * count)))

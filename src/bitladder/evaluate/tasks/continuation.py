"""Questions made from any text: which of four passages follows?

They need no data set and no tokenizer. The text is cut into passages of PASSAGE words with the NEXT words that follow.
The three wrong choices follow other passages of the same text. Choices begin at a plain space of the text, so the form
of a choice does not show whether it is right.
"""

import re
from collections.abc import Iterator

from bitladder.errors import BitladderError
from bitladder.evaluate.tasks.answer import below, mersenne_twister
from bitladder.evaluate.tasks.task import Question, QuestionSet, TaskKind, question
from bitladder.text import load_text
from bitladder.units import number_of

NAME = "continuation"
MEANING = (
    "Which of four passages follows a passage of the text. It needs no data set, and says little about a model beyond "
    "its own quants."
)
PASSAGE, NEXT, CHOICES = 48, 24, 4
SEED = 2  # another seed than that of the draw, so that the draw does not depend on the places of right choices


def load(source: str) -> QuestionSet:
    """The questions of a text: a file or a built-in text. The same text gives the same questions.

    Raises:
        BitladderError: the text cannot be read, or is too short.
    """
    text = load_text(source)
    if text.conversations:
        raise BitladderError(f"{text.name} holds conversations; questions are made from plain text")
    stretches = list(_stretches(text.text))
    if len(stretches) < CHOICES:
        raise BitladderError(
            f"the text {text.name} is too short for {NAME}: it gives {number_of(len(stretches), 'passage')} of "
            f"{PASSAGE + NEXT} words, and {CHOICES} are needed"
        )
    return QuestionSet(NAME, text.name, text.sha256, TaskKind.MULTIPLE_CHOICE, tuple(_questions(text.name, stretches)))


def _stretches(text: str) -> Iterator[tuple[str, str]]:
    """Passages and what follows them. They do not overlap."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    start = 0
    while True:
        seam = start + PASSAGE
        while seam < len(words) and text[words[seam - 1][1] : words[seam][0]] != " ":
            seam += 1
        stop = seam + NEXT
        if stop > len(words):
            return
        yield text[words[start][0] : words[seam - 1][1]], text[words[seam][0] : words[stop - 1][1]]
        start = stop


def _questions(name: str, stretches: list[tuple[str, str]]) -> Iterator[Question]:
    numbers = mersenne_twister(SEED)
    for index, (passage, follows) in enumerate(stretches):
        others = [other for place, (_, other) in enumerate(stretches) if place != index and other != follows]
        choices = [others.pop(below(len(others), numbers)) for _ in range(min(CHOICES - 1, len(others)))]
        correct = below(len(choices) + 1, numbers)
        choices.insert(correct, follows)
        yield question(f"{name}, record {index + 1}", passage, choices, correct)

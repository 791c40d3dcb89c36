"""What a task's source holds."""

import collections
import dataclasses

from bitladder.evaluate.tasks.draw import draw
from bitladder.evaluate.tasks.task import Question, Task


@dataclasses.dataclass(frozen=True)
class Summary:
    """Questions of a task: `count` drawn of `available`; `choices` says how many questions have how many choices.

    `chance` is what guessing would get, `kind` the option of llama-perplexity that scores such questions.
    """

    task: str
    source: str
    sha256: str
    kind: str
    count: int
    available: int
    choices: dict[int, int]
    chance: float

    def __str__(self) -> str:
        choices = ", ".join(f"{number} with {size} choices" for size, number in self.choices.items())
        return (
            f"{self.task}: {self.count} of {self.available} questions of {self.source}: {choices}; "
            f"chance {100 * self.chance:.2f} %"
        )


def chosen(task: Task, count: int | None) -> list[Question]:
    """The questions that are drawn if `count` are wanted; all, in the source's order, for None."""
    if count is None:
        return list(task.items)
    return [task.items[index] for index in draw(task.kind, len(task.items), count)]


def summarize(task: Task, count: int | None = None) -> Summary:
    """What would be asked if `count` questions of a task were drawn (None: all)."""
    questions = chosen(task, count)
    sizes = collections.Counter(len(one.choices) for one in questions)
    return Summary(
        task=task.name,
        source=task.source,
        sha256=task.sha256,
        kind=task.kind.value,
        count=len(questions),
        available=len(task.items),
        choices=dict(sorted(sizes.items())),
        chance=sum(number / size for size, number in sizes.items()) / len(questions),
    )

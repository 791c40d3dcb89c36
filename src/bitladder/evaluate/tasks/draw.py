"""Which questions N of them are: those that llama-perplexity draws.

Its generator is the Mersenne twister seeded with 1, but its two ways to draw differ, and both are followed bit by bit.
HellaSwag takes whole numbers from libstdc++'s uniform_int_distribution (Lemire's method, arXiv:1805.10941); builds
with another C++ library draw others. WinoGrande and multiple choice multiply with a float32 and move the last
question into the gap.
"""

from collections.abc import Iterator

import numpy as np

from bitladder.evaluate.tasks.task import TaskKind

SEED = 1
_BITS = 32


def draw(kind: TaskKind, available: int, count: int | None) -> list[int]:
    """Indices of the questions to score, in llama-perplexity's order, out of 0…available−1.

    `count` None or too large: all of them.
    """
    wanted = available if count is None else min(count, available)
    numbers = mersenne_twister(SEED)
    if kind is TaskKind.HELLASWAG:
        left = list(range(available))
        return [left.pop(below(len(left), numbers)) for _ in range(wanted)]
    if wanted == available:
        return list(range(available))
    return _draw_scaled(available, wanted, numbers)


def mersenne_twister(seed: int) -> Iterator[int]:
    """The numbers of std::mt19937(seed), 32 bits each, without end."""
    state = np.random.RandomState(seed)  # seeds as C++ does; its stream is frozen (NEP 19)
    while True:
        yield from state.randint(0, 1 << _BITS, 1024, dtype=np.uint32).tolist()


def below(limit: int, numbers: Iterator[int]) -> int:
    """A whole number in 0…limit−1, each as likely, from 32-bit numbers (Lemire)."""
    threshold = (1 << _BITS) % limit
    while True:
        product = next(numbers) * limit
        if product % (1 << _BITS) >= threshold:
            return product >> _BITS


def _draw_scaled(available: int, wanted: int, numbers: Iterator[int]) -> list[int]:
    left, drawn = list(range(available)), []
    scale = np.float32(2.0**-_BITS)
    for _ in range(wanted):
        # Each product is rounded to float32, as in C++; it may round up to the length, which is beyond the last.
        place = min(int(scale * np.float32(next(numbers)) * np.float32(len(left))), len(left) - 1)
        drawn.append(left[place])
        left[place] = left[-1]
        left.pop()
    return drawn

"""Draws the same questions as llama-perplexity.

Its generator is the Mersenne twister with seed 1. It draws in two ways, and both are reproduced exactly. For HellaSwag
it takes whole numbers from libstdc++'s uniform_int_distribution (Lemire's method, arXiv:1805.10941); a build with
another C++ library draws other questions. For WinoGrande and multiple choice it multiplies by a float32, and moves the
last question to the place of the drawn one.
"""

from collections.abc import Iterator

import numpy as np

from bitladder.evaluate.tasks.task import TaskKind

SEED = 1
_BITS = 32


def draw(kind: TaskKind, available: int, count: int | None) -> list[int]:
    """Indices of the questions to score, in llama-perplexity's order.

    Parameters:
        kind: how the questions are drawn.
        available: number of questions.
        count: questions to draw; None or a larger number draws all.

    Example:
        >>> draw(TaskKind.MULTIPLE_CHOICE, 3, None)
        [0, 1, 2]
    """
    number = available if count is None else min(count, available)
    numbers = mersenne_twister(SEED)
    if kind is TaskKind.HELLASWAG:
        left = list(range(available))
        return [left.pop(below(len(left), numbers)) for _ in range(number)]
    if number == available:
        return list(range(available))
    return _draw_scaled(available, number, numbers)


def mersenne_twister(seed: int) -> Iterator[int]:
    """The endless numbers of std::mt19937(seed), 32 bits each."""
    state = np.random.RandomState(seed)  # has the seeding of C++, and its stream never changes (NEP 19)
    while True:
        yield from state.randint(0, 1 << _BITS, 1024, dtype=np.uint32).tolist()


def below(limit: int, numbers: Iterator[int]) -> int:
    """A whole number in 0 … limit−1 with equal probabilities, from 32-bit numbers (Lemire)."""
    threshold = (1 << _BITS) % limit
    while True:
        product = next(numbers) * limit
        if product % (1 << _BITS) >= threshold:
            return product >> _BITS


def _draw_scaled(available: int, count: int, numbers: Iterator[int]) -> list[int]:
    left, drawn = list(range(available)), []
    scale = np.float32(2.0**-_BITS)
    for _ in range(count):
        # Each product is rounded to float32, as in C++. It can round up to the length, which is beyond the last place.
        place = min(int(scale * np.float32(next(numbers)) * np.float32(len(left))), len(left) - 1)
        drawn.append(left[place])
        left[place] = left[-1]
        left.pop()
    return drawn

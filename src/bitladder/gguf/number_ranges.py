"""Numbers of blocks and experts as a reader likes them."""

from collections.abc import Iterable


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in few words: [5, 0, 1, 2] is "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)

"""Which speeds to measure, in llama-bench's spelling: -p, -n, -pg and -d, with its lists and ranges."""

import dataclasses
import re
from collections.abc import Sequence

from bitladder.errors import UsageError

_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")
_MOST = 1000  # values that a range may have; more is a slip of the pen


@dataclasses.dataclass(frozen=True)
class SpeedTest:
    """Process a prompt of `n_prompt` tokens, then generate `n_gen` one by one, after `n_depth` that are not timed.

    Raises UsageError if a number is negative or if there is nothing to time.
    """

    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0

    def __post_init__(self) -> None:
        if min(self.n_prompt, self.n_gen, self.n_depth) < 0:
            raise UsageError(
                f"a speed test of {self.n_prompt} + {self.n_gen} tokens after {self.n_depth}: none may be negative"
            )
        if not self.tokens:
            raise UsageError("a speed test of 0 prompt tokens and 0 generated tokens measures nothing")

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen

    @property
    def name(self) -> str:
        """As llama-bench names it: pp512, tg128, pp512+tg128, pp512 @ d1024."""
        parts = [f"pp{self.n_prompt}"] * bool(self.n_prompt) + [f"tg{self.n_gen}"] * bool(self.n_gen)
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")


def choose_tests(
    prompts: Sequence[str], gens: Sequence[str], pairs: Sequence[str], depths: Sequence[str] = ("0",)
) -> list[SpeedTest]:
    """The tests that -p, -n, -pg and -d ask for, in llama-bench's order: at each depth pp, tg, pp+tg.

    Each value is a list as in "128,512-2048*2"; a pair is "PP,TG". 0 turns a test off. Raises UsageError that names
    the option if a value cannot be read or if nothing is left to measure.
    """
    n_prompt, n_gen, n_depth = numbers("-p", prompts), numbers("-n", gens), numbers("-d", depths)
    both = [_pair(text) for text in pairs]
    wanted = [(prompt, 0) for prompt in n_prompt] + [(0, gen) for gen in n_gen] + both
    tests = [SpeedTest(*pair, depth) for depth in n_depth for pair in wanted if pair != (0, 0)]
    if not tests:
        raise UsageError("nothing to measure: -p and -n are 0, and no -pg is given")
    return list(dict.fromkeys(tests))


def numbers(option: str, texts: Sequence[str]) -> list[int]:
    """The numbers of "1,8,32", "1-4", "16-64+16" and "16-256*2". Raises UsageError that names the option."""
    found: list[int] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        match = _RANGE.fullmatch(part)
        if not match:
            raise UsageError(f"{option} {part!r}: give a number, FIRST-LAST, FIRST-LAST+STEP or FIRST-LAST*FACTOR")
        value, last, step = int(match[1]), int(match[2] or match[1]), int(match[4] or 1)
        values: list[int] = []
        while value <= last and len(values) <= _MOST:
            values.append(value)
            value = value * step if match[3] == "*" else value + step
        if not values or len(values) > _MOST or max(values) >= 1 << 31:
            raise UsageError(f"{option} {part}: a range goes upward, in at most {_MOST} steps")
        found += values
    return found


def _pair(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if not match:
        raise UsageError(f"-pg {text!r}: give two numbers with a comma between, prompt and generated tokens (512,128)")
    return int(match[1]), int(match[2])

"""Which speeds are measured and how, in llama-bench's spelling, and the rows that come out."""

import dataclasses
import math
import re
import statistics
from collections.abc import Sequence
from typing import Literal

from bitladder.errors import UsageError
from bitladder.evaluate.scores import BenchRow, Figure
from bitladder.options import Options, option
from bitladder.units import number_of

_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")
_MOST = 1000  # values of a range; more of them are a mistake


@dataclasses.dataclass(frozen=True)
class SpeedOptions(Options):
    """How a speed is measured, with llama-bench's defaults. The threads and layers decide a speed.

    Raises:
        UsageError: a value is outside its limits.
    """

    GROUP = "Decoding"

    repetitions: int = option(5, "-r", "--repetitions", least=1, metavar="N", help="Times each test is measured.")
    threads: int | None = option(None, "-t", "--threads", least=1, metavar="N", help="Threads of the CPU.", unset="all")
    gpu_layers: int = option(
        -1, "-ngl", "--gpu-layers", "--n-gpu-layers", metavar="N", help="Layers that the GPU computes; -1: all of them."
    )
    n_batch: int = option(2048, "-b", "--batch-size", least=1, metavar="TOKENS", help="Tokens decoded by one call.")
    n_ubatch: int = option(512, "-ub", "--ubatch-size", least=1, metavar="TOKENS", help="Tokens computed at once.")
    flash_attn: Literal["auto", "on", "off"] = option("auto", "-fa", "--flash-attn", help="Flash attention.")
    warmup: bool = option(True, "--warmup/--no-warmup", help="Run each test once before it is measured.")


@dataclasses.dataclass(frozen=True)
class SpeedChoice(Options):
    """Which tests are measured: lists and ranges in llama-bench's spelling."""

    GROUP = "Tests"

    prompts: tuple[str, ...] = option(("512",), "-p", "--n-prompt", metavar="N,…", help="Prompt tokens; 0: no test.")
    gens: tuple[str, ...] = option(("128",), "-n", "--n-gen", metavar="N,…", help="Generated tokens; 0: no test.")
    pairs: tuple[str, ...] = option((), "-pg", metavar="PP,TG", help="Prompt, then generated tokens, timed as one.")
    depths: tuple[str, ...] = option(("0",), "-d", "--n-depth", metavar="N,…", help="Tokens before, not timed.")

    def tests(self) -> list["SpeedTest"]:
        """The tests, as `choose_tests`."""
        return choose_tests(self.prompts, self.gens, self.pairs, self.depths)


GENERATED = 10.0  # a generated token takes the time of so many in a prompt, about


@dataclasses.dataclass(frozen=True)
class SpeedTest:
    """A prompt of `n_prompt` tokens, then `n_gen` tokens one by one, after `n_depth` tokens that are not timed.

    Raises:
        UsageError: a number is negative, or there is nothing to time.
    """

    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0

    def __post_init__(self) -> None:
        if min(self.n_prompt, self.n_gen, self.n_depth) < 0:
            raise UsageError(
                f"a speed test of {self.n_prompt} + {number_of(self.n_gen, 'token')} after {self.n_depth}: none may be "
                "negative"
            )
        if not self.tokens:
            raise UsageError("a speed test of 0 prompt tokens and 0 generated tokens measures nothing")

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen

    def work(self, generated: float = GENERATED) -> float:
        """What a repetition takes, in the time of a token of a prompt.

        Parameters:
            generated: what a generated token takes.
        """
        return self.n_depth + self.n_prompt + generated * self.n_gen

    def warming(self, generated: float = GENERATED) -> float:
        """What the warm-up takes, as `work`: it reads the prompt, and generates one token."""
        return self.n_prompt + generated * min(self.n_gen, 1)

    @property
    def name(self) -> str:
        """The name that llama-bench gives the test.

        Example:
            >>> SpeedTest(512, 128, 1024).name
            'pp512+tg128 @ d1024'
        """
        parts = [f"pp{self.n_prompt}"] * bool(self.n_prompt) + [f"tg{self.n_gen}"] * bool(self.n_gen)
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")


def choose_tests(
    prompts: Sequence[str], gens: Sequence[str], pairs: Sequence[str], depths: Sequence[str] = ("0",)
) -> list[SpeedTest]:
    """The tests of -p, -n, -pg and -d, in llama-bench's order: at each depth pp, tg, pp+tg.

    Parameters:
        prompts: lists of prompt tokens, such as "128,512-2048*2"; 0 turns a test off.
        gens: lists of generated tokens.
        pairs: pairs "PP,TG", timed as one.
        depths: lists of tokens before the test.

    Raises:
        UsageError: a value cannot be read, or nothing is left to measure; the error names the option.
    """
    n_prompt, n_gen, n_depth = numbers("-p", prompts), numbers("-n", gens), numbers("-d", depths)
    lengths = [(prompt, 0) for prompt in n_prompt] + [(0, gen) for gen in n_gen] + [_pair(text) for text in pairs]
    tests = [SpeedTest(*pair, depth) for depth in n_depth for pair in lengths if pair != (0, 0)]
    if not tests:
        raise UsageError("nothing to measure: -p and -n are 0, and there is no -pg")
    return list(dict.fromkeys(tests))


def numbers(option: str, texts: Sequence[str]) -> list[int]:
    """The numbers of lists and ranges. Raises UsageError that names the option.

    Example:
        >>> numbers("-p", ["1,8", "16-64+16", "16-128*2"])
        [1, 8, 16, 32, 48, 64, 16, 32, 64, 128]
    """
    result: list[int] = []
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
        result += values
    return result


def _pair(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if not match:
        raise UsageError(f"-pg {text!r}: give two numbers with a comma between, prompt and generated tokens (512,128)")
    return int(match[1]), int(match[2])


@dataclasses.dataclass(frozen=True)
class SpeedRow:
    """One model's samples of one test.

    Parameters:
        model: the file's name.
        model_type: the library's description of the model.
        size: bytes of all tensors.
        n_params: weights of the model.
        test: the test.
        options: how it was measured.
        threads: threads that were used.
        backend: names of the library's back ends.
        cpu: names of the CPUs.
        gpu: names of the GPUs.
        test_time: when the test began (RFC 3339).
        samples_ns: wall time of each repetition, nanoseconds.
    """

    model: str
    model_type: str
    size: int
    n_params: int
    test: SpeedTest
    options: SpeedOptions
    threads: int
    backend: str
    cpu: str
    gpu: str
    test_time: str
    samples_ns: tuple[int, ...]

    @property
    def samples_ts(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [1e9 * self.test.tokens / sample for sample in self.samples_ns]

    @property
    def mean(self) -> float:
        """The mean of the repetitions' tokens per second."""
        return statistics.fmean(self.samples_ts)

    @property
    def stddev(self) -> float:
        """The sample standard deviation of the repetitions, llama-bench's ±; 0 of a single repetition."""
        return statistics.stdev(self.samples_ts) if len(self.samples_ns) > 1 else 0.0

    def bench_row(self) -> BenchRow:
        """The row as `Scores.bench` keeps it. Its error is that of the mean, σ/√n."""
        count, options, test = len(self.samples_ns), self.options, self.test
        return BenchRow(
            test=test.name,
            tokens_per_second=Figure(value=self.mean, error=self.stddev / math.sqrt(count)),
            stddev=self.stddev,
            repetitions=count,
            n_prompt=test.n_prompt,
            n_gen=test.n_gen,
            n_depth=test.n_depth,
            n_batch=options.n_batch,
            n_ubatch=options.n_ubatch,
            threads=self.threads,
            gpu_layers=options.gpu_layers,
            flash_attn=options.flash_attn,
            backend=self.backend,
            cpu=self.cpu,
        )

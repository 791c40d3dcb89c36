"""What a plan aims at: a file size, or a divergence."""

import dataclasses
import re

from bitladder.engine.context import Context
from bitladder.engine.decoding import MIN_CTX, Decoding
from bitladder.engine.model import Model
from bitladder.engine.native import log
from bitladder.errors import BitladderError, UsageError
from bitladder.plan.allocate import Allocation, Problem, smallest_bytes, smallest_cost
from bitladder.trial.journal import Measurement

_BUFFER = re.compile(r"(KV|compute|RS|output)\s+buffer size\s*=\s*([\d.]+) MiB")


@dataclasses.dataclass(frozen=True)
class Target:
    """At most `max_bytes` (of the file) with the least KLD, or the fewest bytes with at most `max_kld` nats.

    `text` is what was asked for, as a recipe's header keeps it.
    """

    text: str
    max_bytes: int | None = None
    max_kld: float | None = None

    def solve(self, problem: Problem, offset: float = 0.0) -> Allocation:
        """The best allocation by prices, to which `offset` nats are to be added that no price explains."""
        if self.max_kld is None:
            return smallest_cost(problem, self.max_bytes)
        # Where the offset alone is above the target, the best there is may still measure below it.
        return smallest_bytes(problem, max(self.max_kld - offset, self.max_kld * 0.02))

    def rank(self, one: Measurement, nbytes: int) -> tuple[bool, float]:
        """A key by which measured recipes are ordered, the best first."""
        if self.max_kld is None:
            return self.max_bytes is not None and nbytes > self.max_bytes, one.kld
        return one.kld > self.max_kld, float(nbytes) if one.kld <= self.max_kld else one.kld


def memory_beside_weights(model: Model, context: int, threads: int | None = None) -> int:
    """Bytes of KV cache, compute and output buffers of a context of so many tokens, as the library reports them.

    Raises BitladderError if it cannot be made, or if the library does not say.
    """
    with log.tapped() as pieces, Context(model, Decoding(n_ctx=max(context, MIN_CTX), threads=threads)):
        pass
    sizes = _BUFFER.findall("".join(pieces))
    if not sizes:
        raise BitladderError("the library did not report the sizes of its buffers; give --size instead of --vram")
    return round(sum(float(size) for _, size in sizes) * 2**20)


def vram_bytes(vram: int, beside: int, text: str) -> int:
    """Bytes that a file may have. Raises UsageError if the buffers alone are too large."""
    if beside >= vram:
        raise UsageError(
            f"{text}: the KV cache and the compute buffers alone take {beside / 2**20:.0f} MiB; use a smaller --context"
        )
    return vram - beside

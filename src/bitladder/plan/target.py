"""What a plan aims at: a file size, or a divergence."""

import dataclasses
import math
import re

from bitladder.engine import MIN_CTX, Context, Decoding, Model, log
from bitladder.errors import BitladderError, UsageError
from bitladder.plan.allocate.allocation import smallest_bytes, smallest_cost
from bitladder.plan.allocate.problem import Allocation, Problem
from bitladder.plan.options import PlanDecoding, TargetOptions
from bitladder.plan.subject import Preset, Subject
from bitladder.trial import Measurement
from bitladder.units import bpw_bytes, parse_size

_BUFFER = re.compile(r"(KV|compute|RS|output)\s+buffer size\s*=\s*([\d.]+) MiB")
_WAYS = ("like", "size", "bpw", "kld", "vram")


@dataclasses.dataclass(frozen=True)
class Target:
    """Least KLD in at most `max_bytes`, or fewest bytes at no more than `max_kld`.

    Parameters:
        text: the target in words, for a recipe's header.
        max_bytes: largest size of the file; None for a target of KLD.
        max_kld: largest KLD, nats per token; None for a target of size.
    """

    text: str
    max_bytes: int | None = None
    max_kld: float | None = None

    @property
    def word(self) -> str:
        """The target as a part of a file name.

        Example:
            >>> Target("like Q4_K_M").word, Target("vram 8GiB context 4096").word
            ('Q4_K_M', 'vram-8GiB-context-4096')
        """
        return self.text.removeprefix("like ").replace(" ", "-")

    def solve(self, problem: Problem, offset: float = 0.0) -> Allocation:
        """The best allocation by prices. `offset` is the KLD, in nats per token, that no price explains."""
        if self.max_kld is None:
            return smallest_cost(problem, self.max_bytes)
        # Where the offset alone is above the target, the best allocation may still measure below it.
        return smallest_bytes(problem, max(self.max_kld - offset, self.max_kld * 0.02))

    def rank(self, measurement: Measurement, nbytes: int) -> tuple[bool, float]:
        """The key by which measured recipes are sorted, the best first."""
        if self.max_kld is None:
            return self.max_bytes is not None and nbytes > self.max_bytes, measurement.kld
        return measurement.kld > self.max_kld, float(nbytes) if measurement.kld <= self.max_kld else measurement.kld


def check_target(options: TargetOptions) -> str:
    """The name of the one option that says what to plan for. Raises UsageError unless there is exactly one."""
    ways = [name for name in _WAYS if getattr(options, name) is not None]
    if len(ways) != 1:
        flags = ", ".join(f"--{name}" for name in _WAYS)
        raise UsageError(f"say what to plan for: one of {flags}; or --suggest-prune")
    return ways[0]


def target_of(options: TargetOptions, subject: Subject, decoding: PlanDecoding) -> tuple[Target, Preset | None]:
    """The target, and the preset that the plan must not be worse than.

    Raises:
        UsageError: not exactly one target, an unknown preset, a size that cannot be read, or too little memory.
    """
    way = check_target(options)
    if options.like is not None:
        preset = subject.preset(options.like)
        return Target(f"like {options.like.upper()}", max_bytes=preset.bytes), preset
    if options.kld is not None:
        if not 0 < options.kld < math.inf:
            raise UsageError(f"--kld is {options.kld}; give a divergence above 0, in nats per token, such as 0.01")
        return Target(f"KLD {options.kld:g}", max_kld=options.kld), None
    text = f"{way} {getattr(options, way)}"
    if options.size is not None:
        nbytes = parse_size(options.size)
    elif options.bpw is not None:
        text = f"{options.bpw:g} bpw"
        nbytes = bpw_bytes(options.bpw, subject.weights(), subject.header_bytes())
    else:
        text += f" context {options.context}"
        memory = parse_size(str(options.vram), "--vram")
        with Model(subject.path, gpu_layers=decoding.gpu_layers) as model:
            nbytes = vram_bytes(memory, memory_beside_weights(model, options.context, decoding.threads), text)
    return Target(text, max_bytes=nbytes), subject.fitting_preset(nbytes)


def memory_beside_weights(model: Model, context: int, threads: int | None = None) -> int:
    """Bytes of KV cache, compute and output buffers of a context, as the library reports them.

    Parameters:
        model: a loaded model.
        context: tokens of the context.
        threads: of the CPU; None for all.

    Raises:
        BitladderError: the context cannot be made, or the library does not report its buffers.
    """
    with log.tapped() as pieces, Context(model, Decoding(n_ctx=max(context, MIN_CTX), threads=threads)):
        pass
    sizes = _BUFFER.findall("".join(pieces))
    if not sizes:
        raise BitladderError("the library did not report the sizes of its buffers; give --size instead of --vram")
    return round(sum(float(size) for _, size in sizes) * 2**20)


def vram_bytes(vram: int, beside: int, text: str) -> int:
    """Bytes that are left for a file. Raises UsageError if the buffers alone are too large."""
    if beside >= vram:
        raise UsageError(
            f"{text}: the KV cache and the compute buffers alone take {beside / 2**20:.0f} MiB; use a smaller --context"
        )
    return vram - beside

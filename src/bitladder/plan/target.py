"""What a plan aims at: a file size, or a divergence."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable

from bitladder.engine import MIN_CTX, Context, Decoding, Model, log
from bitladder.errors import BitladderError, UsageError
from bitladder.keys import Algorithm
from bitladder.plan.allocate.allocation import smallest_bytes, smallest_cost
from bitladder.plan.allocate.problem import Allocation, Problem
from bitladder.plan.options import PlanDecoding, TargetOptions
from bitladder.plan.subject import Preset, Subject
from bitladder.trial import MeasuredRecipe
from bitladder.units import bpw_bytes, parse_size, size_text

LARGEST = "Q8_0"  # no plan has more bits for a tensor
MEMORY = Algorithm("memory", ("caches, compute and output buffers, as the library reports them",))
# Caches report a size of their own; the size of their buffer is 0 if nothing is allocated.
_BUFFER = re.compile(r"(?:\w: size =|state buffer size =|(?:compute|output)\s+buffer size\s*=)\s*([\d.]+) MiB")
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

    def rank(self, measurement: MeasuredRecipe, nbytes: int) -> tuple[bool, float]:
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
            raise UsageError(f"--kld is {options.kld:g}; give a divergence above 0, in nats per token, such as 0.01")
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
        beside = memory_beside_weights(
            subject.path, [options.context], threads=decoding.threads, gpu_layers=decoding.gpu_layers
        )
        nbytes = vram_bytes(memory, beside[options.context], text)
    largest = subject.preset(LARGEST)
    if nbytes > largest.bytes:
        most = f"{LARGEST} has {size_text(largest.bytes)}"
        raise UsageError(f"{text}: there is room for more than {LARGEST} ({most}); quantize to it, or give less")
    return Target(text, max_bytes=nbytes), subject.fitting_preset(nbytes)


@MEMORY.entry
def memory_beside_weights(
    model: pathlib.Path, contexts: Iterable[int], *, threads: int | None = None, gpu_layers: int = 0
) -> dict[int, int]:
    """Bytes of caches, compute and output buffers that a context takes, as the library reports them.

    Nothing is allocated. The figures are those of llama.cpp's defaults: a cache in F16, batches of 512 tokens at once.

    Parameters:
        model: the GGUF; its weights are not loaded.
        contexts: tokens of each context.
        threads: of the CPU; None for all.
        gpu_layers: layers that a GPU computes.

    Returns:
        Bytes by the tokens of the context.

    Raises:
        BitladderError: the model or a context cannot be made, or the library does not report its buffers.
    """
    beside = {}
    with Model(model, gpu_layers=gpu_layers, simulated=True) as simulated:
        for context in contexts:
            decoding = Decoding(n_ctx=max(context, MIN_CTX), threads=threads)
            with log.tapped() as pieces, Context(simulated, decoding, swa_full=False):
                pass
            sizes = _BUFFER.findall("".join(pieces))
            if not sizes:
                raise BitladderError("the library did not report the sizes of its buffers; give --size, not --vram")
            beside[context] = round(sum(map(float, sizes)) * 2**20)
    return beside


def vram_bytes(vram: int, beside: int, text: str) -> int:
    """Bytes that are left for a file. Raises UsageError if the buffers alone are too large."""
    if beside >= vram:
        raise UsageError(
            f"{text}: the KV cache and the compute buffers alone take {size_text(beside)}; use a smaller --context"
        )
    return vram - beside

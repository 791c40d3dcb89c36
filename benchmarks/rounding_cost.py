"""What rounding one matrix costs by its size: CPU seconds of one thread, and memory.

    python benchmarks/rounding_cost.py [--types Q4_K,IQ3_S] [--shapes 1024x1024,…] [--json OUT]
    python benchmarks/rounding_cost.py --model F16.gguf --moments M.gguf --imatrix I.gguf [--types …] [--passes 0,1,6]

Matrices and moments are random, with correlations that fall off like those of a language model (eigenvalues ~ 1/k);
each shape is out x in. Three things are timed: factors of the moments, which all types of a tensor share; feedback; and
a pass of `best`. Feedback and a pass are fitted, by least squares of relative errors, with a m n + b m n² + c m² n, and
factors with d n² + e n³ for each of both sides. These are the constants of `ladder.cost`. Seconds do not carry over to
other machines: compare them with those of the library's own kernel, which are printed beside.

With a model, one tensor of each kind is rounded, with numbers of passes: the output error as a share of the library's,
and by how much the price of a (tensor, type) would be off if it were taken from blocks of fewer passes. That is the
spread of ln(error after so many passes / error after the last number), beside what all have in common.
"""

import argparse
import pathlib
import resource
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from bitladder.calibrate import MomentsFile, read_imatrix
from bitladder.engine import RowKernels, quantize_rows, type_by_name, versions
from bitladder.files import write_json
from bitladder.gguf import GgufFile, block_of
from bitladder.rounding import RoundingOptions, SecondMoments, round_matrix, round_tensor

T = TypeVar("T")

SHAPES = "1024x1024,2048x2048,8192x2048,2048x8192,4096x4096,11008x4096,4096x11008"
PASSES = 2  # of which the mean is a pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default="Q4_K")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--moments", type=pathlib.Path)
    parser.add_argument("--imatrix", type=pathlib.Path)
    parser.add_argument("--passes", default="0,1,6")
    arguments = parser.parse_args()
    if arguments.model:
        on_model(arguments)
        return
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    rows = []
    for kind in arguments.types.split(","):
        cost((256, 256), kind)  # compiles
        measured = [(shape, cost(shape, kind)) for shape in shapes]
        for (m, n), seconds in measured:
            each = ", ".join(f"{part} {value:.2f} s" for part, value in seconds.items())
            print(f"{kind} {m} x {n}: {each}", flush=True)
        fitted = {
            part: fit([terms(m, n) for (m, n), _ in measured], [seconds[part] for _, seconds in measured])
            for part, terms in TERMS.items()
        }
        for part, coefficients in fitted.items():
            print(f"{kind} {part}: {', '.join(f'{each:.3g}' for each in coefficients)} s", flush=True)
        rows.append({"type": kind, "seconds": [[*shape, seconds] for shape, seconds in measured], "fitted": fitted})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:.0f} MiB")
    if arguments.json:
        write_json(arguments.json, {"rows": rows, "peak_mib": peak, "versions": versions()})


def on_model(arguments: argparse.Namespace) -> None:
    """Rounds one tensor of each kind of a model, of its middle block, with several numbers of passes."""
    every = [int(number) for number in arguments.passes.split(",")]
    kinds = arguments.types.split(",")
    left, seconds = {}, dict.fromkeys(every, 0.0)
    with GgufFile(arguments.model) as file, MomentsFile(arguments.moments) as moments, RowKernels(1) as kernels:
        imatrix = read_imatrix(arguments.imatrix)
        blocks = sorted({block for name in moments.names() if (block := block_of(name)) is not None})
        names = [name for name in moments.names() if block_of(name) == blocks[len(blocks) // 2]]
        for name in names:
            tensor, moment = file.tensors[name], moments.read(name)
            weights = kernels.dequantize(file.read(tensor), tensor.type, tensor.width)
            for kind in map(type_by_name, kinds):
                stock = quantize_rows(weights, kind, imatrix.columns(name, tensor)[0])
                for passes in every:
                    began, options = time.thread_time(), RoundingOptions(passes=passes, enough=0)
                    rounded = round_tensor(weights, stock, kind.name, moment.inputs[0], options, moment.outputs)
                    seconds[passes] += time.thread_time() - began
                    left[name, kind.name, passes] = rounded.after / rounded.before
    for kind in map(type_by_name, kinds):
        shares = {passes: np.array([left[name, kind.name, passes] for name in names]) for passes in every}
        print(kind.name, *(f"{passes} passes: {share.mean():.4f}" for passes, share in shares.items()))
    for passes in every:
        off = np.array([np.log(left[name, kind.name, passes] / left[name, kind.name, every[-1]])
                        for kind in map(type_by_name, kinds) for name in names])  # fmt: skip
        print(f"{passes} passes: {seconds[passes]:.1f} s, error × {np.exp(off.mean()):.3f}, spread {off.std():.3f}")


def cost(shape: tuple[int, int], name: str) -> dict[str, float]:
    """CPU seconds of one thread: the library's kernel, factors of the moments, feedback, and a pass after it."""
    kind = type_by_name(name)
    rng = np.random.default_rng(0)
    rows, width = shape
    weights = (0.02 * rng.standard_normal(shape)).astype(np.float32)
    inputs, outputs = moments(width, rng), moments(rows, rng)
    stock, library = timed(lambda: quantize_rows(weights, kind, np.diag(inputs).copy()))
    second, ready = timed(lambda: SecondMoments(inputs, outputs, RoundingOptions()))

    def rounded(passes: int) -> float:
        options = RoundingOptions(passes=passes, enough=0)
        result, seconds = timed(lambda: round_matrix(weights, stock, kind.name, second, options))
        assert result.after < result.before
        return seconds

    first, again, more = rounded(0), rounded(0), rounded(PASSES)
    return {
        "library": library,
        "factors": ready + first - again,
        "feedback": again,
        "pass": (more - again) / PASSES,
    }


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What some work gives, and its CPU seconds."""
    began = time.thread_time()
    result = work()
    return result, time.thread_time() - began


def moments(size: int, rng: np.random.Generator) -> np.ndarray:
    """A second moment with eigenvalues 1/k in random directions, and a diagonal of about 1."""
    vectors = rng.standard_normal((size, size), dtype=np.float32) / np.float32(size**0.5)
    weighted = vectors * np.float32(1) / np.arange(1, size + 1, dtype=np.float32)
    found = weighted @ vectors.T
    return found * np.float32(size / np.trace(found))


TERMS: dict[str, Callable[[float, float], list[float]]] = {
    "factors": lambda m, n: [m**2 + n**2, m**3 + n**3],
    "feedback": lambda m, n: [m * n, m * n**2, m**2 * n],
    "pass": lambda m, n: [m * n, m * n**2, m**2 * n],
}


def fit(terms: list[list[float]], seconds: list[float]) -> list[float]:
    """The numbers that are nearest to all shapes alike; one that would be below 0 is left out."""
    relative = np.array(terms) / np.array(seconds)[:, None]
    used = list(range(relative.shape[1]))
    while True:
        unit = relative[:, used].max(0)
        solution = np.linalg.lstsq(relative[:, used] / unit, np.ones(len(seconds)), rcond=None)[0] / unit
        if (solution >= 0).all():
            break
        used.pop(int(np.argmin(solution * unit)))
    numbers = np.zeros(relative.shape[1])
    numbers[used] = solution
    return [float(number) for number in numbers]


if __name__ == "__main__":
    main()

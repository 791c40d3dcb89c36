"""What rounding one matrix costs by its size, and by that a whole model: CPU seconds of one thread, and memory.

    python benchmarks/rounding_cost.py [--types Q4_K,IQ3_S] [--shapes 1024x1024,…] [--json OUT]
    python benchmarks/rounding_cost.py --model F16.gguf --moments M.gguf --imatrix I.gguf [--types …] [--passes 0,1,6]

Matrices and moments are random, with correlations that fall off like those of a language model (eigenvalues ~ 1/k);
each shape is out x in. Seconds are fitted, by least squares of relative errors, with what the method does:

    a m n             scales and levels tried, for each weight
    b m n²            errors handed on within rows
    c m² n            and between them
    d n³              factors of H

and with these numbers models of `MODELS` are predicted. Llama-2-7B's square matrices are among those
measured; for the three of 11,008 in each block the size is extrapolated. Seconds do not carry over to
other machines: compare them with those of the library's own kernel, which are printed beside.

With a model, one tensor of each kind is rounded, with numbers of passes: the output error as a share of the library's,
and by how much the price of a (tensor, type) would be off if it were taken from blocks of fewer passes. That is the
spread of ln(error after so many passes / error after the last number), beside what all have in common.
"""

import argparse
import pathlib
import resource
import time

import numpy as np

from bitladder.calibrate import MomentsFile, read_imatrix
from bitladder.engine import RowKernels, quantize_rows, type_by_name, versions
from bitladder.files import write_json
from bitladder.gguf import GgufFile, block_of
from bitladder.rounding import RoundingOptions, round_tensor

# Matrices of one block, out x in, and the number of blocks.
MODELS = {
    "Llama-2-7B": (32, [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]),
    "OLMo-2-1B": (16, [(2048, 2048)] * 4 + [(8192, 2048)] * 2 + [(2048, 8192)]),
}
SHAPES = "512x512,1024x1024,2048x2048,4096x1024,1024x4096,4096x4096"


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
        measured = [(shape, *cost(shape, kind)) for shape in shapes]
        coefficients = fit([shape for shape, *_ in measured], [best for _, _, best in measured])
        for shape, stock, best in measured:
            fitted = terms(shape) @ coefficients
            print(
                f"{kind} {shape[0]} x {shape[1]}: {best:.1f} s, fitted {fitted:.1f} s; library {stock:.2f} s",
                flush=True,
            )
        hours = {
            name: count * sum(terms(one) @ coefficients for one in each) / 3600
            for name, (count, each) in MODELS.items()
        }
        print(
            f"{kind}: {', '.join(f'{name} {one:.3g}' for name, one in zip('abcd', coefficients, strict=True))} s;",
            *(f"{name} {h:.1f} core hours" for name, h in hours.items()),
            flush=True,
        )
        rows.append(
            {
                "type": kind,
                "seconds": [[*shape, stock, best] for shape, stock, best in measured],
                "coefficients": list(coefficients),
                "core_hours": hours,
            }
        )
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


def cost(shape: tuple[int, int], name: str) -> tuple[float, float]:
    """CPU seconds of one thread: the library's kernel, and `best` behind it."""
    kind = type_by_name(name)
    rng = np.random.default_rng(0)
    rows, width = shape
    weights = (0.02 * rng.standard_normal(shape)).astype(np.float32)
    inputs, outputs = moments(width, rng), moments(rows, rng)
    began = time.thread_time()
    stock = quantize_rows(weights, kind, np.diag(inputs).copy())
    middle = time.thread_time()
    rounded = round_tensor(weights, stock, kind.name, inputs, RoundingOptions(), outputs)
    ended = time.thread_time()
    assert rounded.after < rounded.before
    return middle - began, ended - middle


def moments(size: int, rng: np.random.Generator) -> np.ndarray:
    """A second moment with eigenvalues 1/k in random directions, and a diagonal of about 1."""
    vectors = rng.standard_normal((size, size), dtype=np.float32) / np.float32(size**0.5)
    weighted = vectors * np.float32(1) / np.arange(1, size + 1, dtype=np.float32)
    found = weighted @ vectors.T
    return found * np.float32(size / np.trace(found))


def terms(shape: tuple[int, int]) -> np.ndarray:
    """What the four numbers count."""
    m, n = map(float, shape)
    return np.array([m * n, m * n**2, m**2 * n, n**3])


def fit(shapes: list[tuple[int, int]], seconds: list[float]) -> np.ndarray:
    """The numbers that are nearest to all shapes alike; one that would be below 0 is left out."""
    relative = np.stack([terms(shape) / one for shape, one in zip(shapes, seconds, strict=True)])
    used = list(range(relative.shape[1]))
    while True:
        unit = relative[:, used].max(0)
        found = np.linalg.lstsq(relative[:, used] / unit, np.ones(len(seconds)), rcond=None)[0] / unit
        if (found >= 0).all():
            break
        used.pop(int(np.argmin(found * unit)))
    numbers = np.zeros(relative.shape[1])
    numbers[used] = found
    return numbers


if __name__ == "__main__":
    main()

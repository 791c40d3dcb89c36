"""What a device does with one block of a 7B model, beside the CPU: seconds, operations, bytes, and the output error.

    python benchmarks/device.py [--device cuda] [--types Q4_K,Q3_K,IQ3_S] [--scale 1] [--passes 2] [--json OUT]

The shapes are those of Llama's 7B: q, k, v and o of 4096 × 4096, gate and up of 11008 × 4096, down of 4096 × 11008.
`--scale 0.0625` makes all of them so much smaller. Weights are random, and moments as in `rounding_cost.py`. Each type
is rounded with `best` by the kernels of the CPU, in one thread, and by torch on the device: one matrix, and as many
side by side as fit, up to `--beside`. `operators` are torch's calls: on a GPU each starts a kernel, which takes 5 µs or
more. Operations and bytes follow from formulas:

    rounding  m n² + 2 m n² p + 2 m² n (½ + p) for an m × n matrix and p passes, and 2 (m³ + n³) / 3 for factors
    moments   of each token 4 W for products with W weights, and 1.2 (n² + m²) for the sums of a matrix

The first row is of moments by gradients: the sums of 512 tokens for the block.
"""

import argparse
import pathlib
import time
from typing import Any

import numpy as np
from rounding_cost import moments

from bitladder.engine import device_memory, quantize_rows, torch_device, type_by_name, versions
from bitladder.files import write_json
from bitladder.rounding import RoundingOptions, SecondMoments, fit_device, round_matrices

WIDTH, WIDE, TOKENS = 4096, 11008, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "torch"])
    parser.add_argument("--types", default="Q4_K,Q3_K,IQ3_S")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--beside", type=int, default=8)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    device = torch_device(arguments.device) or "torch"
    memory = device_memory(device)
    print(f"device {device}, memory {'unknown' if memory is None else f'{memory / 2**30:.1f} GiB may be used'}")
    if device == "torch":
        print("torch sees no GPU, or was told to use none: its code runs on the CPU. These are no figures of a GPU.")
    width, wide = (max(256, round(arguments.scale * size / 256) * 256) for size in (WIDTH, WIDE))
    shapes = [((width, width), 4), ((wide, width), 2), ((width, wide), 1)]
    rows = [sums(shapes, device)]
    show(rows[0])
    for name in arguments.types.split(","):
        of_type = [rounded(name, shape, count, arguments, device) for shape, count in shapes]
        for row in of_type:
            show(row)
        rows += of_type
    if arguments.json:
        write_json(arguments.json, {"device": device, "passes": arguments.passes, "rows": rows, "versions": versions()})


def show(row: dict[str, Any]) -> None:
    print(
        ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    )


def counted(work: Any) -> tuple[Any, float, int]:
    """What some work gives, its seconds, and how many of torch's operators it calls."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counting.calls += not function.is_view
            return function(*args, **(kwargs or {}))

    with Counting():
        work()  # what a first call loads is in no figure
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began, Counting.calls


def rounded(
    name: str, shape: tuple[int, int], count: int, arguments: argparse.Namespace, device: str
) -> dict[str, Any]:
    """One matrix of a shape, of which the block has `count`, and several side by side."""
    kind, (m, n), rng, passes = type_by_name(name), shape, np.random.default_rng(0), arguments.passes
    weights = (0.02 * rng.standard_normal(shape)).astype(np.float32)
    inputs, outputs = moments(n, rng), moments(m, rng)
    stock, options = quantize_rows(weights, kind, np.diag(inputs).copy()), RoundingOptions(passes=passes, enough=0)

    def run(place: str | None, beside: int = 1) -> Any:
        ready = [SecondMoments(inputs, outputs, options, place) for _ in range(beside)]
        return round_matrices([weights] * beside, [stock] * beside, kind.name, ready, options, place)[0]

    run(None) if m * n <= 1 << 20 else None  # compiles
    began = time.thread_time()
    cpu = run(None)
    cpu_seconds = time.thread_time() - began
    row: dict[str, Any] = {"work": kind.name, "matrix": f"{m} x {n}", "matrices": count, "CPU s": cpu_seconds}
    fitting = min(fit_device(m, n, True, device), arguments.beside)
    if not fitting:
        return row | {"device": "does not fit"}
    ours, seconds, calls = counted(lambda: run(device))
    _, seconds_of_all, calls_of_all = counted(lambda: run(device, fitting))
    operations = m * n * n * (1 + 2 * passes) + m * m * n * (1 + 2 * passes) + 2 * (m**3 + n**3) / 3
    return row | {
        "device s": seconds,
        "error CPU": cpu.after / cpu.before,
        "error device": ours.after / ours.before,
        "ratio": ours.after / cpu.after,
        "operators": calls,
        "side by side": fitting,
        "device s of all": seconds_of_all,
        "operators of all": calls_of_all,
        "GFLOP": operations / 1e9,
        "MB": 4 * (7 * m * n + 2 * n * n + 2 * m * m) / 1e6,
    }


def sums(shapes: list[tuple[tuple[int, int], int]], device: str) -> dict[str, Any]:
    """The sums of second moments of TOKENS tokens, of the inputs and outputs of a block."""
    import torch

    from bitladder.engine import as_torch

    def run(place: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        for (m, n), count in shapes:
            for size in (n, m):
                rows = torch.randn(TOKENS, size, generator=generator).to(place)
                total = torch.zeros(size, size, device=place)
                for _ in range(count):
                    total.addmm_(rows.T, rows)
                total[0, 0].item()  # waits for the device

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.thread_time()
    run(torch.device("cpu"))
    cpu_seconds = time.thread_time() - began
    torch.set_num_threads(threads)
    _, seconds, calls = counted(lambda: run(as_torch(device)))
    weights = sum(count * m * n for (m, n), count in shapes)
    squares = sum(count * (m * m + n * n) for (m, n), count in shapes)
    return {
        "work": "moments, sums",
        "tokens": TOKENS,
        "CPU s": cpu_seconds,
        "device s": seconds,
        "operators": calls,
        "GFLOP of sums": 2 * TOKENS * squares / 1e9,
        "GFLOP of products": 4 * TOKENS * weights / 1e9,
        "MB": 4 * squares / 1e6,
    }


if __name__ == "__main__":
    main()

"""What sequential calibration gains, and what it costs: KLD of one type for all block matrices, in the loaded model.

    python benchmarks/sequential.py --model F16.gguf --calibration TEXT --text TEXT [--types q3_K,q4_K] [--blocks 1]
        [--calibration-chunks 16] [--chunks 12] [-c 256] [--first WEIGHT] [--damping 1]
        [--ways plain,sequential,…] [--json OUT]

Ways: `stock` is the library's kernel with the diagonal of H; the others are error feedback and descent with the same
H = E[xxᵀ] of the full-precision model (`plain`), of the model whose earlier blocks are already replaced
(`sequential`), and that with the target that makes up for their errors (`asymmetric`); `…/input` goes on from input to
input within a block. Scored are the last half of each chunk's positions; the ± of a difference is of chunks, paired.
`--first` weighs the first token of each chunk in every H; `--damping` is the asymmetric target's.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import numpy as np

from bitladder.calibrate.sequential import SequentialModel, asymmetric_target
from bitladder.engine.context import Context
from bitladder.engine.decoding import Decoding
from bitladder.engine.model import Model
from bitladder.engine.native import versions
from bitladder.engine.types import TensorType, dequantize_into, quantize_rows, type_by_name
from bitladder.files import write_json
from bitladder.gguf.reader import GgufFile
from bitladder.rounding import RoundingOptions, round_tensor
from bitladder.text.chunks import text_chunks
from bitladder.text.texts import load_text

WAYS = ("stock", "plain", "sequential", "asymmetric", "sequential/input", "asymmetric/input")


def main() -> None:
    arguments = parse()
    with Model(arguments.model, vocab_only=True) as model:
        calibration, test = (
            text_chunks(model, load_text(text), arguments.n_ctx, chunks=count, spread=True).inputs()
            for text, count in (
                (arguments.calibration, arguments.calibration_chunks),
                (arguments.text, arguments.chunks),
            )
        )
    rows = []
    for kind in map(type_by_name, arguments.types.split(",")):
        weights = matrices(arguments.model, kind)
        plain = None
        for way in arguments.ways.split(","):
            row, klds = run(arguments, way, kind, weights, calibration, test)
            if way == "plain":
                plain = klds
            elif plain is not None:
                difference = klds - plain
                row["ratio"] = klds.mean() / plain.mean()
                row["ratio_error"] = difference.std(ddof=1) / len(difference) ** 0.5 / plain.mean()
            print(json.dumps(row), flush=True)
            rows.append(row)
    if arguments.json:
        write_json(arguments.json, {"model": arguments.model.name, "rows": rows, "versions": versions()})


def matrices(path: pathlib.Path, kind: TensorType) -> dict[str, np.ndarray]:
    """Matrices of blocks, float32, that the type can hold."""
    found = {}
    with GgufFile(path) as file:
        for name, tensor in file.tensors.items():
            if name.startswith("blk.") and len(tensor.shape) == 2 and tensor.shape[0] % kind.block == 0:
                found[name] = np.empty(tensor.shape[::-1], np.float32)
                dequantize_into(file.read(tensor), tensor.type, found[name])
    return found


def run(
    arguments: argparse.Namespace,
    way: str,
    kind: TensorType,
    weights: dict[str, np.ndarray],
    calibration: np.ndarray,
    test: np.ndarray,
) -> tuple[dict[str, Any], np.ndarray]:
    """Round all of them, and measure. Returns a row of the table and the mean KLD of each chunk."""
    profile = np.ones(arguments.n_ctx)
    profile[0] = arguments.first
    with SequentialModel(
        arguments.model,
        calibration,
        cross=way.startswith("asymmetric"),
        weights=dict.fromkeys(weights, profile),
        threads=arguments.threads,
    ) as model:
        before = predictions(model.model, test, arguments.threads)
        began, cpu = time.monotonic(), time.process_time()
        groups = [[name for name in names if name in weights] for names in model.groups(arguments.blocks)]
        if way.endswith("/input"):
            groups = [[name for name in names if name in weights] for names in model.groups(by_input=True)]
        groups = [names for names in groups if names]
        if way in ("stock", "plain"):
            groups = [[name for names in groups for name in names]]
        passes = model.cost(groups)
        for names in groups:
            for name, moment in model.collect(names).items():
                exact, inputs = weights[name], moment.inputs[0]
                target = (
                    exact if moment.cross is None else asymmetric_target(exact, inputs, moment.cross, arguments.damping)
                )
                blocks = quantize_rows(target, kind, np.ascontiguousarray(inputs.diagonal()))
                if way != "stock":
                    options = RoundingOptions(method="descent", passes=1)
                    blocks = round_tensor(target, blocks, kind.name, inputs, options).data
                values = np.empty_like(exact)
                dequantize_into(blocks, kind, values)
                model.replace(name, values)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        after = predictions(model.model, test, arguments.threads)
    klds = np.array(
        [(np.exp(a) * (a - b)).sum(axis=1).mean(dtype=np.float64) for a, b in zip(before, after, strict=True)]
    )
    row = {
        "type": kind.name,
        "way": way,
        "kld": klds.mean(),
        "error": klds.std(ddof=1) / len(klds) ** 0.5,
        "groups": len(groups),
        "passes": passes * (2 if way.startswith("asymmetric") else 1),
        "seconds": seconds,
        "cpu_seconds": cpu,
    }
    return row, klds


def predictions(model: Model, chunks: np.ndarray, threads: int | None) -> list[np.ndarray]:
    """Log-probabilities of the scored positions of each chunk."""
    n_ctx = chunks.shape[1]
    found = []
    with Context(model, Decoding(n_ctx=n_ctx, n_batch=n_ctx, n_ubatch=n_ctx, threads=threads)) as context:
        for chunk in chunks:
            context.clear()
            context.decode(chunk, np.arange(n_ctx), np.zeros(n_ctx, int), np.ones(n_ctx, bool))
            logits = context.logits()[n_ctx // 2 : -1].copy()
            logits -= logits.max(axis=1, keepdims=True)
            found.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--calibration", default="pydoc:calibration")
    parser.add_argument("--text", default="pydoc:test")
    parser.add_argument("--types", default="q3_K,q4_K")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--calibration-chunks", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("-c", "--n-ctx", type=int, default=256)
    parser.add_argument("--first", type=float, default=1.0)
    parser.add_argument("--damping", type=float, default=1.0)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Peak memory of quantizing, over models that differ in their number of blocks only.

    LLAMA_CPP_TOOLS=DIR python benchmarks/memory.py --model F16.gguf --blocks 10,40,160 --out memory.json

Each model has the metadata and tensor shapes of the one given, with its blocks as often as asked for and random
weights. bitladder and llama-quantize make the same preset of it, without an imatrix, one after the other.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile

from ratios import Side

BLOCK = re.compile(r"^blk\.(\d+)\.")


def write_model(source: pathlib.Path, out: pathlib.Path, blocks: int) -> None:
    """A model of the source's shapes with `blocks` blocks and random weights, in the source's types.

    To be run in a process of its own: a child's peak memory counts what its parent had when it was started.
    """
    import numpy as np

    from bitladder.gguf import GgufFile, GgufWriter, TensorPlan, u32

    dice = np.random.default_rng(0)
    with GgufFile(source) as file, out.open("wb") as stream:
        first = [tensor for tensor in file.tensors.values() if BLOCK.match(tensor.name) and "blk.0." in tensor.name]
        others = [tensor for tensor in file.tensors.values() if not BLOCK.match(tensor.name)]
        plans = [TensorPlan(tensor.name, tensor.shape, tensor.type) for tensor in others]
        for block in range(blocks):
            plans += [TensorPlan(BLOCK.sub(f"blk.{block}.", t.name), t.shape, t.type) for t in first]
        metadata = file.metadata | {f"{file.architecture}.block_count": u32(blocks)}
        writer = GgufWriter(stream, metadata, plans)
        for plan in plans:
            kind = {"f16": np.float16, "f32": np.float32}[plan.type.name]
            weights = (0.02 * dice.standard_normal(int(np.prod(plan.shape)), np.float32)).astype(kind)
            writer.write(plan.name, weights.view(np.uint8))
        writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=pathlib.Path, help="F16 GGUF whose shapes are taken")
    parser.add_argument("--blocks", default="10,40,160", help="numbers of blocks, with commas")
    parser.add_argument("--preset", default="Q4_K_M")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    options = parser.parse_args()
    if "LLAMA_CPP_TOOLS" not in os.environ:
        sys.exit("set LLAMA_CPP_TOOLS to the folder with llama-quantize")
    tools = pathlib.Path(os.environ["LLAMA_CPP_TOOLS"])
    rows = []
    print(f"{'blocks':>7} {'F16 MB':>8} {'ours MB':>8} {'theirs MB':>10} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model, out = folder / "model.gguf", folder / "out.gguf"
        for blocks in map(int, options.blocks.split(",")):
            maker = multiprocessing.get_context("spawn").Process(
                target=write_model, args=(options.model, model, blocks)
            )
            maker.start()
            maker.join()
            if maker.exitcode:
                sys.exit("no model was made")
            ours = Side(dict(os.environ))
            theirs = Side(os.environ | {"LD_LIBRARY_PATH": str(tools)})
            bitladder = pathlib.Path(sys.executable).with_name("bitladder")
            ours.run([str(bitladder), "quantize", "-q", "-m", str(model), "-o", str(out), options.preset])
            theirs.run([str(tools / "llama-quantize"), str(model), str(out), options.preset])
            row = {
                "blocks": blocks,
                "f16_megabytes": round(model.stat().st_size / 1e6, 1),
                "megabytes_ours": round(ours.megabytes[0], 1),
                "megabytes_theirs": round(theirs.megabytes[0], 1),
                "ratio": round(ours.megabytes[0] / theirs.megabytes[0], 3),
            }
            rows.append(row)
            print("{blocks:7} {f16_megabytes:8} {megabytes_ours:8} {megabytes_theirs:10} {ratio:6}".format(**row))
    if options.out:
        options.out.write_text(json.dumps({"preset": options.preset, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

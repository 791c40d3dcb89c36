#!/usr/bin/env python3
"""Wall time and peak memory of bitladder against llama.cpp's own tools, doing the same work on the same files.

    LLAMA_CPP_TOOLS=DIR python benchmarks/ratios.py --model F16.gguf --text wiki.test.raw --calibration TEXT

Runs are interleaved (ours, theirs, ours, theirs, …), so that whatever else the machine does hits both alike; the
figures are ratios of medians. Nothing is skipped on either side: each command is what a user would type.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]


class Side:
    """Runs commands and remembers seconds and peak resident megabytes of each."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.seconds: list[float] = []
        self.megabytes: list[float] = []

    def run(self, command: list[str]) -> None:
        started = time.perf_counter()
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log.seek(0)
                sys.exit(f"{' '.join(command)} failed:\n{log.read().decode()[-2000:]}")
        self.seconds.append(time.perf_counter() - started)
        self.megabytes.append(usage.ru_maxrss / 1024)


def compare(name: str, ours: list[str], theirs: list[str], repeats: int, tools: pathlib.Path) -> dict[str, object]:
    """Interleave two commands and return medians and ratios."""
    sides = Side(dict(os.environ)), Side(os.environ | {"LD_LIBRARY_PATH": str(tools)})
    for index in range(repeats):
        # The order alternates too: the second of a pair finds warmer caches.
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            sides[which].run((ours, theirs)[which])
    seconds = [statistics.median(side.seconds) for side in sides]
    megabytes = [statistics.median(side.megabytes) for side in sides]
    pairs = sorted(a / b for a, b in zip(sides[0].seconds, sides[1].seconds, strict=True))
    row = {
        "job": name,
        "seconds_ours": round(seconds[0], 2),
        "seconds_theirs": round(seconds[1], 2),
        "time_ratio": round(seconds[0] / seconds[1], 3),
        "time_ratio_of_pairs": [round(pair, 3) for pair in pairs],
        "megabytes_ours": round(megabytes[0]),
        "megabytes_theirs": round(megabytes[1]),
        "memory_ratio": round(megabytes[0] / megabytes[1], 3),
        "repeats": repeats,
    }
    print(
        f"{name:12} {seconds[0]:8.2f} s {seconds[1]:8.2f} s  × {row['time_ratio']:.3f}   "
        f"{megabytes[0]:7.0f} MB {megabytes[1]:7.0f} MB  × {row['memory_ratio']:.3f}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="full-precision GGUF")
    parser.add_argument("--text", type=pathlib.Path, required=True, help="text to measure on")
    parser.add_argument("--calibration", type=pathlib.Path, help="calibration text; the text by default")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="comma-separated jobs: imatrix, perplexity, kld, quantize")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks/results/ratios.json")
    options = parser.parse_args()
    if not os.environ.get("LLAMA_CPP_TOOLS"):
        sys.exit("set LLAMA_CPP_TOOLS to the folder with llama-imatrix, llama-perplexity and llama-quantize")
    tools = pathlib.Path(os.environ["LLAMA_CPP_TOOLS"])
    bitladder = str(pathlib.Path(sys.executable).with_name("bitladder"))
    model, text, chunks = str(options.model), str(options.text), str(options.chunks)
    calibration = str(options.calibration or options.text)
    print(f"{'job':12} {'ours':>10} {'theirs':>10}  {'':7}   {'ours':>10} {'theirs':>10}")
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        imatrix, quant, base = str(work / "imatrix.gguf"), str(work / "quant.gguf"), str(work / "f16.base")
        log_probs = str(work / "f16.logits")
        environment = os.environ | {"LD_LIBRARY_PATH": str(tools)}

        def theirs(name: str, *arguments: str) -> list[str]:
            return [str(tools / name), *arguments]

        def prepare(command: list[str]) -> None:
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        on_text = ["-f", text, "--chunks", chunks]
        kld = ["--kl-divergence-base", log_probs]
        prepare(theirs("llama-imatrix", "-m", model, "-f", calibration, "--chunks", chunks, "-o", imatrix, "--no-ppl"))
        prepare(theirs("llama-quantize", "--imatrix", imatrix, model, quant, "Q4_K_M"))
        on_calibration = ["-f", calibration, "--chunks", chunks]
        jobs = {
            "imatrix": (
                [bitladder, "imatrix", "-q", "-m", model, *on_calibration, "-o", str(work / "a.gguf")],
                theirs("llama-imatrix", "-m", model, *on_calibration, "-o", str(work / "b.gguf"), "--no-ppl"),
            ),
            "perplexity": (
                [bitladder, "eval", "-q", "-m", model, *on_text],
                theirs("llama-perplexity", "-m", model, *on_text),
            ),
            "kld": (
                [bitladder, "eval", "-q", "-m", quant, "--base", model, "--base-file", base, *on_text],
                theirs("llama-perplexity", "-m", quant, "--kl-divergence", *kld, *on_text),
            ),
            "quantize": (
                [bitladder, "quantize", "-q", "-m", model, "--imatrix", imatrix, "-o", str(work / "c.gguf"), "Q4_K_M"],
                theirs("llama-quantize", "--imatrix", imatrix, model, str(work / "d.gguf"), "Q4_K_M"),
            ),
        }
        wanted = options.only.split(",") if options.only else list(jobs)
        result: dict[str, object] = {"model": options.model.name, "text": options.text.name, "chunks": options.chunks}
        if "kld" in wanted:
            prepare(theirs("llama-perplexity", "-m", model, *kld, *on_text))
            prepare(jobs["kld"][0])
            sizes = pathlib.Path(base).stat().st_size, pathlib.Path(log_probs).stat().st_size
            result["base_bytes"] = {"ours": sizes[0], "theirs": sizes[1], "ratio": round(sizes[0] / sizes[1], 4)}
            print(f"base file    {sizes[0] / 1e6:8.1f} MB {sizes[1] / 1e6:7.1f} MB  1/{sizes[1] / sizes[0]:.1f}")
        result["jobs"] = [compare(name, *jobs[name], options.repeats, tools) for name in wanted]
    helps = []
    for _ in range(2 * options.repeats + 1):
        started = time.perf_counter()
        subprocess.run([bitladder, "--help"], check=True, stdout=subprocess.DEVNULL)
        helps.append(time.perf_counter() - started)
    result["help_seconds"] = round(statistics.median(helps), 3)
    print(f"bitladder --help: {result['help_seconds']} s (median of {len(helps)})")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

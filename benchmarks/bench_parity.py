#!/usr/bin/env python3
"""`bitladder bench` against llama-bench on the same file, with the same options, in turns.

    LLAMA_CPP_TOOLS=DIR python benchmarks/bench_parity.py --model Q.gguf [--threads 2] [--rounds 10]

Each round runs both once (-r 1), and the order changes from round to round, so that a machine that is busy with
something else slows both alike. The ratio is the mean over rounds of ln(ours/theirs), with its standard error; what a
round's two halves do not share shows in that error. The load average says how quiet the machine was.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from bitladder.engine import versions
from bitladder.engine.cpu_kernels import extras_work

ROOT = pathlib.Path(__file__).parents[1]


def rows(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Tokens per second by test, from the JSON that either prints."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = {}
    for row in json.loads(done.stdout):
        parts = [f"pp{row['n_prompt']}"] * bool(row["n_prompt"]) + [f"tg{row['n_gen']}"] * bool(row["n_gen"])
        found["+".join(parts)] = float(row["avg_ts"])
    return found


def compared(test: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Means, spreads, and the ratio ± of one test."""
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    ratio = math.exp(statistics.fmean(logs))
    return {
        "test": test,
        "ours": {"mean": statistics.fmean(ours), "stddev": statistics.stdev(ours)},
        "theirs": {"mean": statistics.fmean(theirs), "stddev": statistics.stdev(theirs)},
        "ratio": {"value": ratio, "error": ratio * statistics.stdev(logs) / math.sqrt(len(logs))},
        "median_ratio": math.exp(statistics.median(logs)),
        "samples": [[round(a, 2), round(b, 2)] for a, b in zip(ours, theirs, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, action="append", required=True, help="GGUF file; may be repeated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=128)
    parser.add_argument("--pair", default="512,128", help="-pg")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks/results/bench-parity.json")
    options = parser.parse_args()
    if not os.environ.get("LLAMA_CPP_TOOLS"):
        sys.exit("set LLAMA_CPP_TOOLS to the folder with llama-bench")
    tools = pathlib.Path(os.environ["LLAMA_CPP_TOOLS"])
    tests = [
        "-p",
        str(options.prompt),
        "-n",
        str(options.gen),
        "-pg",
        options.pair,
        "-t",
        str(options.threads),
        "-r",
        "1",
    ]
    extra = [] if extras_work() else ["--repack", "0"]  # what this library cannot do, the tool cannot either
    bitladder = str(pathlib.Path(sys.executable).with_name("bitladder"))
    result: dict[str, Any] = {
        "options": " ".join(tests),
        "rounds": options.rounds,
        "versions": versions(),
        "load_average": [os.getloadavg()[0]],
        "models": {},
    }
    print(f"{'model':28} {'test':13} {'ours t/s':>18} {'llama-bench t/s':>18}   ratio")
    for model in options.model:
        sides = (
            ([bitladder, "bench", "-m", str(model), *tests, "--json", "-q"], dict(os.environ)),
            (
                [str(tools / "llama-bench"), "-m", str(model), *tests, "-o", "json", *extra],
                os.environ | {"LD_LIBRARY_PATH": str(tools)},
            ),
        )
        samples: tuple[dict[str, list[float]], ...] = ({}, {})
        for index in range(options.rounds):
            for which in (0, 1) if index % 2 == 0 else (1, 0):
                for test, speed in rows(*sides[which]).items():
                    samples[which].setdefault(test, []).append(speed)
        found = [compared(test, ours, samples[1][test]) for test, ours in samples[0].items()]
        result["models"][model.name] = found
        result["load_average"].append(os.getloadavg()[0])
        for row in found:
            cells = [f"{row[side]['mean']:9.2f} ± {row[side]['stddev']:6.2f}" for side in ("ours", "theirs")]
            ratio = f"{row['ratio']['value']:.3f} ± {row['ratio']['error']:.3f} (median {row['median_ratio']:.3f})"
            print(f"{model.name[:28]:28} {row['test']:13} {cells[0]} {cells[1]}   {ratio}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

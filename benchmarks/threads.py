#!/usr/bin/env python3
"""What every stage of a run gains from a second thread (or from N), and why it gains no more.

    python benchmarks/threads.py [MODEL] [--threads 2] [--repeats 5] [--seconds 8] [--only STAGE;…] [--out JSON]

MODEL is a checkpoint or a full-precision GGUF; without one it is the embedded model. Each measurement is a process of
its own that calls the product's function (`thread_stages.py`), after a first call that is not timed. Measurements take
turns: one thread, N threads, and N processes of one thread each at once, whose wall time shows what the machine gives
to such work, whatever the code does. An amount of work that takes about `--seconds` with one thread is looked for once.

    speed-up   wall seconds with one thread, by those with N: the median over the rounds, and the smallest and largest
    ceiling    N × wall seconds with one thread, by the mean of those of N processes at once
    CPU        CPU seconds with N threads, by those with one
    busy       CPU seconds by wall seconds, with one thread: above 1, something does not keep to the number of threads

The rows "(arithmetic)" and "(memory)" are no stages: hashes in the caches, and copies of main memory. A stage whose
ceiling is below 1.7, and which reaches it, is bound by what the processes share: with an arithmetic that reaches 1.7,
that is memory. Then CPU seconds grow too, because processors that wait for memory count as busy. A stage that stays
below its ceiling has work that only one thread does, if CPU seconds stay as they are, or threads that wait by spinning,
if they grow by more than those of the processes.

What is measured is kept after each round, and a call that was interrupted continues. Rows of another model, machine or
number of threads are measured again, all of them. A stage keeps its amount.
"""

import argparse
import collections
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import IO, Any

from thread_stages import STAGES, prepare

from bitladder.engine import main_memory, processors, versions
from bitladder.files import sha256_bytes, sha256_file, write_json

ROOT = pathlib.Path(__file__).parents[1]
ENOUGH = 1.7  # the speed-up of two threads that work without a common limit should reach
GROWN = 1.15  # CPU seconds that are so much more are no noise
NEAR = 0.9  # of the ceiling: a stage that reaches so much of it is bound by what processes share
PROBES = ("(arithmetic)", "(memory)")


def start(stage: str, folder: pathlib.Path, threads: int, amount: int) -> subprocess.Popen[str]:
    """A process that is about to measure a stage."""
    command = [sys.executable, str(ROOT / "benchmarks/thread_stages.py"), stage, str(folder), str(threads), str(amount)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def written(process: subprocess.Popen[str], wanted: str) -> str:
    """The next line of a process that begins with a text; ends the script if there is none."""
    stream: IO[str] = process.stdout  # type: ignore[assignment]
    for line in stream:
        if line.startswith(wanted):
            return line
    sys.exit(f"{' '.join(map(str, process.args))} ended with {process.wait()}; run it to see why")  # type: ignore[arg-type]


def measure(stage: str, folder: pathlib.Path, threads: int, amount: int, processes: int = 1) -> list[dict[str, float]]:
    """Measures a stage in some processes that begin together."""
    running = [start(stage, folder, threads, amount) for _ in range(processes)]
    try:
        for process in running:
            written(process, "ready")
        for process in running:
            process.stdin.write("go\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        results = [json.loads(written(process, "{")) for process in running]
        for process in running:
            process.wait()  # it deletes what it wrote, which would fill the disk
        return results
    finally:
        for process in running:
            process.kill()
            process.wait()


def amount_of(stage: str, folder: pathlib.Path, seconds: float) -> int:
    """The amount that takes about so many seconds with one thread."""
    command = [sys.executable, str(ROOT / "benchmarks/thread_stages.py"), stage, str(folder), "1", "0", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{stage} failed:\n{done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["amount"])


def summary(stage: str, row: dict[str, Any], threads: int, arithmetic: float | None) -> dict[str, Any]:
    """Medians, ratios and a verdict of a stage, from its rounds."""
    rounds = row["rounds"]
    walls = [(each["one"]["wall"], each["all"]["wall"]) for each in rounds]
    ups = [one / several for one, several in walls]
    ceilings = [
        threads * each["one"]["wall"] / statistics.fmean(copy["wall"] for copy in each["copies"]) for each in rounds
    ]
    growths = [each["all"]["cpu"] / each["one"]["cpu"] for each in rounds]
    found = {
        "stage": stage,
        "amount": f"{row['amount']} {STAGES[stage].unit}",
        "wall_one": statistics.median(one for one, _ in walls),
        "wall_all": statistics.median(several for _, several in walls),
        "speed_up": statistics.median(ups),
        "spread": [min(ups), max(ups)],
        "ceiling": statistics.median(ceilings),
        "cpu_growth": statistics.median(growths),
        "copies_cpu_growth": statistics.median(
            statistics.fmean(copy["cpu"] for copy in each["copies"]) / each["one"]["cpu"] for each in rounds
        ),
        "busy_one": statistics.median(each["one"]["cpu"] / each["one"]["wall"] for each in rounds),
        "rounds": len(rounds),
    }
    return found | {"verdict": verdict(found, threads, arithmetic)}


def verdict(found: dict[str, Any], threads: int, arithmetic: float | None) -> str:
    """Why a stage is no faster, in a few words."""
    up, ceiling = found["speed_up"], found["ceiling"]
    enough = 1 + (ENOUGH - 1) * (threads - 1)
    remarks = []
    if found["stage"] in PROBES:
        remarks.append("what the machine gives")
    elif up >= enough:
        remarks.append("scales")
    elif ceiling < enough and up >= NEAR * ceiling:
        shared = "memory" if arithmetic is None or arithmetic >= enough else "the machine, arithmetic too"
        remarks.append(f"bound by {shared}: {threads} processes of one thread are no faster")
    elif found["cpu_growth"] > GROWN * max(1.0, found["copies_cpu_growth"]):
        remarks.append("threads wait by spinning, or do work twice")
    else:
        # Amdahl: 1 / up = s + (1 - s) / N.
        alone = (1 / up - 1 / threads) / (1 - 1 / threads)
        remarks.append(f"{min(alone, 1):.0%} of the time is of one thread")
    if found["stage"] not in PROBES and up < NEAR * ceiling < NEAR * enough:
        remarks.append(f"two processes reach {ceiling:.2f} only" if threads == 2 else f"processes reach {ceiling:.2f}")
    if found["spread"][1] < 1:
        remarks.append(f"SLOWER with {threads} threads")
    if found["busy_one"] > 1.1:
        remarks.append("one thread is not kept to")
    return "; ".join(remarks)


def table(rows: list[dict[str, Any]], threads: int) -> str:
    """The rows for a reader."""
    lines = [
        f"{'stage':20} {'amount':>18} {'1 thread':>10} {f'{threads} threads':>10} {'speed-up':>8}  "
        f"{'(least – most)':14} {'ceiling':>7} {'CPU':>5} {'busy':>5}  verdict"
    ]
    for row in rows:
        spread = f"({row['spread'][0]:.2f} – {row['spread'][1]:.2f})"
        lines.append(
            f"{row['stage']:20} {row['amount']:>18} {row['wall_one']:>8.2f} s {row['wall_all']:>8.2f} s "
            f"{row['speed_up']:>8.2f}  {spread:14} {row['ceiling']:>7.2f} {row['cpu_growth']:>5.2f} "
            f"{row['busy_one']:>5.2f}  {row['verdict']}"
        )
    return "\n".join(lines)


def load(out: pathlib.Path, key: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call measured of the same, or nothing."""
    if out.exists():
        kept: dict[str, Any] = json.loads(out.read_text())
        if {name: kept.get(name) for name in key} == key:
            return kept
    return key | {"measured": {}}


def save(out: pathlib.Path, kept: dict[str, Any], threads: int) -> list[dict[str, Any]]:
    """Writes what is measured, with the summary of each stage that has a whole round. Returns the summaries."""
    measured = kept["measured"]
    done = {stage: row for stage, row in measured.items() if row["rounds"]}
    arithmetic = None
    if PROBES[0] in done:
        arithmetic = summary(PROBES[0], done[PROBES[0]], threads, None)["ceiling"]
    rows = [summary(stage, done[stage], threads, arithmetic) for stage in STAGES if stage in done]
    rounded = [
        {
            name: [round(each, 3) for each in value] if isinstance(value, list) else value
            for name, value in ((name, round(v, 3) if isinstance(v, float) else v) for name, v in row.items())
        }
        for row in rows
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {**{name: value for name, value in kept.items() if name != "measured"}, "rows": rounded,
                     "measured": measured})  # fmt: skip
    return rows


def work_folder(model: pathlib.Path) -> pathlib.Path:
    """A folder for what stages read of a model, in the system's folder for such files."""
    known = f"{model.resolve()} {model.stat().st_mtime_ns}"
    return pathlib.Path(tempfile.gettempdir()) / f"bitladder-threads-{sha256_bytes(known.encode())[:12]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=pathlib.Path, default=ROOT / "examples/tiny-olmo2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="about what a stage takes with one thread")
    parser.add_argument("--only", default="", help="names of stages, separated by semicolons")
    parser.add_argument("--work", type=pathlib.Path, help="folder for what stages read, of one model; it is kept")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks/results/threads.json")
    options = parser.parse_args()
    wanted = [name.strip() for name in options.only.split(";") if name.strip()] or list(STAGES)
    if unknown := [name for name in wanted if name not in STAGES]:
        sys.exit(f"no stage {', '.join(unknown)}; there are {'; '.join(STAGES)}")
    work = options.work or work_folder(options.model)
    prepare(options.model, work)
    key = {
        "model": options.model.name,
        "sha256": sha256_file(work / "full.gguf"),
        "threads": options.threads,
        "processor": processors(0),
        "cpus": os.cpu_count(),
        "memory_gib": round(main_memory() / 2**30),
        "omp": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("OMP_", "GOMP_", "KMP_"))},
        "versions": versions(),
    }
    kept = load(options.out, key)
    measured = collections.defaultdict(dict, kept["measured"])
    kept["measured"] = measured
    for stage in wanted:
        if STAGES[stage].needs and not (work / STAGES[stage].needs).exists():
            print(f"{stage}: MODEL is no {STAGES[stage].needs}")
            continue
        row = measured[stage] or {"amount": amount_of(stage, work, options.seconds), "rounds": []}
        measured[stage] = row
        while len(row["rounds"]) < options.repeats:
            turns = [("one", 1, 1), ("all", options.threads, 1), ("copies", 1, options.threads)]
            shift = len(row["rounds"]) % 3  # the order alternates
            found: dict[str, Any] = {"load": round(os.getloadavg()[0], 2), "at": f"{datetime.datetime.now():%H:%M}"}
            for name, threads, processes in turns[shift:] + turns[:shift]:
                each = measure(stage, work, threads, row["amount"], processes)
                found[name] = each if name == "copies" else each[0]
            row["rounds"].append(found)
            rows = save(options.out, kept, options.threads)
        rows = save(options.out, kept, options.threads)
        print(table([each for each in rows if each["stage"] == stage], options.threads).splitlines()[-1], flush=True)
    rows = save(options.out, kept, options.threads)
    print()
    print(table([row for row in rows if row["stage"] in wanted], options.threads))


if __name__ == "__main__":
    main()

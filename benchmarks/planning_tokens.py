#!/usr/bin/env python3
"""What plans lose if they are made on other or fewer tokens: KLD of their files, several plans each.

    python benchmarks/planning_tokens.py F.gguf --imatrix I.gguf --text TEXT --measure wiki.test.raw --work W
        --plan before=n_ctx:256,unscored:128,probe_tokens:16000 --plan half=n_ctx:128,unscored:8,probe_tokens:8000

A plan depends on its passages by chance. So the text is cut into parts, and each way of planning makes a plan on each
part. A way is a name and options of `PlanOptions`; the effort has the others. Each plan becomes a file by the library's
blocks, which is measured as `bitladder eval` measures. CPU seconds are those of a plan whose blocks are rendered.
Ratios are to the first way, on the same part of the text; their mean is geometric, and ± is the standard error over the
parts. What is made is kept in --work: a run that was cut short goes on.
"""

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np

from bitladder.errors import BitladderError
from bitladder.evaluate import MeasureOptions, evaluate
from bitladder.files import write_json
from bitladder.plan import RENDERED, PlanInputs, Planner, PlanOptions, Target
from bitladder.quantize import QuantizeOptions, quantize
from bitladder.text import Text, load_text


def main() -> None:
    """Plans, measures, and prints the table."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "plans.json"
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    same = [str(options.model), str(options.imatrix), options.text, options.parts, options.effort, options.rungs]
    same += [options.measure, options.chunks]
    rows = []
    for part in range(options.parts):
        for name, settings in options.plan:
            key = json.dumps([*same, part, settings])
            if key not in known:
                known[key] = planned(options, part, settings)
                write_json(kept, known)
            rows.append(known[key] | {"part": part, "way": name, "settings": settings})
            print(f"part {part + 1}, {name}: {json.dumps(known[key])}", flush=True)
    for rung in options.rungs:
        for name, _ in options.plan:
            print(f"{rung}, {name}: {compared(rows, rung, name, options.plan[0][0])}")
    if options.json:
        write_json(options.json, {"command": sys.argv[1:], "plans": rows})


def planned(options: argparse.Namespace, part: int, settings: dict[str, int]) -> dict[str, Any]:
    """Plans on a part of the text: KLD of each rung's file, tokens, and CPU seconds of planning."""
    how = PlanOptions().at_effort(options.effort).replace(threads=options.threads, **settings)
    work = options.work / "plan"
    inputs = PlanInputs(options.model, options.imatrix, [part_of(options.text, part, options.parts)], work=work)
    types, tokens = {}, 0
    with Planner(inputs, how) as planner:
        presets = {rung: planner.subject.preset(rung) for rung in options.rungs}
        targets = {rung: Target(f"like {rung}", max_bytes=preset.bytes) for rung, preset in presets.items()}
        for preset in presets.values():
            menus = planner.menus(planner.window(8 * preset.bytes / planner.subject.weights()), preset)
            planner.render_share([(name, kind.name) for name, menu in menus.items() for kind in menu], room=1 << 40)
        before = time.process_time()
        for rung, preset in presets.items():
            result = planner.plan(targets[rung], planner.prices_for(targets[rung], preset), preset)
            types[rung], tokens = result.types, tokens + result.tokens
        seconds = time.process_time() - before
    for path in work.iterdir():  # a plan's journal and prices would save measurements of the next
        if path.name != RENDERED:
            path.unlink()
    kld = {rung: measured(options, chosen) for rung, chosen in types.items()}
    return {"tokens": tokens, "cpu_seconds": round(seconds, 1), "kld": kld}


def measured(options: argparse.Namespace, types: dict[str, str]) -> float:
    """KLD of the file with these types."""
    out = options.work / "candidate.gguf"
    how = QuantizeOptions("Q8_0", types=types)
    quantize(options.model, out, how, imatrix=options.imatrix, threads=options.threads)
    text, settings = load_text(options.measure), MeasureOptions(chunks=options.chunks, threads=options.threads)
    scores = evaluate(out, text, settings, base=options.model, base_file=options.work / "measure.base")
    out.unlink()
    assert scores.kld is not None
    return scores.kld.value


def part_of(name: str, part: int, parts: int) -> Text:
    """A part of a text, cut at ends of lines."""
    lines = load_text(name).text.splitlines(keepends=True)
    start, stop = (round(len(lines) * edge / parts) for edge in (part, part + 1))
    return Text.of(f"part {part + 1} of {parts}", "".join(lines[start:stop]))


def compared(rows: list[dict[str, Any]], rung: str, way: str, first: str) -> str:
    """Geometric mean of the ratios to the first way ±, and of CPU seconds."""

    def logs(name: str) -> np.ndarray:
        return np.log([[row["kld"][rung], row["cpu_seconds"]] for row in rows if row["way"] == name])

    gaps = logs(way) - logs(first)
    kld, seconds = np.exp(gaps.mean(axis=0))
    error = gaps[:, 0].std(ddof=1) / np.sqrt(len(gaps)) if len(gaps) > 1 else np.nan
    return f"KLD {kld:.3f} ± {kld * error:.3f} of {first}'s over {len(gaps)} plans, CPU time {seconds:.2f}"


def way(text: str) -> tuple[str, dict[str, int]]:
    """NAME=OPTION:VALUE,…"""
    name, _, settings = text.partition("=")
    pairs = (setting.partition(":") for setting in settings.split(",") if setting)
    return name, {option: int(value) for option, _, value in pairs}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, help="F16 GGUF")
    parser.add_argument("--imatrix", type=pathlib.Path, required=True)
    parser.add_argument("--text", required=True, help="to plan on, not the imatrix's")
    parser.add_argument("--measure", required=True, help="text to measure on")
    parser.add_argument("--chunks", type=int, default=20, help="of 512 tokens, to measure on")
    parser.add_argument("--parts", type=int, default=5)
    parser.add_argument("--rungs", type=lambda text: tuple(text.split(",")), default=("Q4_K_M",))
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--plan", type=way, action="append", required=True, metavar="NAME=OPTION:VALUE,…")
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except BitladderError as error:
        sys.exit(f"planning_tokens: {error}")

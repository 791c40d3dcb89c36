#!/usr/bin/env python3
"""What planned types gain at equal bytes, step by step, on text that neither imatrix nor plan has seen.

    python benchmarks/allocation.py --model F16.gguf --imatrix imatrix.gguf --calibration TEXT --text wiki.test.raw

For each rung: the preset; one type for all; the importance-weighted squared error with the same solver; our prices
spent greedily; the exact solution with K-quants only and with all types; and that solution after feedback. Every recipe
becomes a file through the library's kernels and is measured as `bitladder eval` measures. Everything is kept in --work,
recipes too: a run that was cut short goes on, and nothing is measured twice. Prints a table and writes JSON.
"""

import argparse
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from bitladder import evaluate
from bitladder.engine import type_by_name
from bitladder.errors import BitladderError
from bitladder.files import write_json
from bitladder.plan import (
    PlanInputs,
    Planner,
    PlanOptions,
    PlanResult,
    Preset,
    PriceOptions,
    Target,
    TypePrices,
    load_prices,
    planned_recipe,
)
from bitladder.plan.allocate.allocation import greedy
from bitladder.plan.allocate.problem import Problem
from bitladder.plan.prices.menu import menu_types
from bitladder.plan.rungs import moved_presets, weighted_error
from bitladder.quantize import QuantizeOptions, quantize
from bitladder.recipe import write_recipe
from bitladder.text import load_text

RUNGS = ("IQ3_M", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")


class Bench:
    """One model: recipes in, KLD of real files out, each measured once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: pathlib.Path = options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.text = load_text(str(options.text))
        self.settings = evaluate.MeasureOptions(n_ctx=512, chunks=options.chunks, threads=options.threads)
        self.results = self.work / "results.json"
        self.known: dict[str, Any] = json.loads(self.results.read_text()) if self.results.exists() else {}

    def kld(self, types: Mapping[str, str]) -> dict[str, Any]:
        """KLD ± of the file with these types, and its bytes."""
        what = json.dumps([sorted(types.items()), self.text.sha256, self.options.chunks])
        key = hashlib.sha256(what.encode()).hexdigest()
        if key not in self.known:
            out = self.work / "candidate.gguf"
            made = quantize(
                self.options.model,
                out,
                QuantizeOptions("Q8_0", types=dict(types)),
                imatrix=self.options.imatrix,
                threads=self.options.threads,
            )
            base = self.work / f"{self.text.name}.base"
            scores = evaluate.evaluate(
                out,
                self.text,
                self.settings,
                base=self.options.model,
                base_file=base,
            )
            out.unlink()
            assert scores.kld is not None
            self.known[key] = {"bytes": made.bytes, "kld": scores.kld.value, "error": scores.kld.error}
            write_json(self.results, self.known)
        found: dict[str, Any] = self.known[key]
        return found


def main() -> None:
    options = arguments()
    bench = Bench(options)
    plan = PlanOptions().at_effort("high")
    plan = plan.replace(threads=options.threads, probe_tokens=options.probe_tokens, chunks=options.plan_chunks)
    text = load_text(str(options.calibration))
    inputs = PlanInputs(options.model, options.imatrix, [text], work=options.work / "plan")
    rows: list[dict[str, Any]] = []
    with Planner(inputs, plan) as planner:
        presets = {rung: planner.subject.preset(rung) for rung in options.rungs}
        began = time.monotonic()
        sensitivity = prices(planner, list(presets.values()))
        print(f"prices: {sensitivity.tokens} tokens, {time.monotonic() - began:.0f} s, check {sensitivity.check}")
        for rung, preset in presets.items():
            for name, types, facts in variants(planner, sensitivity, rung, preset, options.only):
                found = bench.kld(types) | facts | {"rung": rung, "name": name, "budget": preset.bytes}
                rows.append(found)
                first = next(row for row in rows if row["rung"] == rung)
                found["ratio"] = found["kld"] / first["kld"]
                print(
                    f"{rung:8} {name:28} {found['bytes']:>11,} bytes  KLD {found['kld']:.5f} ± {found['error']:.5f}  "
                    f"{found['ratio']:.3f} × the preset  {facts or ''}",
                    flush=True,
                )
        if options.reach:
            rows.append(reach(planner, sensitivity, bench, presets, options.reach))
    if options.out:
        write_json(options.out, document(options, bench, sensitivity, rows))


def prices(planner: Planner, presets: list[Preset]) -> TypePrices:
    """Prices for all rungs at once, from the work folder if they are there."""
    kept = planner.work / "sensitivity.json"
    if kept.exists():
        return load_prices(kept)
    subject = planner.subject
    bpw = [8 * (preset.bytes - subject.header_bytes()) / subject.weights() for preset in presets]
    made = planner.price(planner.window(*bpw))
    made.save(kept)
    return made


def variants(
    planner: Planner, sensitivity: TypePrices, rung: str, preset: Preset, only: str | None
) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Name, types of all tensors, and facts, each made when it is asked for; the preset first."""
    subject, target = planner.subject, Target(f"like {rung}", max_bytes=preset.bytes)
    problem = planner.build(sensitivity.predicted())

    def whole(types: Mapping[str, str]) -> dict[str, str]:
        return {name: types.get(name, tensor.type.name) for name, tensor in subject.file.tensors.items()}

    yield "preset", preset.types, {}
    if only != "plan":
        same_type = uniform(problem, preset.bytes)
        if same_type:
            yield "one type for all", whole(same_type), {}
        yield "weighted error, exact", whole(weighted_error(sensitivity, planner.build, target)), {}
        yield "our prices, greedy", whole(greedy(problem, preset.bytes).types), {}
        k_types = {kind.name for kind in menu_types("k")}
        k_prices = {
            name: {kind: cost for kind, cost in menu.items() if kind in k_types}
            for name, menu in sensitivity.predicted().items()
        }
        yield "our prices, exact, K only", whole(target.solve(planner.build(k_prices)).types), {}
        if subject.imatrix is not None:
            moved = moved_presets(problem, preset, subject.imatrix, subject.places, planner.options.rivals)
            for statistic, types in moved.items():
                if types:
                    yield f"preset moved by {statistic}", whole(types), {}
    solved = target.solve(problem)
    yield "our prices, exact", whole(solved.types), {"predicted": solved.cost}
    result = planner.plan(target, sensitivity, preset)
    write_recipe(planner.work / f"{rung}.toml", planned_recipe(subject, result, target))
    yield "and feedback", result.types, facts_of(result)


def uniform(problem: Problem, max_bytes: int) -> dict[str, str] | None:
    """The largest type that fits, for all tensors. Where a width cannot hold it, the smallest type above it.

    Returns None if not even the smallest type fits.
    """

    def bpw(kind: str) -> float:
        return type_by_name(kind).bpw

    kinds = sorted({option.type for menu in problem.options.values() for option in menu}, key=bpw)
    for kind in reversed(kinds):
        types = {}
        for name, menu in problem.options.items():
            large = [option for option in menu if bpw(option.type) >= bpw(kind)]
            same = [option for option in large if option.type == kind]
            types[name] = (same or sorted(large, key=lambda option: option.nbytes))[0].type
        menus = {name: {option.type: option.nbytes for option in menu} for name, menu in problem.options.items()}
        size = problem.fixed_bytes + sum(menus[name][kind] for name, kind in types.items())
        if size <= max_bytes:
            return types
    return None


def facts_of(result: PlanResult) -> dict[str, Any]:
    """What the feedback cost and found."""
    assert result.feedback is not None
    return {
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "chosen": result.feedback.best.name,
        "predicted": result.predicted_kld,
    }


def reach(
    planner: Planner, sensitivity: TypePrices, bench: Bench, presets: Mapping[str, Preset], spec: str
) -> dict[str, Any]:
    """RUNG:FRACTION: what a file of that fraction of a preset's bytes reaches, against the whole preset."""
    rung, _, share = spec.partition(":")
    size = int(presets[rung].bytes * float(share))
    target = Target(f"{share} of {rung}", max_bytes=size)
    result = planner.plan(target, sensitivity, planner.subject.fitting_preset(size))
    write_recipe(planner.work / f"{rung}-{share}.toml", planned_recipe(planner.subject, result, target))
    found = bench.kld(result.types) | facts_of(result)
    ratio = found["kld"] / bench.kld(presets[rung].types)["kld"]
    print(f"{share} of the bytes of {rung}: KLD {found['kld']:.5f}, {ratio:.3f} × the preset's at all its bytes")
    return found | {"rung": rung, "name": f"{share} of its bytes", "budget": size, "ratio": ratio}


def document(
    options: argparse.Namespace, bench: Bench, sensitivity: TypePrices, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The JSON: everything needed to repeat it."""
    return {
        "model": sensitivity.made.model,
        "model_sha256": sensitivity.made.model_sha256,
        "imatrix_sha256": sensitivity.made.imatrix_sha256,
        "measured_on": {"name": bench.text.name, "sha256": bench.text.sha256, "chunks": options.chunks, "n_ctx": 512},
        "planned_on": sensitivity.made.text,
        "prices": {"tokens": sensitivity.tokens, "check": sensitivity.check and sensitivity.check.model_dump()},
        "exponents": sensitivity.exponents,
        "versions": sensitivity.made.versions,
        "rows": rows,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="F16 GGUF")
    parser.add_argument("--imatrix", type=pathlib.Path, required=True)
    parser.add_argument("--calibration", type=pathlib.Path, required=True, help="text to plan on, not the imatrix's")
    parser.add_argument("--text", type=pathlib.Path, required=True, help="text to measure on")
    parser.add_argument("--chunks", type=int, default=40, help="of 512 tokens, to measure on")
    parser.add_argument("--rungs", type=lambda text: tuple(text.split(",")), default=RUNGS)
    parser.add_argument("--only", choices=["plan"], help="preset, exact and feedback only")
    parser.add_argument("--reach", metavar="RUNG:FRACTION", help="also plan for a fraction of a preset's bytes")
    parser.add_argument("--plan-chunks", type=int, default=12, help="of 128 tokens, to measure recipes on")
    parser.add_argument("--probe-tokens", type=int, default=PriceOptions().probe_tokens)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("allocation.work"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=pathlib.Path, help="JSON to write")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except BitladderError as error:
        sys.exit(f"allocation: {error}")

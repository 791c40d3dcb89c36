"""KLD gained per core minute: a ladder is made with one ingredient after the other, and each step is timed.

    python benchmarks/effort.py MODEL --work DIR --json effort.json --calibration A --calibration B --text T
        [--ladder Q4_K_M] [--chunks 30] [--only NAME;…]

Each variant is a `bitladder run` in DIR by one thread, so that CPU seconds are those of the work. A step that two
variants share is made and timed once. Measurements of the planner are not shared; rendered blocks are, so that the
longest time of rendering is that of all. What is in the JSON file is not measured again.
"""

import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import click
from pace import Recorder

from bitladder.files import write_json
from bitladder.ladder import RunOptions, Status, run
from bitladder.rundir import Layout, load_manifest

STOCK = {"mode": "naive", "method": "stock", "smooth": False, "tune_chunks": 0, "bench": False, "moments_chunks": 16}
STOCK |= {"imatrix_chunks": 40}
PLAN = STOCK | {"mode": "quality"}
ROUND = STOCK | {"method": "best"}
ALL = ROUND | {"mode": "quality", "smooth": True}
FEW = {"probe_tokens": 25_000, "chunks": 4, "random_recipes": 4, "rounds": 2, "exchanges": 0}
HALF = {"probe_tokens": 50_000, "chunks": 8, "random_recipes": 6, "rounds": 3, "exchanges": 3}
# In an order in which a step is seldom made twice.
VARIANTS: dict[str, dict[str, Any]] = {
    "preset": STOCK,
    "smoothed": STOCK | {"smooth": True},
    "fast": {"effort": "fast"},
    "planned, few tokens, no feedback": PLAN | {"planning": FEW | {"measure": False}},
    "planned, few tokens": PLAN | {"planning": FEW},
    "planned, half the tokens": PLAN | {"planning": HALF},
    "planned": PLAN,
    "smoothed, planned, few tokens": PLAN | {"smooth": True, "planning": FEW},
    "rounded, feedback": ROUND | {"method": "feedback"},
    "rounded, one pass": ROUND | {"passes": 1},
    "rounded, two passes": ROUND | {"passes": 2},
    "rounded": ROUND,
    "rounded, one side": ROUND | {"two_sided": False},
    "smoothed, rounded": ROUND | {"smooth": True},
    "smoothed, planned few, rounded": ALL | {"planning": FEW},
    "smoothed, planned, rounded": ALL,
    "normal": {"effort": "normal"},
    "the same, priced by six passes": ALL | {"planning": {"price_passes": 6}},
    "the same, tuned on 16 chunks": ALL | {"tune_chunks": 16},
    "the same, tuned on 64 chunks": ALL | {"tune_chunks": 64},
    "rounded, 64 chunks": ROUND | {"moments_chunks": 64},
    "smoothed, planned, rounded, 64 chunks": ALL | {"moments_chunks": 64},
}


class Costs(Recorder):
    """A Recorder that also keeps the largest memory of each step and the bytes of the directory at its end."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}
        self.disk: dict[str, int] = {}
        self._folder = folder

    def watch(self, status: Status) -> None:
        """Notes the step."""
        if status.step != self._step:
            self._close()
            forget_peak()
        super().watch(status)

    def finish(self) -> None:
        """The run is over."""
        self._close()
        super().finish()

    def _close(self) -> None:
        if self._step:
            self.peaks[self._step] = peak_bytes()
            self.disk[self._step] = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())


def peak_bytes() -> int:
    """The largest resident size since `forget_peak` (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Sets the largest resident size to the present one (Linux)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def options_of(base: dict[str, Any], variant: dict[str, Any]) -> RunOptions:
    """The options of a variant."""
    own = {name: value for name, value in variant.items() if name not in ("planning", "effort")}
    options = RunOptions(base["model"], base["out"]).at_effort(variant.get("effort", "high"))
    options = options.replace(
        rungs=base["rungs"],
        calibration=base["calibration"],
        texts=(base["text"],),
        chunks=base["chunks"],
        **({"threads": 1, "bench": False, "imatrix_chunks": 40} | own),
    )
    return options.replace(planning=options.planning.replace(**variant.get("planning", {})))


def measure(base: dict[str, Any], name: str, variant: dict[str, Any], out: pathlib.Path) -> None:
    """Makes a variant, and adds its costs and scores to the JSON file."""
    kept = json.loads(out.read_text()) if out.exists() else {"steps": {}, "variants": {}}
    layout = Layout(base["out"])
    for smoothed in (False, True):  # rendered blocks stay: `rendering` is timed where they are new
        for kept_there in layout.material_work(smoothed=smoothed).glob("*.json*"):
            kept_there.unlink()
    options, recorder = options_of(base, variant), Costs(base["out"])
    began = time.monotonic()
    result = run(options, progress=recorder, watch=recorder.watch)
    recorder.finish()
    steps, keys = load_manifest(base["out"]).steps, {}
    for step, record in steps.items():
        own = [part for part in recorder.parts if part["step"] == step]
        if not own and step not in recorder.peaks:
            continue
        keys[step] = record.key
        if step in result.made:
            kept["steps"][record.key] = {
                "step": step,
                "cpu": sum(part["seconds"] for part in own),
                "parts": {part["bar"]: part["seconds"] for part in own},
                "peak": recorder.peaks.get(step),
                "disk": recorder.disk.get(step),
            }
    scores = {}
    for rung in options.rungs:
        for label in (rung, f"{rung}.naive"):
            if layout.scores(label).exists():
                scores[label] = json.loads(layout.scores(label).read_text())
    guards = {rung: steps[f"quantize {rung}"].facts.get("guard") for rung in options.rungs}
    kept["variants"][name] = {
        "steps": keys,
        "scores": scores,
        "guard": guards,
        "wall": time.monotonic() - began,
        "made": list(result.made),
    }
    write_json(out, kept)


@click.command()
@click.argument("model", required=False)
@click.option("--work", type=click.Path(path_type=pathlib.Path))
@click.option("--json", "out", type=click.Path(path_type=pathlib.Path), multiple=True)
@click.option("--calibration", multiple=True)
@click.option("--text", default="pydoc:test")
@click.option("--ladder", default="Q4_K_M")
@click.option("--chunks", default=30)
@click.option("--only", default="", help="Names of variants, separated by semicolons.")
@click.option("--child", is_flag=True, hidden=True)
def main(
    model: str,
    work: pathlib.Path,
    out: tuple[pathlib.Path, ...],
    calibration: tuple[str, ...],
    text: str,
    ladder: str,
    chunks: int,
    only: str,
    child: bool,
) -> None:
    """Measures the variants that are not in the JSON file."""
    base = {
        "model": model,
        "out": work,
        "rungs": tuple(ladder.split(",")),
        "calibration": calibration,
        "text": text,
        "chunks": chunks,
    }
    for name in only.split(";") if only else VARIANTS:
        if child:
            measure(base, name, VARIANTS[name], out[0])
            return
        done = json.loads(out[0].read_text())["variants"] if out[0].exists() else {}
        if name in done:
            continue
        # A process of its own: what a library keeps from one variant does not count for the next.
        rest = [word for word in sys.argv[1:] if not word.startswith("--only")]
        code = subprocess.run([sys.executable, __file__, *rest, f"--only={name}", "--child"], check=False).returncode
        sys.stderr.write(f"{name}: {'done' if code == 0 else f'failed with {code}'}\n")


if __name__ == "__main__":
    main()

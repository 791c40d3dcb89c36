"""A run directory with everything that a report can show, all of it measured on the embedded model.

A plain run gives four rungs. Two of them are then given other parts: the files are the same, and so are the figures.
"""

import json
import pathlib

from plain_options import plain_options

from bitladder import evaluate
from bitladder.evaluate import SpeedOptions, SpeedTest
from bitladder.ladder import run
from bitladder.plan import band_name, band_of
from bitladder.recipe import read_recipe
from bitladder.rundir import Layout, load_manifest

CHECK = {"pairs": 24, "rank_correlation": 0.9876, "median_ratio": 1.234}
RUNGS = ("IQ3_S", "Q4_K_M", "Q8_0")
HIGH, LOW = band_of("Q4_K_M"), band_of("IQ3_S")


def full_run(model: pathlib.Path, text: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """IQ3_S, Q4_K_M and Q8_0 as rungs, Q4_K_S as the preset beside Q4_K_M, Q5_K_M as somebody else's file."""
    options = plain_options(
        model=str(model), out=folder, rungs=(*RUNGS, "Q4_K_S", "Q5_K_M"), calibration=(str(text),), model_id="org/tiny",
        chunks=4, imatrix_chunks=4, n_ctx=128, tasks="continuation:pydoc:test", task_count=4, threads=1, bench=False,
    )  # fmt: skip
    run(options)
    time_all(model, folder)
    moved(folder, "Q4_K_S", "Q4_K_M.naive", role="naive", rung="Q4_K_M")
    moved(folder, "Q5_K_M", "someone-Q5_K_M", role="third-party", source="someone/tiny-GGUF")
    scores = {rung: json.loads((folder / "scores" / f"{rung}.json").read_text()) for rung in RUNGS}
    for rung, score in scores.items():
        score |= {"role": "rung", "mode": "quality", "predicted_kld": score["kld"]["value"] * 1.1}
        (folder / "scores" / f"{rung}.json").write_text(json.dumps(score))
    tried = [
        {"rung": rung, "name": name, "bytes": score["bytes"] + extra, "predicted_kld": score["kld"]["value"] * factor,
         "kld": {key: score["kld"][key] for key in ("value", "error")}, "types": {"q4_K": 3}, "chosen": not extra}
        for rung, score in scores.items()
        for name, extra, factor in (("exact", 0, 1.1), ("greedy", 5000, 0.9))
    ]  # fmt: skip
    text_used = {"name": "held-out.txt", "sha256": "99" * 32}
    write(folder / "candidates.json", {"schema_version": 1, "text": text_used, "candidates": tried})
    names = read_recipe(folder / "recipes" / "Q8_0.toml").tensors
    # Prices are not what is tested: any positive figures that differ will do.
    prices = {
        name: {"kld": {"q4_K": 1e-3 / (place + 1), "q8_0": 1e-5 / (place + 1)}}
        for place, name in enumerate(names)
        if "norm" not in name
    }
    for band, check in ((HIGH, CHECK), (LOW, None)):
        path = Layout(folder).sensitivity(band_name(band), smoothed=False)
        write(path, {"schema_version": 1, "rungs": band, "tensors": prices, "check": check})
    manifest = load_manifest(folder)
    assert manifest and manifest.run
    changes = {"rungs": RUNGS, "mode": "quality", "compared": ("someone-Q5_K_M",)}
    manifest.run = manifest.run.model_copy(update=changes)
    manifest.save(folder)
    return folder


def time_all(model: pathlib.Path, folder: pathlib.Path) -> None:
    """Put speeds into every scores file, of tests short enough for a test."""
    paths = {json.loads(path.read_text())["model"]: path for path in (folder / "scores").iterdir()}
    models = [model if name == model.name else folder / name for name in paths]
    rows = evaluate.bench(models, (SpeedTest(32, 0), SpeedTest(0, 8)), SpeedOptions(2, threads=1, gpu_layers=0))
    for name, path in paths.items():
        measured = [row.bench_row().model_dump() for row in rows if row.model == name]
        write(path, json.loads(path.read_text()) | {"bench": measured})


def moved(folder: pathlib.Path, old: str, name: str, **changes: str) -> None:
    """Give a rung's scores and recipe another name and part."""
    score = json.loads((folder / "scores" / f"{old}.json").read_text())
    write(folder / "scores" / f"{name}.json", score | changes)
    (folder / "scores" / f"{old}.json").unlink()
    (folder / "recipes" / f"{old}.toml").rename(folder / "recipes" / f"{name}.toml")


def write(path: pathlib.Path, value: object) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value))

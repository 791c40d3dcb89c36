"""What each ingredient of rounding is worth: KLD of a preset's types with the library's blocks and with chosen ones.

    python benchmarks/rounding.py --model F16.gguf --imatrix I.gguf --moments FILE [--plain FILE] --text TEXT
        [--domain TEXT … --domain-chunks 16] [--presets Q4_K_M,…] [--methods feedback,descent,best] [--chunks 40]
        [--json OUT]
        [--stock-model F16.gguf --stock-imatrix I.gguf] [--calibration TEXT … --tune-chunks N]

Every quant has the same types and bytes as the preset. Ratios are of mean KLD; their ± comes from the paired
differences by token. `feedback@plain` takes the moments of --plain, whose tokens all count alike; `best/one-sided`
leaves out the moments of output gradients. With --stock-model the preset, and the full precision, are of that file: so
a smoothed --model is compared with the preset of the model as it is, and `smoothed` is the library's blocks of it.
A method RECIPE.toml is `best` with the recipe's types instead of the preset's (`bitladder plan --like PRESET`).
`best+scales` tunes the scales of `best` on --calibration; where `best` was made before, its blocks are taken again, and
the seconds are those of tuning.
Nothing is guarded: this is what the methods themselves do.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
import time

import numpy as np

from bitladder.engine import Decoding, versions
from bitladder.evaluate import MeasureOptions, Reference, load_or_compute_base, measure
from bitladder.files import write_json
from bitladder.quantize import QuantizeOptions, quantize
from bitladder.recipe import read_recipe
from bitladder.refine import ModelFiles, RefineOptions, TuneOptions, quantize_rounded, tune
from bitladder.rounding import RoundingOptions
from bitladder.text import load_text

HIGH = RoundingOptions().at_effort("high")  # six passes
WAYS = {
    "feedback": HIGH.replace(method="feedback", two_sided=False),
    "descent": HIGH.replace(method="descent", two_sided=False),
    "best/one-sided": HIGH.replace(two_sided=False),
    "best": HIGH,
}


def main() -> None:
    arguments = parse()
    settings = MeasureOptions(chunks=arguments.chunks)
    full, imatrix = arguments.stock_model or arguments.model, arguments.stock_imatrix or arguments.imatrix
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        bases = {}
        for name in (*arguments.text, *arguments.domain):
            text = load_text(name)
            used = (
                dataclasses.replace(settings, chunks=arguments.domain_chunks) if name in arguments.domain else settings
            )
            kept = arguments.work / f"{full.stem}.{text.sha256[:12]}.{used.chunks}.base"
            bases[name] = text, load_or_compute_base(full, text, used, path=kept), used
        for preset in arguments.presets.split(","):
            stock: dict[str, np.ndarray] = {}
            for way in ["stock", *arguments.methods.split(",")]:
                began, cpu = time.monotonic(), time.process_time()
                out = pathlib.Path(folder) / "quant.gguf"
                if way == "stock":
                    quantize(full, out, preset, imatrix=imatrix)
                elif way == "smoothed":
                    quantize(arguments.model, out, preset, imatrix=arguments.imatrix)
                else:
                    make(arguments, preset, way, out)
                cost = time.monotonic() - began, time.process_time() - cpu
                row = {
                    "preset": preset,
                    "way": pathlib.Path(way).name if way.endswith(".toml") else way,
                    "bytes": out.stat().st_size,
                    "seconds": cost[0],
                    "cpu_seconds": cost[1],
                }
                for name, (text, base, used) in bases.items():
                    row[pathlib.Path(name).name] = figures(out, text, used, base, stock, name, way)
                rows.append(row)
                print(line(row, [pathlib.Path(name).name for name in bases]), flush=True)
                if arguments.json:
                    write_json(arguments.json, document(arguments, rows))


def make(arguments: argparse.Namespace, preset: str, way: str, out: pathlib.Path) -> None:
    """The preset's types with blocks of our choice."""
    method, _, source = way.removesuffix("+scales").partition("@")
    options = QuantizeOptions(preset)
    if method.endswith(".toml"):
        options, method = QuantizeOptions(types=read_recipe(pathlib.Path(method)).tensors), "best"
    moments = (arguments.plain,) if source == "plain" else tuple(arguments.moments)
    files, refine = ModelFiles(arguments.model, arguments.imatrix, moments), RefineOptions(rounding=WAYS[method])
    quantize_rounded(files, out, options, refine, None, Decoding(), work=out.parent)
    if way.endswith("+scales"):
        texts, before = [load_text(name) for name in arguments.calibration], out.with_name("before.gguf")
        out.rename(before)
        tune(arguments.model, before, out, texts, None, TuneOptions(tune_chunks=arguments.tune_chunks), Decoding())


def figures(
    out: pathlib.Path,
    text: object,
    settings: MeasureOptions,
    base: Reference,
    stock: dict[str, np.ndarray],
    name: str,
    way: str,
) -> dict[str, float]:
    """KLD ±, and its ratio to the stock blocks' with a paired ± (of the ratio of means, to first order)."""
    measured = measure(out, text, settings, base=base)
    kld = measured.arrays["kld"]
    if way == "stock":
        stock[name] = kld
    reference = stock[name]
    ratio = float(kld.mean() / reference.mean())
    spread = float(np.std(kld - ratio * reference, ddof=1) / np.sqrt(kld.size) / reference.mean())
    return {
        "kld": float(kld.mean()),
        "error": float(np.std(kld, ddof=1) / np.sqrt(kld.size)),
        "ratio": ratio,
        "ratio_error": spread,
        "same_top": measured.scores.same_top_p.value if measured.scores.same_top_p else float("nan"),
    }


def line(row: dict[str, object], texts: list[str]) -> str:
    """A row of the table."""
    parts = [f"| {row['preset']} | {row['way']} | {row['bytes']:,} |"]
    for text in texts:
        one = row[text]
        assert isinstance(one, dict)
        parts.append(f" {one['kld']:.5f} ± {one['error']:.5f} | {one['ratio']:.3f} ± {one['ratio_error']:.3f} |")
    return "".join([*parts, f" {row['cpu_seconds']:.0f} |"])


def document(arguments: argparse.Namespace, rows: list[dict[str, object]]) -> dict[str, object]:
    """What is kept."""
    return {
        "model": arguments.model.name,
        "imatrix": arguments.imatrix.name,
        "stock_model": arguments.stock_model and arguments.stock_model.name,
        "moments": [path.name for path in arguments.moments],
        "chunks": arguments.chunks,
        "domain_chunks": arguments.domain_chunks,
        "options": {name: dataclasses.asdict(options) for name, options in WAYS.items()},
        "versions": versions(),
        "rows": json.loads(json.dumps(rows)),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--imatrix", type=pathlib.Path, required=True)
    parser.add_argument("--moments", type=pathlib.Path, action="append", required=True)
    parser.add_argument("--plain", type=pathlib.Path)
    parser.add_argument("--stock-model", type=pathlib.Path)
    parser.add_argument("--stock-imatrix", type=pathlib.Path)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--domain", action="append", default=[])
    parser.add_argument("--domain-chunks", type=int, default=16)
    parser.add_argument("--presets", default="Q4_K_M")
    parser.add_argument("--methods", default="feedback,descent,best/one-sided,best")
    parser.add_argument("--calibration", action="append", default=[])
    parser.add_argument("--tune-chunks", type=int, default=100)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    for way in arguments.methods.split(","):
        method, _, source = way.removesuffix("+scales").partition("@")
        if (method not in {*WAYS, "smoothed"} and not method.endswith(".toml")) or source not in ("", "plain"):
            parser.error(
                f"--methods {way}: a method is one of {', '.join(WAYS)}, smoothed or a recipe; @plain and "
                "+scales can follow"
            )
    return arguments


if __name__ == "__main__":
    main()

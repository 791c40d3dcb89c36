"""docs/evidence.md from the JSON files of benchmarks/evidence.py."""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evidence_methods import REFERENCE, WHOLE, all_methods

Row = Mapping[str, Any]
INTRO = """# Evidence

What our quants lose, beside what others lose in at most the same bytes: the mean [KLD](glossary.md#measurement) from
the full-precision model, on texts of domains that no calibration saw. `benchmarks/evidence.py` writes this page and
`benchmarks/results/evidence-*.json`, which hold each row with its texts, hashes, seeds, versions, and CPU seconds. The
commands are below each model. Ratios are of mean KLD, each text counted alike; ± is the standard error of the paired
difference of tokens (of chunks, from eight chunks on), so it does not say how another text differs.

`fast`, `normal` and `high` are [efforts](cost.md#effort) of `bitladder run`, all with the importance matrix that
llama-quantize gets. What a row was made by:

"""
OTHERS = """
Files that others publish are measured with the same texts by

    bitladder compare FILE.gguf … --base F16.gguf -f TEXT … --chunks N

or in these tables by `python benchmarks/evidence.py F16.gguf … --file RUNG:NAME=FILE.gguf`. GSQ (ISTA-DASLab) chooses
integers by training on a GPU: its published files can be measured so. auto-round makes such files by

    auto-round --model CHECKPOINT --bits 4 --format gguf:q4_k_m --output_dir DIR
"""


def write(files: Sequence[pathlib.Path], page: pathlib.Path) -> None:
    """Writes the page.

    Parameters:
        files: the JSON files, one a model.
        page: where it is written.
    """
    models = [json.loads(path.read_text()) for path in files]
    models.sort(key=lambda model: model["bytes"])
    rows = {row["method"]: row["how"] for model in models for row in model["rows"]}
    order = [method.name for method in all_methods() if method.name in rows]
    order += sorted(rows.keys() - set(order))
    parts = [INTRO.rstrip("\n") + "\n", "\n".join(f"- **{name}**: {rows[name]}" for name in order), OTHERS]
    parts.append(summary(models))
    parts += [of_model(model, order) for model in models]
    page.write_text("\n".join(part.rstrip("\n") + "\n" for part in parts))


def summary(models: Sequence[Mapping[str, Any]]) -> str:
    """The ratio of ours to llama-quantize's and to the best rival's, models side by side, and the range."""
    lines = [
        "## All models",
        "",
        "KLD of ours as a share of llama-quantize's with the same imatrix, and (after the",
        "",
    ]
    lines[2:] = ["KLD of ours as a share of that of llama-quantize with the same imatrix, and of the best rival's.", ""]
    names = [pathlib.PurePath(model["model"]).stem for model in models]
    lines += [f"| rung, effort | {' | '.join(names)} | range | best rival |", "|---|" + "--:|" * (len(names) + 2)]
    head = len(lines)
    for rung in _rungs(row for model in models for row in model["rows"]):
        for effort in ("fast", "normal", "high"):
            cells, values, best = [], [], []
            for model in models:
                row = _row(model, effort, rung)
                ratio = row and row.get("paired", {}).get("ratio")
                cells.append(_pm(ratio, 3) if ratio else "–")
                if row and ratio:
                    values.append(ratio["value"])
                    rival = best_rival(model, rung)
                    if rival is not None and "mean" in row:
                        best.append(row["mean"]["kld"]["value"] / rival["mean"]["kld"]["value"])
            if values:
                shown = f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
                against = f"{min(best):.2f} to {max(best):.2f}" if len(best) > 1 else "".join(f"{v:.2f}" for v in best)
                lines.append(f"| {rung}, {effort} | {' | '.join(cells)} | {shown} | {against or '–'} |")
    return "\n".join(lines) if len(lines) > head else ""


def of_model(model: Mapping[str, Any], order: Sequence[str]) -> str:
    """The tables of a model."""
    texts = ", ".join(f"{domain}: {text['name']}" for domain, text in model["texts"].items())
    calibration = ", ".join(text["name"] for text in model["calibration"])
    lines = [f"## {pathlib.PurePath(model['model']).stem}", ""]
    lines += [
        f"{model['bytes'] / 1e6:,.0f} MB in full precision. Measured on {model['chunks']} chunks of {model['n_ctx']} "
        f"tokens of each of {texts}. Calibrated on {calibration}; imatrix: {model['imatrix_chunks']} chunks of each. "
        f"llama.cpp {model['versions'].get('llama_cpp_commit', '')}.",
        "",
        "```",
        *model["commands"],
        "```",
        "",
        "Core seconds: of the rung alone + of what all its rungs share.",
        "",
    ]
    domains = list(model["texts"])
    lines += [
        "| rung | method | MB | KLD | of llama-quantize's | " + " | ".join(f"on {name}" for name in domains)
        + " | 99.9 % | median | same top token | PPL, of full | core s |",
        "|---|---|--:|--:|--:|" + "--:|" * (len(domains) + 5),
    ]  # fmt: skip
    for rung in _rungs(model["rows"]):
        rows = [row for row in model["rows"] if row["rung"] == rung and row["group"] in ("rivals", "ours")]
        for row in sorted(rows, key=lambda row: order.index(row["method"])):
            lines.append(_line(row, domains))
        if (preset := best_preset(model, rung)) is not None and preset["rung"] != rung:
            lines.append(
                f"| {rung} | best preset that fits: {preset['rung']} |" + _line(preset, domains).split("|", 3)[3]
            )
    groups = {group: [row for row in model["rows"] if row["group"] == group] for group in ("parts", "chunks")}
    if groups["parts"]:
        lines += [
            "",
            "### Each part",
            "",
            f"Parts left out of `{WHOLE}`, or added alone; paired on the same tokens.",
            "",
        ]
        lines += [f"| rung | | KLD, of llama-quantize's | of `{WHOLE}`'s | core s |", "|---|---|--:|--:|--:|"]
        for rung in _rungs(groups["parts"]):
            whole = [row for row in model["rows"] if row["rung"] == rung and row["method"] == WHOLE]
            own = [row for row in groups["parts"] if row["rung"] == rung]
            for row in [*whole, *sorted(own, key=lambda row: order.index(row["method"]))]:
                with_whole = row.get("paired_with_whole", {}).get("ratio")
                cells = [_pm(row.get("paired", {}).get("ratio"), 3), _pm(with_whole, 3), _cost(row)]
                lines.append(f"| {rung} | {row['method']} | {' | '.join(cells)} |")
    if groups["chunks"]:
        lines += ["", "### Chunks of second moments", "", "| rung | | KLD, of llama-quantize's |", "|---|---|--:|"]
        for row in sorted(groups["chunks"], key=lambda row: (row["rung"], order.index(row["method"]))):
            lines.append(f"| {row['rung']} | {row['method']} | {_pm(row.get('paired', {}).get('ratio'), 3)} |")
    lines += of_fit(model)
    asked = [row for row in model["rows"] if row.get("tasks")]
    if asked:
        names = sorted({name for row in asked for name in row["tasks"]})
        lines += [
            "",
            "### Benchmarks",
            "",
            f"| rung | method | {' | '.join(names)} |",
            "|---|---|" + "--:|" * len(names),
        ]
        for row in asked:
            cells = [_pm({k: 100 * v for k, v in row["tasks"][name].items()}, 1) for name in names]
            lines.append(f"| {row['rung']} | {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def of_fit(model: Mapping[str, Any]) -> list[str]:
    """The objective of rounding on its own moments and on those of texts that it did not see, by kind and width."""
    rows = [row for row in model["rows"] if row["group"] == "fit"]
    if not rows:
        return []
    kinds = sorted({kind for row in rows for kind in row["facts"]["objective"]["own"]})
    lines = ["", "### Fitted to the text, or to the model?", ""]
    lines += [
        "The preset's types, rounded with other damping and shrinkage, unguarded: KLD of llama-quantize's; then the"
    ]
    lines += ["output error of llama-quantize's, on the moments rounded for / on those of the texts above.", ""]
    lines += [f"| rung | | KLD | {' | '.join(kinds)} |", "|---|---|--:|" + "--:|" * len(kinds)]
    for row in sorted(rows, key=lambda row: (row["rung"], row["method"])):
        own, held_out = row["facts"]["objective"]["own"], row["facts"]["objective"]["held_out"]
        cells = [f"{own[kind]:.2f} / {held_out[kind]:.2f}" if kind in own else "–" for kind in kinds]
        lines.append(
            f"| {row['rung']} | {row['method']} | {_pm(row.get('paired', {}).get('ratio'), 3)} | {' | '.join(cells)} |"
        )
    return lines


def best_preset(model: Mapping[str, Any], rung: str) -> Row | None:
    """The preset of least KLD among those measured with the imatrix that are no larger than a rung's."""
    own = _row(model, REFERENCE, rung)
    if own is None or "mean" not in own:
        return None
    fitting = [
        row for row in model["rows"] if row["method"] == REFERENCE and row.get("bytes", math.inf) <= own["bytes"]
    ]
    return min(fitting, key=lambda row: row["mean"]["kld"]["value"])


def best_rival(model: Mapping[str, Any], rung: str) -> Row | None:
    """The row of least KLD that is not ours, in at most the bytes of llama-quantize's."""
    own = _row(model, REFERENCE, rung)
    if own is None or "mean" not in own:
        return None
    rivals = [row for row in model["rows"] if row["rung"] == rung and row["group"] == "rivals" and "mean" in row]
    rivals = [row for row in rivals if row["bytes"] <= own["bytes"]] + [best_preset(model, rung) or own]
    return min(rivals, key=lambda row: row["mean"]["kld"]["value"])


def _line(row: Row, domains: Sequence[str]) -> str:
    head = f"| {row['rung']} | {row['method']} |"
    if "mean" not in row:
        return f"{head} {row['facts'].get('refused', 'no file')} |" + " |" * (len(domains) + 7)
    mean, pair = row["mean"], row.get("paired", {})
    cells = [f"{row['bytes'] / 1e6:,.1f}", _pm(mean["kld"], 4), _pm(pair.get("ratio"), 3)]
    cells += [_pm(pair.get("texts", {}).get(name), 3) for name in domains]
    cells += [f"{mean['kld']['p999']:.2f}", f"{mean['kld']['median']:.4f}"]
    cells += [_pm({k: 100 * v for k, v in mean["same_top_p"].items()}, 1) + " %", _pm(mean["ppl_ratio"], 3), _cost(row)]
    return f"{head} {' | '.join(cells)} |"


def _cost(row: Row) -> str:
    shared = sum(seconds for name, seconds in row["cpu"].items() if name.startswith("shared"))
    own = sum(row["cpu"].values()) - shared
    return f"{own:,.0f} + {shared:,.0f}" if shared else f"{own:,.0f}"


def _pm(figure: Mapping[str, float] | None, digits: int) -> str:
    return "–" if figure is None else f"{figure['value']:.{digits}f} ± {figure['error']:.{digits}f}"


def _row(model: Mapping[str, Any], method: str, rung: str) -> Row | None:
    return next((row for row in model["rows"] if row["method"] == method and row["rung"] == rung), None)


def _rungs(rows: Iterable[Row]) -> list[str]:
    """The rungs of rows, from the smallest to the largest."""
    sizes: dict[str, list[float]] = {}
    for row in rows:
        sizes.setdefault(row["rung"], []).append(row.get("bytes", math.inf))
    return sorted(sizes, key=lambda rung: (min(sizes[rung]), rung))

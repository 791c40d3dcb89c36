"""Speed rows as llama-bench prints them: with its columns, its Markdown, and its fields in CSV and JSON."""

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bitladder.engine import FLASH_ATTN, versions
from bitladder.evaluate import SpeedOptions, SpeedRow

LEFT = {"model", "file", "backend"}  # columns that are aligned to the left
# Columns that give way in narrow terminals; options of which all rows have the same value are none of them.
RANKS = {"params": 1, "size": 2, "backend": 3, "threads": 4}
FORMATS = ("md", "json", "jsonl", "csv")


def render(rows: Sequence[SpeedRow], form: str) -> str:
    """The rows in one of FORMATS. The text ends with a newline."""
    if form == "md":
        return _markdown(rows)
    if form == "csv":
        return _csv(rows)
    if form == "jsonl":
        return "".join(json.dumps(fields(row), ensure_ascii=False) + "\n" for row in rows)
    return json.dumps([fields(row) for row in rows], indent=2, ensure_ascii=False) + "\n"


def fields(row: SpeedRow) -> dict[str, Any]:
    """A row with llama-bench's field names. `repetitions` is added; file names have no folders."""
    options, test = row.options, row.test
    return {
        "build_commit": versions()["llama_cpp_commit"],
        "cpu_info": row.cpu,
        "gpu_info": row.gpu,
        "backends": row.backend,
        "model_filename": row.model,
        "model_type": row.model_type,
        "model_size": row.size,
        "model_n_params": row.n_params,
        "n_batch": options.n_batch,
        "n_ubatch": options.n_ubatch,
        "n_threads": row.threads,
        "type_k": "f16",
        "type_v": "f16",
        "n_gpu_layers": options.gpu_layers,
        "flash_attn": FLASH_ATTN[options.flash_attn],
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "test_time": row.test_time,
        "repetitions": len(row.samples_ns),
        "avg_ns": round(statistics.fmean(row.samples_ns)),
        "stddev_ns": round(statistics.stdev(row.samples_ns)) if len(row.samples_ns) > 1 else 0,
        "avg_ts": row.mean,
        "stddev_ts": row.stddev,
        "samples_ns": list(row.samples_ns),
        "samples_ts": row.samples_ts,
    }


def columns(rows: Sequence[SpeedRow]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table, with llama-bench's headings.

    As in llama-bench, an option has a column if it differs from the default. Files have a column if two of them have
    the same description.
    """
    plain = SpeedOptions()
    files: dict[str, set[str]] = {}
    for row in rows:
        files.setdefault(row.model_type, set()).add(row.model)
    heads: dict[str, Callable[[SpeedRow], str]] = {
        "model": lambda row: row.model_type,
        "file": lambda row: row.model,
        "size": lambda row: _size(row.size),
        "params": lambda row: _count(row.n_params),
        "backend": lambda row: row.backend,
        "ngl": lambda row: str(row.options.gpu_layers),
        "threads": lambda row: str(row.threads),
        "n_batch": lambda row: str(row.options.n_batch),
        "n_ubatch": lambda row: str(row.options.n_ubatch),
        "fa": lambda row: row.options.flash_attn,
        "test": lambda row: row.test.name,
        "t/s": lambda row: f"{row.mean:.2f} ± {row.stddev:.2f}",
    }
    hidden = {
        "file": all(len(names) == 1 for names in files.values()),
        "ngl": all("CPU" in row.backend or "BLAS" in row.backend for row in rows),
        "n_batch": all(row.options.n_batch == plain.n_batch for row in rows),
        "n_ubatch": all(row.options.n_ubatch == plain.n_ubatch for row in rows),
        "fa": all(row.options.flash_attn == plain.flash_attn for row in rows),
    }
    shown = [head for head in heads if not hidden.get(head)]
    return shown, [[heads[head](row) for head in shown] for row in rows]


def speed_table(rows: Sequence[SpeedRow]) -> Any:
    """The table for the terminal."""
    from bitladder.show.table import Column, Table

    heads, cells = columns(rows)
    table = Table([Column(head, head not in LEFT, RANKS.get(head, 0), head in LEFT) for head in heads])
    for line in cells:
        table.add(*line)
    return table


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _count(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.2f} B"


def _markdown(rows: Sequence[SpeedRow]) -> str:
    heads, cells = columns(rows)
    left = [head in LEFT for head in heads]
    widths = [max(len(line[index]) for line in [heads, *cells]) for index in range(len(heads))]
    lines = [
        " | ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(line, widths, left, strict=True)
        )
        for line in [heads, *cells]
    ]
    rule = " | ".join(
        "-" * width if to_left else "-" * (width - 1) + ":" for width, to_left in zip(widths, left, strict=True)
    )
    lines.insert(1, rule)
    return "".join(f"| {line} |\n" for line in lines) + f"\nbuild: {versions()['llama_cpp_commit']}\n"


def _csv(rows: Sequence[SpeedRow]) -> str:
    out = io.StringIO()
    names = [name for name in fields(rows[0]) if not name.startswith("samples_")] if rows else []
    writer = csv.DictWriter(out, names, extrasaction="ignore", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writeheader()
    writer.writerows(fields(row) for row in rows)
    return out.getvalue()

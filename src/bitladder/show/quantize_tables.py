"""What `bitladder quantize` will write, what it wrote, and what rounding did, as tables, lines and JSON."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bitladder.gguf import block_of, in_main_block, kind_of, name_in_block, ranges
from bitladder.quantize import Fallback, Preflight, QuantizeResult
from bitladder.show.table import Column, Table
from bitladder.units import number_of

if TYPE_CHECKING:  # numba, which rounding needs, takes a while to import
    from bitladder.evaluate import Figure
    from bitladder.refine import GuardTrial, RoundedQuant

SHOWN = 6  # names in a cell; of the others only their number is shown


def as_json(figures: Preflight) -> dict[str, Any]:
    """The preflight as a JSON value."""
    return {**dataclasses.asdict(figures), "bytes": figures.bytes}


def tables(figures: Preflight) -> list[Table]:
    """Kinds × types; and, if there are any, patterns and tensors that get another type."""
    parts = [_kinds(figures)]
    if figures.patterns:
        uses = [
            (row.pattern, row.type, str(len(row.matched)), str(len(row.decided)), _names(row.decided))
            for row in figures.patterns
        ]
        parts.append(_table(("--tensor-type", "type", "found in", "decides", "tensors"), uses, right=(2, 3)))
    if figures.fallbacks:
        heads = ("type does not fit", "blocks", "width", "requested", "used", "extra bytes")
        parts.append(_table(heads, _fallbacks(figures), right=(2, 5)))
    return parts


def lines(figures: Preflight) -> list[str]:
    """Coverage of the imatrix, size, room."""
    text = []
    if figures.weighted or figures.unweighted:
        text.append(
            f"imatrix: {number_of(figures.weighted, 'tensor')} weighted, {len(figures.unweighted)} quantized unweighted"
        )
        if figures.unweighted:
            text[-1] += f" ({_names(figures.unweighted)})"
    shards = f" in {number_of(len(figures.files), 'shard')}" if len(figures.files) > 1 else ""
    text.append(
        f"{number_of(figures.bytes, 'byte')}{shards}, {figures.bpw:.4f} bpw ({figures.bpw_blocks:.4f} in the blocks); "
        f"disk needed {figures.bytes / 1e6:,.1f} MB, memory about {figures.memory / 1e6:,.0f} MB besides the program"
    )
    return text


def _kinds(figures: Preflight) -> Table:
    rows = [
        (row.kind, row.type, str(row.count), f"{row.bytes:,}", f"{row.bpw:.3f}")
        for row in sorted(figures.kinds, key=lambda row: (row.kind, -row.bytes))
    ]
    return _table(("kind", "type", "tensors", "bytes", "bpw"), rows, right=(2, 3, 4))


def _fallbacks(figures: Preflight) -> list[tuple[str, ...]]:
    """Tensors that get another type, by kind and blocks."""
    groups: dict[tuple[str, int, str, str], list[Fallback]] = {}
    for fallback in figures.fallbacks:
        groups.setdefault(
            (name_in_block(fallback.tensor), fallback.width, fallback.requested, fallback.used), []
        ).append(fallback)
    rows: list[tuple[str, ...]] = []
    for (kind, width, requested, used), members in groups.items():
        blocks = ranges([block for fallback in members if (block := block_of(fallback.tensor)) is not None])
        rows.append(
            (kind, blocks, str(width), requested, used, f"{sum(fallback.extra_bytes for fallback in members):+,}")
        )
    return rows


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, right: tuple[int, ...]) -> Table:
    table = Table([Column(head, index in right, fold=index not in right) for index, head in enumerate(heads)])
    for row in rows:
        table.add(*row)
    return table


def _names(names: tuple[str, ...]) -> str:
    more = f", … ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def result_line(result: QuantizeResult) -> str:
    """A quant that was written: path, size, types."""
    counts = collections.Counter(result.types.values()).most_common()
    types = ", ".join(f"{count} × {kind}" for kind, count in counts)
    bpw = f"{result.bpw:.4f} bpw, {result.bpw_blocks:.4f} in the blocks"
    return f"{result.path}: {number_of(result.bytes, 'byte')}, {bpw} ({types})"


def rounding_lines(quant: "RoundedQuant") -> list[str]:
    """Output errors by kind, and what the guard measured."""
    shown = []
    by_kind: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, (before, after) in quant.losses.items():
        by_kind[kind_of(name)][0] += before
        by_kind[kind_of(name)][1] += after
    ratios = [f"{kind} {after / before:.3f}" for kind, (before, after) in by_kind.items() if before > 0]
    if ratios:
        shown.append(f"output error relative to stock blocks, on the calibration moments: {', '.join(ratios)}")
    if quant.guard is None:
        shown.append("not checked on held-out text (--guard none)")
        return shown
    guard = quant.guard
    shown.append(
        f"held-out text ({number_of(guard.tokens, 'token')}): KLD {_with_error(guard.before)} with stock blocks, "
        f"{_with_error(guard.after)} with rounded blocks (difference {_with_error(guard.difference)}, paired)"
    )
    kept = f"{guard.tried - len(guard.stock)} of {number_of(guard.tried, 'tensor')} have rounded blocks"
    refused = [trial for trial in (*guard.trials, *guard.removals) if not trial.kept]
    shown.append(kept + "".join(f"; refused for {_tensors(trial)}: {_trial(trial)}" for trial in refused))
    layers = [trial for trial in guard.removals if in_main_block(trial.kind)]
    if layers:
        least = max(layers, key=lambda trial: trial.change.value)
        shown.append(f"the layer with the smallest gain: {least.kind}, {_trial(least)}")
    return shown


def rounding_json(quant: "RoundedQuant") -> dict[str, Any]:
    """What `rounding_lines` shows, as JSON values."""
    from bitladder.refine import guard_json

    return {"guard": None if quant.guard is None else guard_json(quant.guard), "output_errors": quant.losses}


def _trial(trial: "GuardTrial") -> str:
    return f"KLD {trial.change.value:+z.5f} ± {trial.change.error:.5f}"


def _tensors(trial: "GuardTrial") -> str:
    return trial.tensors[0] if len(trial.tensors) == 1 else f"{len(trial.tensors)} {trial.kind}"


def _with_error(figure: "Figure") -> str:
    return f"{figure.value:.5f} ± {figure.error:.5f}"

"""A plan as tables, lines and JSON."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from bitladder.gguf.names import ranges
from bitladder.plan import PlanResult, Target
from bitladder.plan.explain import Moved, Share, moves, shares
from bitladder.plan.feedback import Tried
from bitladder.trial import BlockLoss
from bitladder.units import size_text

Places = Mapping[str, tuple[str, int | None]]


def tables(result: PlanResult, places: Places) -> Iterator[Table]:
    """Kinds, layers, what moved against the preset, and the recipes that were tried."""
    yield _shares("kind", shares(result, places, "kind"))
    yield _shares("layer", shares(result, places, "layer"))
    moved = moves(result, places)
    if moved:
        yield _moves(moved)
    if result.found is not None:
        yield _tried(result.found.tried, result.found.best)


def _shares(label: str, rows: list[Share]) -> Table:
    table = _table(label, "tensors", "MB", "KLD, nats", "share", "types")
    for row in rows:
        types = ", ".join(f"{count} × {kind}" if row.tensors > 1 else kind for kind, count in row.types.items())
        cells = f"{row.bytes / 1e6:.2f}", f"{row.kld:.5f}", f"{100 * row.share:.1f} %"
        table.add_row(row.name, str(row.tensors), *cells, types)
    return table


def _moves(rows: list[Moved]) -> Table:
    table = _table("against the preset", "", "tensors", "KB", "KLD, nats", "nats/MB", "layers")
    arrows = {"up": "▲", "down": "▼", "level": "="}
    for row in rows:
        kld = "" if row.kld is None else f"{row.kld:+.5f}"
        rate = "" if row.rate is None else f"{row.rate:.4f}"
        what = f"{row.kind}: {row.before} → {row.after}"
        size = f"{row.bytes / 1e3:+.0f}"
        table.add_row(what, arrows[row.direction], str(row.count), size, kld, rate, ranges(row.layers))
    return table


def _tried(rows: tuple[Tried, ...], best: Tried) -> Table:
    table = _table("recipe", "bytes", "predicted KLD", "measured KLD", "")
    for row in rows:
        predicted = "" if row.predicted is None else f"{row.predicted:.5f}"
        measured = f"{row.measured.kld:.5f} ± {row.measured.error:.5f}"
        table.add_row(row.name, f"{row.bytes:,}", predicted, measured, "best" if row is best else "")
    return table


def lines(result: PlanResult, target: Target) -> Iterator[str]:
    """The summary."""
    sensitivity, check = result.sensitivity, result.sensitivity.check
    yield f"target {target.text}: {size_text(result.bytes)}"
    cost = result.allocation
    yield (
        f"predicted KLD {_predicted(result):.5f} nats; price {cost.price * 1e6:.6f} nats per MB; "
        + ("proved optimal by these prices" if cost.gap <= 1e-6 else f"within {100 * cost.gap:.4f} % of the optimum")
    )
    if result.found is not None:
        measured = result.found.best.measured
        yield f"measured KLD {measured.kld:.5f} ± {measured.error:.5f} on {result.text} ({result.found.best.name})"
        preset = next((one for one in result.found.tried if one.name.startswith("preset ")), None)
        if preset is not None:
            yield (
                f"{preset.name} by itself: {preset.bytes:,} bytes, KLD {preset.measured.kld:.5f} ± "
                f"{preset.measured.error:.5f}; the plan has {measured.kld / preset.measured.kld:.3f} × that"
            )
    if check is not None:
        yield (
            f"prices ({sensitivity.method}, {sensitivity.tokens:,} tokens): rank correlation with {check.pairs} single "
            f"swaps that were held out {check.rank_correlation:.3f}, median measured/predicted {check.median_ratio:.2f}"
        )
    if sensitivity.exponents:
        parts = ", ".join(f"{kind} {p:.2f}" for kind, p in sensitivity.exponents.items())
        yield f"KLD grows with the rendered error to the power of: {parts}"


def _predicted(result: PlanResult) -> float:
    offset = result.found.correction.offset if result.found is not None else 0.0
    return result.allocation.cost + offset


def as_json(result: PlanResult, places: Places, target: Target) -> dict[str, Any]:
    """All of it for machines; sizes in bytes, KLD in nats per token."""
    best = result.found.best.measured if result.found else None
    return {
        "target": target.text,
        "bytes": result.bytes,
        "predicted_kld": _predicted(result),
        "kld": {"value": best.kld, "error": best.error} if best else None,
        "price": result.allocation.price,
        "gap": result.allocation.gap,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "kinds": [vars(row) for row in shares(result, places, "kind")],
        "layers": [vars(row) for row in shares(result, places, "layer")],
        "moves": [vars(row) | {"direction": row.direction, "rate": row.rate} for row in moves(result, places)],
        "tried": [
            {
                "name": one.name,
                "bytes": one.bytes,
                "predicted_kld": one.predicted,
                "kld": {"value": one.measured.kld, "error": one.measured.error},
            }
            for one in (result.found.tried if result.found else ())
        ],
        "check": result.sensitivity.check.model_dump() if result.sensitivity.check else None,
        "types": result.types,
    }


def prune_table(ranked: list[BlockLoss]) -> Table:
    """Blocks by what leaving them out costs."""
    made = Table("block", "KLD, nats", "size in MB")
    for column in made.columns:
        column.justify = "right"
    for one in ranked:
        made.add_row(str(one.block), f"{one.kld.value:.5f} ± {one.kld.error:.5f}", f"{one.bytes / 1e6:.2f}")
    return made


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index in (0, len(heads) - 1) else "right")
    return table

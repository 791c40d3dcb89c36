"""A plan as tables, lines and JSON."""

import pathlib
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from bitladder.gguf import ranges
from bitladder.plan import MovedTensors, PlanResult, Share, Target, TriedRecipe, moved_tensors, shares
from bitladder.show.table import Column, Table, figures
from bitladder.trial import BlockLoss, MeasuredRecipe
from bitladder.units import number_of, size_text

Places = Mapping[str, tuple[str, int | None]]


def tables(result: PlanResult, places: Places) -> Iterator[Table]:
    """Kinds, layers, tensors with another type than in the preset, and the recipes that were tried."""
    yield _shares("kind", shares(result, places, "kind"))
    yield _shares("layer", shares(result, places, "layer"))
    moved = moved_tensors(result, places)
    if moved:
        yield _moved(moved)
    if result.feedback is not None:
        yield _tried(result.feedback.tried, result.feedback.best)


def _shares(label: str, rows: list[Share]) -> Table:
    table = Table(
        [
            Column(label),
            *figures("tensors", rank=1),
            *figures("MB", "KLD, nats"),
            *figures("share", rank=2),
            Column("types", fold=True),
        ]
    )
    for row in rows:
        types = ", ".join(f"{count} × {kind}" if row.tensors > 1 else kind for kind, count in row.types.items())
        cells = f"{row.bytes / 1e6:.2f}", f"{row.kld:z.5f}", f"{100 * row.share:z.1f} %"
        table.add(row.name, str(row.tensors), *cells, types)
    return table


def _moved(rows: list[MovedTensors]) -> Table:
    table = Table(
        [
            Column("change from the preset", fold=True),
            Column(""),
            *figures("tensors", rank=1),
            *figures("KB", "KLD, nats"),
            *figures("nats/MB", rank=2),
            Column("layers", fold=True),
        ]
    )
    arrows = {"up": "▲", "down": "▼", "level": "="}
    for row in rows:
        kld = "" if row.kld is None else f"{row.kld:+z.5f}"
        rate = "" if row.rate is None else f"{row.rate:z.4f}"
        what = f"{row.kind}: {row.before} → {row.after}"
        size = f"{row.bytes / 1e3:+z.0f}"
        table.add(what, arrows[row.direction], str(row.count), size, kld, rate, ranges(row.layers))
    return table


def _tried(rows: tuple[TriedRecipe, ...], best: TriedRecipe) -> Table:
    table = Table(
        [
            Column("recipe", fold=True),
            *figures("bytes"),
            *figures("predicted KLD", rank=2),
            *figures("measured KLD"),
            *figures("judged KLD", rank=1),
            Column(""),
        ]
    )
    for row in rows:
        predicted = "" if row.predicted is None else f"{row.predicted:z.5f}"
        judged = "" if row.judged is None else _figure(row.judged)
        chosen = "best" if row is best else ""
        table.add(row.name, f"{row.bytes:,}", predicted, _figure(row.measured), judged, chosen)
    return table


def _figure(measured: MeasuredRecipe) -> str:
    return f"{measured.kld:.5f} ± {measured.error:.5f}"


def lines(result: PlanResult, target: Target) -> Iterator[str]:
    """The summary."""
    prices, check = result.prices, result.prices.check
    yield f"target {target.text}: {size_text(result.bytes)}"
    cost = result.allocation
    yield (
        f"predicted KLD {result.predicted_kld:z.5f} nats; price {cost.price * 1e6:.6f} nats per MB; "
        + ("proved optimal for these prices" if cost.gap <= 1e-6 else f"within {100 * cost.gap:.4f} % of the optimum")
    )
    if result.feedback is not None:
        best = result.feedback.best
        yield f"measured KLD {_figure(best.figure)} on {result.text} ({best.name})"
        preset = next((recipe for recipe in result.feedback.tried if recipe.name.startswith("preset ")), None)
        if preset is not None:
            yield (
                f"{preset.name}: {number_of(preset.bytes, 'byte')}, KLD {_figure(preset.figure)}; the KLD of the plan "
                f"is {best.figure.kld / preset.figure.kld:.3f} × that"
            )
    if check is not None:
        yield (
            f"prices ({prices.method}, {number_of(prices.tokens, 'token')}): rank correlation with {check.pairs} "
            f"held-out swaps {check.rank_correlation:.3f}, median measured/predicted {check.median_ratio:.2f}"
        )
    if prices.exponents:
        parts = ", ".join(f"{kind} {p:.2f}" for kind, p in prices.exponents.items())
        yield f"KLD grows with the rendered error to the power of: {parts}"


def as_json(result: PlanResult, places: Places, target: Target) -> dict[str, Any]:
    """All of it as JSON: sizes in bytes, KLD in nats per token."""
    best = result.feedback.best.figure if result.feedback else None
    return {
        "target": target.text,
        "bytes": result.bytes,
        "predicted_kld": result.predicted_kld,
        "kld": {"value": best.kld, "error": best.error} if best else None,
        "price": result.allocation.price,
        "gap": result.allocation.gap,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "kinds": [vars(row) for row in shares(result, places, "kind")],
        "layers": [vars(row) for row in shares(result, places, "layer")],
        "moves": [vars(row) | {"direction": row.direction, "rate": row.rate} for row in moved_tensors(result, places)],
        "tried": [
            {
                "name": recipe.name,
                "bytes": recipe.bytes,
                "predicted_kld": recipe.predicted,
                "kld": {"value": recipe.measured.kld, "error": recipe.measured.error},
                "judged_kld": None
                if recipe.judged is None
                else {"value": recipe.judged.kld, "error": recipe.judged.error},
            }
            for recipe in (result.feedback.tried if result.feedback else ())
        ],
        "check": result.prices.check.model_dump() if result.prices.check else None,
        "types": result.types,
    }


def next_step(recipe: pathlib.Path, model: pathlib.Path, imatrix: pathlib.Path | None) -> str:
    """What comes after a plan: the command that makes the quant."""
    words = ["bitladder", "quantize", "-m", str(model), *(["--imatrix", str(imatrix)] if imatrix else [])]
    words += ["--recipe", str(recipe), "-o", str(model.with_name(f"{recipe.stem}.gguf"))]
    return f"wrote {recipe}; next: {shlex.join(words)}"


def prune_json(ranked: list[BlockLoss]) -> list[dict[str, Any]]:
    """Blocks as JSON: KLD in nats per token, sizes in bytes."""
    return [{"block": loss.block, "kld": loss.kld.model_dump(), "bytes": loss.bytes} for loss in ranked]


def prune_line(ranked: list[BlockLoss]) -> str:
    """The command that leaves out the block of least loss."""
    return (
        f"smallest loss: bitladder quantize … --prune-layers {ranked[0].block} (two blocks cost more than the sum of "
        "their losses: prune one, then measure again)"
    )


def prune_table(ranked: list[BlockLoss]) -> Table:
    """Blocks by the KLD of the model without them."""
    table = Table(figures("block", "KLD, nats", "size in MB"))
    for loss in ranked:
        table.add(str(loss.block), f"{loss.kld.value:z.5f} ± {loss.kld.error:.5f}", f"{loss.bytes / 1e6:.2f}")
    return table

"""What rounding did, in words and as JSON."""

import collections
from typing import Any

from bitladder.evaluate.scores import Figure
from bitladder.recipe.names import short_kind
from bitladder.refine.guard import GuardReport
from bitladder.refine.quantize import Refined


def refine_lines(made: Refined) -> list[str]:
    """Output errors by kind, and what the guard saw."""
    lines = []
    by_kind: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, (before, after) in made.losses.items():
        by_kind[short_kind(name)][0] += before
        by_kind[short_kind(name)][1] += after
    ratios = [f"{kind} {after / before:.3f}" for kind, (before, after) in by_kind.items() if before > 0]
    if ratios:
        lines.append(
            f"output error against the library's blocks, on the calibration's own moments: {', '.join(ratios)}"
        )
    if made.guard is None:
        lines.append("not tried on held-out text (--guard none)")
        return lines
    guard = made.guard
    lines.append(
        f"held-out text ({guard.tokens} tokens): KLD {_text(guard.before)} with the library's blocks, "
        f"{_text(guard.after)} with these (difference {_text(guard.difference)}, paired)"
    )
    stock = [trial for trial in guard.trials if not trial.kept]
    if stock:
        raised = "; ".join(f"{trial.kind} × {len(trial.tensors)}: {trial.change.value:+.5f}" for trial in stock)
        lines.append(f"{len(guard.stock)} tensors keep the library's blocks. What raised KLD: {raised}")
    return lines


def guard_json(guard: GuardReport) -> dict[str, Any]:
    """A guard's report as JSON values."""
    return {
        "before": guard.before.model_dump(),
        "after": guard.after.model_dump(),
        "difference": guard.difference.model_dump(),
        "tokens": guard.tokens,
        "stock": list(guard.stock),
        "trials": [
            {
                "kind": trial.kind,
                "tensors": list(trial.tensors),
                "change": trial.change.model_dump(),
                "kept": trial.kept,
            }
            for trial in guard.trials
        ],
    }


def _text(figure: Figure) -> str:
    return f"{figure.value:.5f} ± {figure.error:.5f}"

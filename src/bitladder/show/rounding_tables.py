"""What rounding did, in words and as JSON."""

import collections
from typing import Any

from bitladder.evaluate import Figure
from bitladder.gguf import in_main_block, kind_of
from bitladder.refine import GuardTrial, RoundedQuant, guard_json


def lines(quant: RoundedQuant) -> list[str]:
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
        f"held-out text ({guard.tokens} tokens): KLD {_text(guard.before)} with stock blocks, "
        f"{_text(guard.after)} with rounded blocks (difference {_text(guard.difference)}, paired)"
    )
    kept = f"{guard.tried - len(guard.stock)} of {guard.tried} tensors have rounded blocks"
    refused = [trial for trial in (*guard.trials, *guard.removals) if not trial.kept]
    shown.append(kept + "".join(f"; refused for {_names(trial)}: {_trial(trial)}" for trial in refused))
    layers = [trial for trial in guard.removals if in_main_block(trial.kind)]
    if layers:
        least = max(layers, key=lambda trial: trial.change.value)
        shown.append(f"the layer with the smallest gain: {least.kind}, {_trial(least)}")
    return shown


def as_json(quant: RoundedQuant) -> dict[str, Any]:
    """What `lines` shows, as JSON values."""
    return {"guard": None if quant.guard is None else guard_json(quant.guard), "output_errors": quant.losses}


def _trial(trial: GuardTrial) -> str:
    return f"KLD {trial.change.value:+.5f} ± {trial.change.error:.5f}"


def _names(trial: GuardTrial) -> str:
    return trial.tensors[0] if len(trial.tensors) == 1 else f"{len(trial.tensors)} {trial.kind}"


def _text(figure: Figure) -> str:
    return f"{figure.value:.5f} ± {figure.error:.5f}"

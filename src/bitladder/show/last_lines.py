"""What is said at the end of a run and below its ladder: what comes next, and what may be deleted."""

import shlex

from bitladder.report import USUAL_MEMORIES, FinishedRun, best_fitting
from bitladder.rundir import is_running
from bitladder.show.ladder_tables import short_size
from bitladder.units import duration, number_of


def next_steps(run: FinishedRun) -> list[str]:
    """What comes after a run: its pages, the rung for usual memories, and the commands that show and publish it."""
    layout = run.layout
    folder = shlex.quote(str(layout.folder))
    lines = [f"card: {layout.card}", f"report: {layout.report}"]
    if run.usual_context is not None:
        lines += _for_memories(run, run.usual_context)
    lines += [f"show: bitladder show {folder}", f"publish: bitladder push {folder} {run.record.repo or 'OWNER/NAME'}"]
    return lines + deletable(run)


def _for_memories(run: FinishedRun, context: int) -> list[str]:
    """The best rung for each usual memory with a context of so many tokens."""
    lines, chosen = list[str](), dict[str, list[int]]()
    for memory in USUAL_MEMORIES:
        if best := best_fitting(run, memory):
            chosen.setdefault(best.label, []).append(memory)
        else:
            lines.append(f"for {memory} GB: no rung with a context of {number_of(context, 'token')}")
    for rung in run.rungs:
        if memories := chosen.get(rung.label):
            sizes = " or ".join(", ".join(map(str, memories)).rsplit(", ", 1))
            file = shlex.quote(str(run.layout.model(rung.scores.model)))
            lines.append(f"for {sizes} GB: {rung.label}, llama-server -m {file} -c {context}")
    return lines


def deletable(run: FinishedRun) -> list[str]:
    """What may be deleted of a run directory, its bytes, and what is lost; empty if nothing may be, as during a run."""
    work = run.layout.work
    if is_running(run.layout.folder):
        return []
    size = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    if not size:
        return []
    steps = run.manifest.steps
    again = [name for name in ("base", "moments", "smooth") if name in steps and steps[name].outputs]
    parts = [f"{name} ({duration(steps[name].seconds)})" for name in again]
    parts += ["the blocks that its plan tries"] if any(name.startswith("plan ") for name in steps) else []
    text = f"may be deleted: {work} ({short_size(size)})."
    if parts:
        text += f" A run that adds a rung would then repeat: {', '.join(parts)}."
    if again != ["base"]:
        text += " `bitladder verify` would not work any more."
    return [text]

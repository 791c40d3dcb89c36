"""The model card (README.md) of a run directory, made from what lies in that directory and nothing else."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from bitladder.errors import BitladderError
from bitladder.files import write_text
from bitladder.recipe import Recipe, recipe_sha256
from bitladder.report import tables
from bitladder.report.front import front_matter
from bitladder.report.metrics import BENCHMARKS, METRICS, SPEED
from bitladder.report.numbers import gigabytes, with_error
from bitladder.report.recommend import choices
from bitladder.report.rundir import Measured, Run, read_run

NAME = "README.md"
# Speeds shown in the table of choices: what a user of a chat waits for.
GENERATION = "tg128"


def write_card(folder: pathlib.Path) -> bool:
    """Write the card of a finished run; return whether it differs from what was there.

    Raises BitladderError if the directory holds no finished run, or a file of it cannot be read.
    """
    text, path = render_card(folder), folder / NAME
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    write_text(path, text)
    return True


def render_card(folder: pathlib.Path) -> str:
    """The card's Markdown. The same run directory gives the same text. Raises BitladderError as `write_card`."""
    run = read_run(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bitladder.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    return environment.get_template("card.md.jinja").render(front=front_matter(run), **facts(run))


def facts(run: Run) -> dict[str, Any]:
    """What card and HTML report say of a run, by the names their templates use."""
    chosen = choices(run.rungs)
    taken = {choice.model.label for choice in chosen}
    base = run.base.scores
    tasks = tables.tasks(run)
    scored = [one.scores for one in [run.base, *run.quants]]
    return {
        "run": run,
        "record": run.record,
        "full": run.full,
        "has_full_file": bool(run.manifest.steps["convert"].outputs),
        "base": base,
        "base_size": gigabytes(base.bytes),
        "choices": [
            {
                "label": choice.model.label,
                "file": choice.model.scores.model,
                "size": gigabytes(choice.model.scores.bytes),
                "kld": with_error(choice.model.scores.kld) if choice.model.scores.kld else tables.DASH,
                "speed": _speed(choice.model),
                "when": choice.when,
            }
            for choice in chosen
        ],
        "not_chosen": [one.label for one in run.rungs if one.label not in taken],
        "generation": GENERATION if any(one.scores.speed(GENERATION) for one in run.rungs) else None,
        "sizes": tables.sizes(run),
        "quality": tables.quality(run),
        "all_paired": tables.all_paired(run),
        "doubts": {tables.label(one): one.scores.doubts for one in run.others if one.scores.doubts},
        "tasks": tasks,
        "task_scores": {name: score for one in reversed(scored) for name, score in one.tasks.items()},
        "speeds": tables.speeds(run),
        "machine": _machine(scored),
        "metrics": METRICS,
        "benchmarks": BENCHMARKS,
        "speed_meaning": SPEED,
        "made": [_made(one) for one in run.rungs],
        "smoothed": any(one.scores.smoothed for one in run.rungs),
        "tuned": any(one.scores.tuned for one in run.rungs),
        "imatrix": _imatrix([one.recipe for one in run.rungs if one.recipe]),
        "versions": _versions([one.recipe.versions for one in run.rungs if one.recipe] + [s.versions for s in scored]),
        "calibrated_on_text": any(base.text.sha256 in _calibration(one.recipe) for one in run.rungs if one.recipe),
        "credits": _credits(run),
    }


def _speed(model: Measured) -> str:
    figure = model.scores.speed(GENERATION)
    return with_error(figure) if figure else tables.DASH


def _made(model: Measured) -> dict[str, str]:
    """How one file was made."""
    assert model.recipe is not None
    return {
        "label": model.label,
        "file": model.scores.model,
        "chosen_by": _chosen_by(model),
        "types": tables.type_counts(model),
        "sha256": model.scores.sha256,
        "recipe_sha256": recipe_sha256(model.recipe.tensors),
    }


def _chosen_by(model: Measured) -> str:
    """How the types were chosen, and how weights were rounded to them."""
    assert model.recipe is not None
    mode, rounding = model.scores.mode, model.scores.rounding
    said = "the preset"
    if mode not in (None, "naive"):
        # "bitladder run --mode quality: exact, corrected twice": what comes last names the plan.
        plan = (model.recipe.made or "").rpartition(": ")[2]
        said = f"a plan for {mode}" + (f" ({plan})" if plan else "")
    if rounding not in (None, "stock"):
        said += f"; rounding: {rounding}"
    marks = [mark for mark, there in (("tuned", model.scores.tuned), ("smoothed", model.scores.smoothed)) if there]
    return "; ".join([said, *marks])


def _machine(scored: Sequence[Any]) -> str:
    """What the speeds were measured on, such as "Some CPU, 2 threads"."""
    rows = [row for scores in scored for row in scores.bench]
    parts = [(row.cpu, _threads(row.threads), row.backend if row.backend != "CPU" else None) for row in rows]
    return " and ".join(dict.fromkeys(", ".join(part for part in row if part) for row in parts if any(row)))


def _threads(count: int | None) -> str | None:
    return f"{count} thread{'s' if count > 1 else ''}" if count else None


def _imatrix(recipes: list[Recipe]) -> dict[str, Any]:
    """What all rungs have in common. Raises BitladderError if they have not."""
    found = {recipe.imatrix.model_dump_json(): recipe.imatrix for recipe in recipes if recipe.imatrix}
    if len(found) != 1:
        raise BitladderError("the recipes name different importance matrices; give the `bitladder run` command again")
    return next(iter(found.values())).model_dump()


def _calibration(recipe: Recipe) -> set[str]:
    """Hashes of the texts that the importance matrix is from."""
    return {text.sha256 for text in recipe.imatrix.texts} if recipe.imatrix else set()


def _versions(used: Sequence[dict[str, str]]) -> str:
    """Every version that took part, such as "bitladder 0.1.0, llama.cpp 0c1e570"."""
    names = {
        "bitladder": "bitladder",
        "llama_cpp_python": "llama-cpp-python",
        "llama_cpp_commit": "llama.cpp commit",
        "ggml": "ggml",
    }
    parts = []
    for key, label in names.items():
        found = sorted({versions[key] for versions in used if key in versions})
        if found:
            parts.append(f"{label} {' and '.join(found)}")
    return ", ".join(parts)


def _credits(run: Run) -> dict[str, Any]:
    """Whose texts and files were used."""
    texts = run.manifest.steps["imatrix"].facts.get("texts", [])
    names = [run.base.scores.text.name, *(text["name"] for text in texts)]
    return {
        "wikitext": any("wiki" in name.lower() for name in names),
        "python": any(name.startswith("pydoc:") for name in names),
        "sources": sorted({one.scores.source for one in run.others if one.scores.source}),
    }


def _cell(text: str) -> str:
    """Text that cannot break out of a table's cell or its line."""
    return " ".join(str(text).split()).replace("|", "\\|")

"""The model card (README.md) of a run, made from the files of the run directory and nothing else."""

import pathlib
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from bitladder.errors import BitladderError
from bitladder.evaluate import RunScores, task_meanings
from bitladder.files import write_text
from bitladder.recipe import Recipe, recipe_sha256
from bitladder.report import tables
from bitladder.report.best import recommendations
from bitladder.report.finished_run import FinishedRun, RunModel, read_run
from bitladder.report.tables import gigabytes, with_error
from bitladder.rundir import Layout

# The speed in the table of choices: in a chat the user waits for generated tokens.
GENERATION = "tg128"
# Keys of the hub's front matter → keys of GGUF's general.* metadata.
PASSED_ON = {
    "license": "license",
    "license_name": "license.name",
    "license_link": "license.link",
    "language": "languages",
}
WIKITEXT = "Salesforce/wikitext"


def write_card(folder: pathlib.Path) -> bool:
    """Writes the card of a finished run, and returns whether it changed.

    Raises:
        BitladderError: the directory has no finished run, or a file of it cannot be read.
    """
    return write_if_changed(Layout(folder).card, render_card(folder))


def write_if_changed(path: pathlib.Path, text: str) -> bool:
    """Writes a text file unless it has the same content, and returns whether it changed."""
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    write_text(path, text)
    return True


def render_card(folder: pathlib.Path) -> str:
    """The Markdown of the card. The same run directory gives the same text. Raises BitladderError as `write_card`."""
    run = read_run(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bitladder.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: _CONTROL.sub("", value) if isinstance(value, str) else value,
    )
    environment.filters |= {"cell": _cell, "code": _code, "link": _link}
    return environment.get_template("card.md.jinja").render(front=front_matter(run), **facts(run))


def facts(run: FinishedRun) -> dict[str, Any]:
    """What the card and the HTML report say of a run, by the names that their templates use."""
    recommended = recommendations(run.rungs)
    labels = {choice.model.label for choice in recommended}
    base = run.base.scores
    scored = [model.scores for model in run.models]
    recipes = [rung.recipe for rung in run.rungs if rung.recipe]
    return {
        "run": run,
        "record": run.record,
        "full": run.full,
        "projector": run.manifest.steps["convert"].facts.get("projector"),
        "prediction_weights": run.manifest.steps["convert"].facts.get("prediction_weights", 0),
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
            for choice in recommended
        ],
        "not_chosen": [rung.label for rung in run.rungs if rung.label not in labels],
        "generation": GENERATION if any(rung.scores.speed(GENERATION) for rung in run.rungs) else None,
        "sizes": tables.sizes(run),
        "quality": tables.quality(run),
        "by_text": tables.by_text(run),
        "mixed": tables.mixed(run),
        "all_paired": tables.all_paired(run),
        "doubts": {tables.label(other): other.scores.doubts for other in run.others if other.scores.doubts},
        "tasks": tables.tasks(run),
        "task_scores": {name: score for scores in reversed(scored) for name, score in scores.tasks.items()},
        "speeds": tables.speeds(run),
        "machine": _machine(scored),
        "metrics": tables.METRICS,
        "benchmarks": task_meanings(),
        "speed_meaning": tables.SPEED,
        "made": [_made(rung) for rung in run.rungs],
        "smoothed": any(rung.scores.smoothed for rung in run.rungs),
        "tuned": any(rung.scores.tuned for rung in run.rungs),
        "imatrix": _imatrix(recipes),
        "unreached": _unreached(run.manifest.steps["imatrix"].facts.get("unreached", [])),
        "versions": _versions([recipe.versions for recipe in recipes] + [scores.versions for scores in scored]),
        "calibrated_on_text": any(
            text.sha256 in _calibration(recipe) for recipe in recipes for text in base.texts_used
        ),
        "credits": _credits(run),
    }


def _speed(model: RunModel) -> str:
    figure = model.scores.speed(GENERATION)
    return with_error(figure) if figure else tables.DASH


def _made(model: RunModel) -> dict[str, str]:
    """How the file of a rung was made."""
    assert model.recipe is not None
    return {
        "label": model.label,
        "file": model.scores.model,
        "chosen_by": _chosen_by(model),
        "types": tables.type_counts(model),
        "sha256": model.scores.sha256,
        "recipe_sha256": recipe_sha256(model.recipe.tensors),
    }


def _chosen_by(model: RunModel) -> str:
    """How the types were chosen, and how weights were rounded to them."""
    assert model.recipe is not None
    mode, rounding = model.scores.mode, model.scores.rounding
    words = ["the preset"]
    if mode not in (None, "naive"):
        # "bitladder run --mode quality: exact, corrected twice": the last part names the plan.
        plan = (model.recipe.made or "").rpartition(": ")[2]
        words = [f"a plan for {mode}" + (f" ({plan})" if plan else "")]
    if rounding not in (None, "stock"):
        words.append(f"rounding: {rounding}")
    words += [mark for mark, holds in (("tuned", model.scores.tuned), ("smoothed", model.scores.smoothed)) if holds]
    return "; ".join(words)


def _machine(scored: Sequence[RunScores]) -> str:
    """The machine on which speeds were measured, such as "Some CPU, 2 threads"."""
    rows = [row for scores in scored for row in scores.bench]
    parts = [(row.cpu, _threads(row.threads), row.backend if row.backend != "CPU" else None) for row in rows]
    return " and ".join(dict.fromkeys(", ".join(part for part in row if part) for row in parts if any(row)))


def _threads(count: int) -> str | None:
    return f"{count} thread{'s' if count > 1 else ''}" if count else None


def _imatrix(recipes: list[Recipe]) -> dict[str, Any]:
    """The importance matrix of all rungs. Raises BitladderError if they have different ones."""
    matrices = {recipe.imatrix.model_dump_json(): recipe.imatrix for recipe in recipes if recipe.imatrix}
    if len(matrices) != 1:
        raise BitladderError("the recipes name different importance matrices; give the `bitladder run` command again")
    return next(iter(matrices.values())).model_dump()


def _unreached(lines: list[str]) -> list[str]:
    """Lines of experts that no token reached, at most eight."""
    return lines if len(lines) <= 8 else [*lines[:8], f"and {len(lines) - 8} more lines (bitladder stats)"]


def _calibration(recipe: Recipe) -> set[str]:
    """Hashes of the texts of the importance matrix."""
    return {text.sha256 for text in recipe.imatrix.texts} if recipe.imatrix else set()


def _versions(used: Sequence[dict[str, str]]) -> str:
    """Every version that was used, such as "bitladder 0.1.0, llama.cpp commit 0c1e570"."""
    names = {
        "bitladder": "bitladder",
        "llama_cpp_python": "llama-cpp-python",
        "llama_cpp_commit": "llama.cpp commit",
        "ggml": "ggml",
    }
    parts = []
    for key, label in names.items():
        known = sorted({versions[key] for versions in used if key in versions})
        if known:
            parts.append(f"{label} {' and '.join(known)}")
    return ", ".join(parts)


def _credits(run: FinishedRun) -> dict[str, Any]:
    """The texts and files of others that were used."""
    names = [*(text.name for text in run.base.scores.texts_used), *_calibration_names(run)]
    return {
        "wikitext": any("wiki" in name.lower() for name in names),
        "python": any(name.startswith("pydoc:") for name in names),
        "sources": sorted({other.scores.source for other in run.others if other.scores.source}),
    }


# Control characters but for line breaks, and those that turn the direction of text.
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# What Markdown or HTML would take for more than text. An underscore within a word is none of it.
_MARKUP = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {letter: f"\\{letter}" for letter in "\\`*[]|~$"}


def _cell(text: str) -> str:
    """A stranger's text as nothing but text, which cannot end the cell of a table or its line.

    Example:
        >>> _cell("a|b <b>[c](http://d)</b>")
        'a\\\\|b &lt;b&gt;\\\\[c\\\\](http&#8203;://d)&lt;/b&gt;'
    """
    plain = "".join(_MARKUP.get(letter, letter) for letter in " ".join(str(text).split()))
    # Programs that show Markdown make links of bare addresses.
    return re.sub(r"(?i)(https?|ftp)(?=://)|(www)(?=\.)", r"\g<0>&#8203;", plain)


def _code(text: str) -> str:
    """A stranger's text within backquotes, which it cannot end."""
    return " ".join(str(text).split()).replace("`", "'")


def _link(name: str) -> str:
    """The name of a file as the address of a link."""
    return urllib.parse.quote(str(name))


def front_matter(run: FinishedRun) -> str:
    """The YAML at the top of the card, as the hub reads it, without fences. What is not known is left out."""
    values: dict[str, Any] = {}
    if run.origin:
        values |= {"base_model": run.origin, "base_model_relation": "quantized"}
    if run.record.quantized_by:
        values["quantized_by"] = run.record.quantized_by
    values |= {"pipeline_tag": "text-generation", "library_name": "gguf"}
    general = run.full["general"]
    values |= {key: general[name] for key, name in PASSED_ON.items() if general.get(name)}
    if names := datasets(run):
        values["datasets"] = names
    values["tags"] = ["gguf", "quantized", "imatrix", "llama.cpp", "bitladder"]
    # Unlike a plain dump, this refuses what the hub's own reader refuses.
    return str(ModelCardData(**values).to_yaml(original_order=list(values))).rstrip("\n")


def datasets(run: FinishedRun) -> list[str]:
    """Hub ids of the data sets of the calibration text: those that were named, and WikiText by the names of files."""
    names = list(run.record.datasets)
    if any(name.startswith("wiki.") for name in _calibration_names(run)) and WIKITEXT not in names:
        names.append(WIKITEXT)
    return names


def _calibration_names(run: FinishedRun) -> list[str]:
    return [text["name"] for text in run.manifest.steps["imatrix"].facts.get("texts", [])]

"""The model card (README.md) of a run directory, made from what lies in that directory and nothing else."""

import pathlib
from typing import Any

import jinja2
import yaml

from bitladder.errors import BitladderError
from bitladder.files import write_text
from bitladder.ladder.manifest import Manifest, RunRecord, complete_manifest
from bitladder.recipe import Recipe, read_recipe
from bitladder.report.results import Scores, by_size, read_scores, row, task_rows, worth_their_size

NAME = "README.md"
# Front matter keys of the hub → keys of GGUF's general.* metadata.
PASSED_ON = {
    "license": "license",
    "license_name": "license.name",
    "license_link": "license.link",
    "language": "languages",
}


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
    manifest, run = complete_manifest(folder)
    full = manifest.steps["convert"].facts
    rungs = by_size([(rung, read_scores(folder / "scores" / f"{rung}.json")) for rung in run.rungs])
    base = read_scores(folder / "scores" / "base.json")
    recipes = [read_recipe(folder / "recipes" / f"{rung}.toml") for rung, _ in rungs]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bitladder.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    chosen = worth_their_size(rungs)
    return environment.get_template("card.md.jinja").render(
        front=yaml.safe_dump(front_matter(run, full), sort_keys=False, allow_unicode=True).rstrip("\n"),
        name=str(full["general"].get("name") or full["stem"]),
        origin=origin(run, full),
        run=run,
        full=full,
        has_full_file=bool(manifest.steps["convert"].outputs),
        base=base,
        base_row=row(full["encoding"], base),
        rows=[row(rung, scores) for rung, scores in rungs],
        chosen=[row(rung, scores) for rung, scores in rungs if rung in chosen],
        tasks=base.tasks,
        has_average=base.tasks_average is not None,
        task_rows=task_rows([(full["encoding"], base), *rungs]) if base.tasks else [],
        others=[rung for rung, _ in rungs if rung not in chosen],
        imatrix=_imatrix(recipes),
        versions=_versions(recipes, [base, *(scores for _, scores in rungs)]),
        calibrated_on_text=any(base.text.sha256 in {t.sha256 for t in r.imatrix.texts} for r in recipes if r.imatrix),
        credits=_credits(manifest, base),
    )


def front_matter(run: RunRecord, full: dict[str, Any]) -> dict[str, Any]:
    """The YAML at the card's top, as the hub reads it. What is not known is left out.

    `full` holds the facts of the full-precision model (`ladder.source.describe`).
    """
    values: dict[str, Any] = {}
    repository = origin(run, full)
    if repository:
        values |= {"base_model": repository, "base_model_relation": "quantized"}
    if run.quantized_by:
        values["quantized_by"] = run.quantized_by
    values |= {"pipeline_tag": "text-generation", "library_name": "gguf"}
    values |= {key: full["general"][name] for key, name in PASSED_ON.items() if full["general"].get(name)}
    values["tags"] = ["gguf", "quantized", "imatrix"]
    return values


def origin(run: RunRecord, full: dict[str, Any]) -> str | None:
    """The hub id of the model that was quantized, if it is known."""
    return run.model_id or full.get("origin")


def _imatrix(recipes: list[Recipe]) -> dict[str, Any]:
    """What all rungs have in common. Raises BitladderError if they have not."""
    found = {recipe.imatrix.model_dump_json(): recipe.imatrix for recipe in recipes if recipe.imatrix}
    if len(found) != 1:
        raise BitladderError("the recipes name different importance matrices; give the `bitladder run` command again")
    return next(iter(found.values())).model_dump()


def _versions(recipes: list[Recipe], scores: list[Scores]) -> str:
    """Every version that took part, such as "bitladder 0.1.0, llama.cpp 0c1e570"."""
    names = {
        "bitladder": "bitladder",
        "llama_cpp_python": "llama-cpp-python",
        "llama_cpp_commit": "llama.cpp commit",
        "ggml": "ggml",
    }
    used = [recipe.versions for recipe in recipes] + [one.versions for one in scores]
    parts = []
    for key, label in names.items():
        found = sorted({versions[key] for versions in used if key in versions})
        if found:
            parts.append(f"{label} {' and '.join(found)}")
    return ", ".join(parts)


def _credits(manifest: Manifest, base: Scores) -> dict[str, bool]:
    """Whose texts were used."""
    texts = manifest.steps["imatrix"].facts.get("texts", [])
    names = [base.text.name, *(text["name"] for text in texts)]
    return {
        "wikitext": any("wiki" in name.lower() for name in names),
        "python": any(name.startswith("pydoc:") for name in names),
    }


def _cell(text: str) -> str:
    """Text that cannot break out of a table's cell or its line."""
    return " ".join(str(text).split()).replace("|", "\\|")

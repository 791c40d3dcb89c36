"""The model card (README.md) of a run, made from the files of the run directory and nothing else."""

import pathlib
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from bitladder.calibrate import first_lines
from bitladder.errors import BitladderError
from bitladder.evaluate import Figure, RunScores, task_meanings
from bitladder.files import write_text
from bitladder.hub import pick
from bitladder.recipe import Recipe, recipe_sha256
from bitladder.report import tables
from bitladder.report.best import by_memory, in_a_sentence, recommended, worth_their_size
from bitladder.report.finished_run import FinishedRun, RunModel, read_chat_template, read_run
from bitladder.report.tables import gigabytes, with_errors
from bitladder.rundir import Layout, make_again
from bitladder.text import BUILTIN, Conversation
from bitladder.units import number_of

# Keys of the hub's front matter → keys of GGUF's general.* metadata.
PASSED_ON = {
    "license": "license",
    "license_name": "license.name",
    "license_link": "license.link",
    "language": "languages",
}
WIKITEXT = "Salesforce/wikitext"
# What `-hf OWNER/REPO` takes if no quant is named (bitladder.hub.pick).
UNNAMED_RULE = "llama.cpp's own rule prefers Q4_K_M, then Q8_0, then the first file"


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
    environment.filters |= {"cell": _cell, "code": _code, "link": _link, "number_of": number_of}
    return environment.get_template("card.md.jinja").render(
        front=front_matter(run), prompt=_prompt(run), hashes=_hashes(run), **facts(run)
    )


def facts(run: FinishedRun) -> dict[str, Any]:
    """What the card and the HTML report say of a run, by the names that their templates use."""
    base = run.base.scores
    scored = [model.scores for model in run.models]
    recipes = [rung.recipe for rung in run.rungs if rung.recipe]
    generation = tables.generation_test(run)
    return {
        "run": run,
        "record": run.record,
        "full": run.full,
        "projector": run.manifest.steps["convert"].facts.get("projector"),
        "prediction_weights": run.manifest.steps["convert"].facts.get("prediction_weights", 0),
        "has_full_file": run.has_full_file,
        "base": base,
        "base_size": gigabytes(base.bytes),
        "choices": _choices(run, generation),
        "memory_heads": [f"{_thousands(tokens)} context (GB)" for tokens in run.beside],
        "fitting": _fitting(run),
        "example": _example(run),
        "unnamed_rule": UNNAMED_RULE,
        "sampling": _sampling(run),
        "builtin": {
            "measured": any(text.name in BUILTIN for text in base.texts_used),
            "calibration": any(name in BUILTIN for name in _calibration_names(run)),
        },
        "generation": generation,
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
        "imatrix": _imatrix(run),
        "unreached": first_lines(run.manifest.steps["imatrix"].facts.get("unreached", [])),
        "versions": _versions([recipe.versions for recipe in recipes] + [scores.versions for scores in scored]),
        "calibrated_on_text": any(
            text.sha256 in _calibration(recipe) for recipe in recipes for text in base.texts_used
        ),
        "credits": _credits(run),
    }


def _choices(run: FinishedRun, generation: str | None) -> list[dict[str, Any]]:
    """The table of choices, a row for each rung: what somebody who downloads must know of a file.

    Parameters:
        run: the run.
        generation: the speed test that is shown; None without one.
    """

    def speed(model: RunModel | None) -> Figure | None:
        return model.scores.speed(generation) if model and generation else None

    scores = [rung.scores for rung in run.rungs]
    presets = [run.naive.get(rung.label) for rung in run.rungs]
    worth = worth_their_size([(rung.label, rung.scores) for rung in run.rungs])
    columns = zip(
        run.rungs,
        presets,
        with_errors([score.kld for score in scores]),
        with_errors([speed(rung) for rung in run.rungs]),
        with_errors([speed(preset) for preset in presets]),
        strict=True,
    )
    return [
        {
            "label": rung.label,
            "file": rung.scores.model,
            "recommended": rung.label in worth,
            "size": gigabytes(rung.scores.bytes),
            "memory": [gigabytes(rung.scores.bytes + beside) for beside in run.beside.values()],
            "kld": kld,
            "speed": speed,
            "preset_speed": "same types" if _same_types(rung, preset) else preset_speed,
            "when": in_a_sentence(rung, run.rungs, preset),
        }
        for rung, preset, kld, speed, preset_speed in columns
    ]


def _same_types(rung: RunModel, preset: RunModel | None) -> bool:
    """Whether a rung has the types of its preset, and so its speed."""
    return bool(preset and preset.recipe and rung.recipe and preset.recipe.tensors == rung.recipe.tensors)


def _thousands(tokens: int) -> str:
    """A number of tokens as people write it, such as "8k"."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _fitting(run: FinishedRun) -> dict[str, Any] | None:
    """The best rung for usual memories, with a context of medium length; None if its memory is not known."""
    context = run.usual_context
    choices = by_memory(run)
    if context is None or not choices:
        return None
    return {"context": _thousands(context), "choices": [(memory, rung.label) for memory, rung in choices]}


def _example(run: FinishedRun) -> dict[str, Any]:
    """The file of the commands, and the quant that llama.cpp takes if none is named."""
    memory, rung = recommended(run)
    plain = unnamed_quant(run)
    return {"label": rung.label, "file": rung.scores.model, "memory": memory, "plain": plain.label if plain else ""}


def unnamed_quant(run: FinishedRun) -> RunModel | None:
    """The model that `-hf OWNER/REPO` takes of the repository of a run, by llama.cpp's own rule."""
    models = [*run.rungs, *([run.base] if run.has_full_file else [])]
    file = pick(sorted(model.scores.model for model in models))  # the hub sorts by name
    return next((model for model in models if model.scores.model == file), None)


def _sampling(run: FinishedRun) -> str:
    """The settings of sampling that the makers of the model recommend, such as "temp 0.6, top_p 0.95"."""
    prefix = "sampling."
    general = {key.removeprefix(prefix): value for key, value in run.full["general"].items() if key.startswith(prefix)}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in general.items()
    )


def _prompt(run: FinishedRun) -> dict[str, str] | None:
    """How a conversation begins, by the chat template of the model, in a fence that it cannot end."""
    template = read_chat_template(run)
    if template is None:
        return None
    user = {"role": "user", "content": "{prompt}"}
    for messages in ([{"role": "system", "content": "{system_prompt}"}, user], [user]):
        try:
            conversation = Conversation("the prompt format", tuple(messages))
            text = template.render([conversation], prompt=True)[0][0].rstrip("\n")
        except BitladderError:  # some templates refuse a system message
            continue
        longest = max(map(len, re.findall("`+", text)), default=0)
        return {"text": text, "fence": "`" * max(3, longest + 1)}
    return None


def _hashes(run: FinishedRun) -> list[tuple[str, str]]:
    """Name and SHA-256 of all files that are named in the card."""
    imatrix = _imatrix(run)
    return [
        *((rung.scores.model, rung.scores.sha256) for rung in run.rungs),
        (imatrix["name"], imatrix["sha256"]),
        (run.full["file"], run.full["sha256"]),
        *((f"{text.name} (measured)", text.sha256) for text in run.base.scores.texts_used),
        *((f"{text['name']} (calibration)", text["sha256"]) for text in imatrix["texts"]),
        *((f"recipe of {rung.label}", recipe_sha256(rung.recipe.tensors)) for rung in run.rungs if rung.recipe),
    ]


def _made(model: RunModel) -> dict[str, str]:
    """How the file of a rung was made."""
    assert model.recipe is not None
    return {
        "label": model.label,
        "file": model.scores.model,
        "chosen_by": _chosen_by(model),
        "types": tables.type_counts(model),
        "sha256": model.scores.sha256,
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
    return number_of(count, "thread") if count else None


def _imatrix(run: FinishedRun) -> dict[str, Any]:
    """The importance matrix of all rungs. Raises BitladderError if they have different ones."""
    recipes = [rung.recipe for rung in run.rungs if rung.recipe]
    matrices = {recipe.imatrix.model_dump_json(): recipe.imatrix for recipe in recipes if recipe.imatrix}
    if len(matrices) != 1:
        again = make_again(run.layout.folder, run.manifest)
        raise BitladderError(f"the recipes name different importance matrices. {again}")
    return next(iter(matrices.values())).model_dump()


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

"""Which type each tensor has: `plan` chooses, and `recipe` shows, checks, extracts, compares and exports."""

import dataclasses
import pathlib

import click

from bitladder import recipe as recipes
from bitladder.cli import options as shared
from bitladder.cli.options import names_of, options_from, warn_unused
from bitladder.cli.outputs import Command, OutputFolder, OutputPath, check_output
from bitladder.cli.typed import INPUT, TEXT, Choice, GroupedOption, NamingGroup
from bitladder.errors import BitladderError, UsageError
from bitladder.files import write_text
from bitladder.gguf import open_model
from bitladder.options import flat
from bitladder.plan import (
    FeedbackOptions,
    PlanDecoding,
    PlanOptions,
    TargetOptions,
)
from bitladder.rounding import RoundingOptions
from bitladder.show import Output, common_options, difference, recipe_tables
from bitladder.text import load_text
from bitladder.trial import PruneOptions
from bitladder.units import number_of

_TEXT, _PRUNE_TEXT = "pydoc:calibration", "pydoc:test"
_CHUNKS = next(field for field in flat(FeedbackOptions) if field.name == "chunks")
_model = click.option("-m", "--model", type=INPUT, help="The model's full-precision GGUF, for shapes and checks.")


# A parameter for each option that stands for itself.
@click.command(
    "plan",
    cls=Command,
    page="plan.md",
    examples=(
        "plan -m model-F16.gguf --imatrix imatrix.gguf --like Q4_K_M -o model.toml",
        "plan -m model-F16.gguf --imatrix imatrix.gguf --vram 8GiB --context 8192",
    ),
)
@click.option("-m", "--model", required=True, type=INPUT, help="Full-precision GGUF.")
@click.option("--imatrix", type=INPUT, help="Importance matrix of the same model.")
@click.option(
    "-o", "--output", "out", type=OutputPath("recipe"), help="Recipe to write.  [default: MODEL-TARGET.toml, here]"
)
@options_from(TargetOptions, parameter="aim")
@click.option(
    "--moments",
    type=INPUT,
    multiple=True,
    help="Second moments (from bitladder calibrate). Types are then priced with the blocks of quantize --rounding. "
    "Can be repeated.",
)
@click.option(
    "--rounding",
    type=Choice(["feedback", "descent", "best"]),
    help="Rounding of these blocks; needs --moments.  [default: best]",
)
@click.option("--sensitivity", type=INPUT, help="Prices from an earlier plan; with --no-feedback nothing is measured.")
@options_from(PlanOptions, leave_out=("n_ctx", "chunks"))
# These two have another default with --suggest-prune. None says that they are not given.
@click.option(
    "--chunks",
    type=int,
    metavar="N",
    cls=GroupedOption,
    efforts=_CHUNKS.option.efforts,
    help=f"Chunks that a recipe is measured on.  [default: {FeedbackOptions().chunks}; to prune "
    f"{PruneOptions().chunks}]",
)
@click.option(
    "-c",
    "--ctx-size",
    "n_ctx",
    type=int,
    metavar="TOKENS",
    help=f"Tokens of a chunk.  [default: {PlanDecoding().n_ctx}; to prune {PruneOptions().n_ctx}]",
)
@click.option("--work", type=OutputFolder(), help="Folder for measurements and rendered blocks.  [default: MODEL.plan]")
@click.option("--suggest-prune", is_flag=True, help="Instead, measure what the model loses without each block.")
@click.option(
    "-f",
    "--file",
    "texts",
    type=TEXT,
    multiple=True,
    metavar="TEXT",
    help=f"Text to measure on, passages of each. Can be repeated.  [default: {_TEXT}; to prune {_PRUNE_TEXT}]",
)
@common_options
@shared.effort
def plan_command(
    *,
    output: Output,
    model: pathlib.Path,
    imatrix: pathlib.Path | None,
    out: pathlib.Path | None,
    aim: TargetOptions,
    moments: tuple[pathlib.Path, ...],
    rounding: str | None,
    sensitivity: pathlib.Path | None,
    options: PlanOptions,
    chunks: int | None,
    n_ctx: int | None,
    work: pathlib.Path | None,
    suggest_prune: bool,
    texts: tuple[str, ...],
) -> None:
    """Choose a type for each tensor: least KLD for a size, or least size for a KLD.

    The command renders tensors in the types of the menu, swaps them into the loaded model, and measures the KLD on a
    text. Use neither the calibration text nor your evaluation text. An exact solver then allocates the bytes. Its
    recipes are measured, the prices are corrected, and the problem is solved again. Measurements are kept in --work, so
    another target takes little time.
    """
    from bitladder.plan import PlanInputs, Planner, check_target, planned_recipe, target_of
    from bitladder.recipe import write_recipe
    from bitladder.show import plan_tables
    from bitladder.trial import rank_blocks

    size = {} if n_ctx is None else {"n_ctx": n_ctx}
    amount = {} if chunks is None else {"chunks": chunks}
    _warn_unused(output, aim, options, suggest_prune=suggest_prune, priced=sensitivity is not None)
    if suggest_prune:
        decoding = dataclasses.asdict(options.decoding)
        del decoding["n_ctx"]
        prune = PruneOptions(**(decoding | size | amount))
        if len(texts) > 1:
            raise UsageError("--suggest-prune measures on one text: name one (-f)")
        shared.warn_if_quantized(output, "-m", model)
        loaded = load_text(texts[0] if texts else _PRUNE_TEXT, model)
        ranked = rank_blocks(model, loaded, prune, progress=output.progress)
        if output.json:
            output.print_json(plan_tables.prune_json(ranked))
            return
        output.line(
            f"{model.name} without one block, {number_of(prune.chunks or 0, 'chunk')} of {loaded.name}; "
            "smallest loss first"
        )
        output.print(plan_tables.prune_table(ranked))
        output.line(plan_tables.prune_line(ranked))
        return
    check_target(aim)
    if rounding is not None and not moments:
        raise UsageError(f"--rounding {rounding} needs second moments: pass --moments (bitladder calibrate makes them)")
    how = RoundingOptions() if rounding is None else RoundingOptions(method=rounding)  # type: ignore[arg-type]
    options = options.replace(decoding=options.decoding.replace(**size), feedback=options.feedback.replace(**amount))
    inputs = PlanInputs(model, imatrix, [load_text(spec, model) for spec in texts or (_TEXT,)], moments, how, work)
    with Planner(inputs, options, output.progress) as planner:
        target, preset = target_of(aim, planner.subject, options.decoding)
        if sensitivity is None:
            planner.check_reachable(target, preset)
        out = pathlib.Path(f"{model.stem}-{target.word}.toml") if out is None else out
        check_output(out, "recipe")
        prices = planner.prices_for(target, preset) if sensitivity is None else planner.known(sensitivity)
        result = planner.plan(target, prices, preset)
        write_recipe(out, planned_recipe(planner.subject, result, target))
        places = planner.subject.places
    if output.json:
        output.print_json(plan_tables.as_json(result, places, target) | {"recipe": out.name})
        return
    for table in plan_tables.tables(result, places):
        output.print(table)
        output.line("")
    for line in (*plan_tables.lines(result, target), plan_tables.next_step(out, model, imatrix)):
        output.line(line)


def _warn_unused(
    output: Output, aim: TargetOptions, options: PlanOptions, *, suggest_prune: bool, priced: bool
) -> None:
    """Warns of options that do nothing beside the others."""
    if suggest_prune:
        own = {"imatrix", "out", "moments", "rounding", "sensitivity", "work", "effort"}
        plans = names_of(TargetOptions, PlanOptions) - names_of(PruneOptions)
        warn_unused(output, "with --suggest-prune", own | plans)
        return
    if aim.vram is None:
        warn_unused(output, "without --vram", {"context"})
    if priced:
        warn_unused(output, "with --sensitivity", {"method", "probe_tokens"})
    elif options.prices.method == "fisher":
        warn_unused(output, "with --prices fisher", {"probe_tokens"})


@click.group(
    "recipe",
    cls=NamingGroup,
    page="recipe-format.md",
    examples=("recipe show model-Q4_K_M.gguf", "recipe diff mine.toml model-Q4_K_M.gguf"),
)
def recipe_command() -> None:
    """Show, check, extract, compare and export recipes: which type each tensor of a quant has.

    A RECIPE is the .toml of a recipe, or any .gguf, whose recipe is read from the file.
    """


@recipe_command.command(
    "show",
    cls=Command,
    page="recipe-format.md",
    examples=("recipe show model-Q4_K_M.gguf",),
    short_help="Show a recipe in tables.",
)
@click.argument("recipe", type=INPUT)
@_model
@common_options
def show(output: Output, recipe: pathlib.Path, model: pathlib.Path | None) -> None:
    """Show RECIPE: header, kinds × types, layers × kinds."""
    opened = recipes.open_recipe(recipe, model)
    if output.json:
        output.print_json(recipe_tables.to_json(opened.recipe, opened.shapes))
        return
    for line in recipe_tables.heading(opened.recipe, opened.shapes):
        output.line(line)
    for table in (recipe_tables.kinds_table(opened.recipe, opened.shapes), recipe_tables.layers_table(opened.recipe)):
        if table is not None:
            output.line("")
            output.print(table)


@recipe_command.command(
    "check",
    cls=Command,
    page="recipe-format.md",
    examples=("recipe check model.toml -m model-F16.gguf",),
    short_help="Check a recipe against its model.",
)
@click.argument("recipe", type=INPUT)
@click.option("-m", "--model", required=True, type=INPUT, help="The model's full-precision GGUF.")
@common_options
def check(output: Output, recipe: pathlib.Path, model: pathlib.Path) -> None:
    """Check that RECIPE can be carried out on a model, and show the exact size of its tensors.

    Exits with 1 if there are problems.
    """
    with open_model(model) as file:
        checked = recipes.check(recipes.open_recipe(recipe).recipe, file)
    if output.json:
        output.print_json(checked.to_json())
    else:
        for finding in checked.findings:
            output.line(finding.line())
        output.line(f"{number_of(checked.size.bytes, 'byte')} of tensors, {checked.size.bpw:.4f} bpw")
    if checked.problems:
        raise BitladderError(f"{recipe}: {number_of(checked.problems, 'problem')} with {model.name}")


@recipe_command.command(
    "extract",
    cls=Command,
    page="recipe-format.md",
    examples=("recipe extract model-Q4_K_M.gguf -o model.toml",),
    short_help="Extract the recipe of a GGUF.",
)
@click.argument("gguf", type=INPUT)
@click.option("-o", "--output", "out", type=OutputPath("recipe"), help="File to write.  [default: print it]")
@common_options
def extract(output: Output, gguf: pathlib.Path, out: pathlib.Path | None) -> None:
    """Extract the recipe of a GGUF of any maker."""
    recipe = recipes.extract(gguf)
    if out is not None:
        recipes.write_recipe(out, recipe)
        output.progress.info(f"wrote {out}")
    if output.json:
        output.print_json(recipe.model_dump(mode="json"))
    elif out is None:
        output.line(recipes.recipe_toml(recipe).removesuffix("\n"))


@recipe_command.command(
    "diff",
    cls=Command,
    page="recipe-format.md",
    examples=("recipe diff mine.gguf theirs.gguf",),
    short_help="Compare two recipes.",
)
@click.argument("a", type=INPUT, metavar="RECIPE_A")
@click.argument("b", type=INPUT, metavar="RECIPE_B")
@_model
@common_options
def diff(output: Output, a: pathlib.Path, b: pathlib.Path, model: pathlib.Path | None) -> None:
    """Compare two recipes: which tensors have more or fewer bits in B, and how many bytes that is.

    Bytes need the shapes of the tensors: from a .gguf among the two, or from -m.
    """
    first, second = recipes.open_recipe(a, model), recipes.open_recipe(b, model)
    changes = recipes.diff(first.recipe, second.recipe, recipes.joined_shapes(first, second))
    if output.json:
        output.print_json(changes.to_json())
        return
    for part in difference(changes):
        if isinstance(part, str):
            output.line(part)
        else:
            output.print(part)


@recipe_command.command(
    "export",
    cls=Command,
    page="recipe-format.md",
    examples=("recipe export model.toml -m model-F16.gguf -o types.txt",),
    short_help="Export for llama-quantize.",
)
@click.argument("recipe", type=INPUT)
@click.option(
    "-o", "--output", "out", type=OutputPath("types"), help="File to write the lines to.  [default: print them]"
)
@click.option("-m", "--model", type=INPUT, help="The model's full-precision GGUF. Lines without effect are left out.")
@common_options
def export(output: Output, recipe: pathlib.Path, out: pathlib.Path | None, model: pathlib.Path | None) -> None:
    """Export RECIPE as lines for llama-quantize --tensor-type-file, and show the command that uses them.

    With the recipe's model and importance matrix, llama-quantize then makes the same tensors, byte by byte. The
    command goes to stderr if the lines go to stdout.
    """
    types = "types.txt" if out is None else str(out)
    exported = recipes.export(recipes.open_recipe(recipe).recipe, types, model)
    for note in exported.notes:
        output.progress.warn(note)
    if out is not None:
        write_text(out, "".join(f"{line}\n" for line in exported.lines))
    if output.json:
        output.print_json({"preset": exported.preset, "lines": list(exported.lines), "command": exported.command})
    elif out is not None:
        output.line(exported.command)
    else:
        for line in exported.lines:
            output.line(line)
        output.progress.info(exported.command)

"""bitladder plan: which type each tensor should have, from what it is measured to cost."""

import dataclasses
import pathlib

import click

from bitladder.cli import options as shared
from bitladder.cli.options import options_from
from bitladder.cli.outputs import Command, OutputFolder, OutputPath, check_output
from bitladder.cli.typed import INPUT, Choice, FileOrName
from bitladder.errors import UsageError
from bitladder.plan import (
    FeedbackOptions,
    PlanDecoding,
    PlanOptions,
    TargetOptions,
)
from bitladder.rounding import RoundingOptions
from bitladder.show import Output, common_options
from bitladder.text import load_text
from bitladder.trial import PruneOptions

_TEXT, _PRUNE_TEXT = "pydoc:calibration", "pydoc:test"


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
    help="Second moments (from bitladder calibrate). Types are then priced with the blocks of quantize --rounding.",
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
    type=FileOrName(),
    multiple=True,
    metavar="TEXT",
    help=f"Text to measure on, passages of each; may be repeated.  [default: {_TEXT}; to prune {_PRUNE_TEXT}]",
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
        output.line(f"{model.name} without one block, {prune.chunks} chunks of {loaded.name}; smallest loss first")
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

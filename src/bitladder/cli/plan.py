"""`bitladder plan`: which type each tensor should have, from what it is measured to cost."""

import contextlib
import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

import click

from bitladder.cli import options
from bitladder.show.output import Output, common_options

if TYPE_CHECKING:
    from bitladder.gguf.reader import GgufFile
    from bitladder.plan import Planner, PlanOptions, PlanResult, Preset, Target
    from bitladder.plan.prices.document import Sensitivity
    from bitladder.refine.round.output_rounding import OutputRounding

_FILE = click.Path(exists=True, dir_okay=False, path_type=pathlib.Path)
_OUT = click.Path(dir_okay=False, path_type=pathlib.Path)


@click.command("plan")
@click.option("-m", "--model", required=True, type=_FILE, help="Full-precision GGUF.")
@click.option("--imatrix", type=_FILE, help="Importance matrix of the same model.")
@click.option("-o", "--output", "out", type=_OUT, help="Recipe to write.  [default: MODEL-TARGET.toml, here]")
@click.option("--like", metavar="PRESET", help="Least KLD in at most the bytes of this preset.")
@click.option("--size", metavar="SIZE", help="Least KLD in at most this file size (3.7GiB, 900MB, bytes).")
@click.option("--bpw", type=float, help="Least KLD in at most so many bits per weight.")
@click.option("--kld", type=float, help="Smallest file of at most this KLD, nats per token.")
@click.option("--vram", metavar="SIZE", help="Least KLD in a file that fits beside KV cache and buffers of --context.")
@click.option("--context", default=4096, show_default=True, type=click.IntRange(1), help="Tokens for --vram.")
@click.option("--menu", default="all", show_default=True, metavar="k|iq|all|fast|TYPES", help="Types to choose from.")
@click.option(
    "--tensor-type",
    "pins",
    multiple=True,
    metavar="PATTERN=TYPE",
    help="Pin tensors whose name the pattern is found in; the first that matches decides.",
)
@click.option("--floor", "floors", multiple=True, metavar="KIND=TYPE", help="Fewest bits of a kind (attn_v=q5_K, 4.5).")
@click.option("--tie", "ties", multiple=True, metavar="KIND,KIND", help="Kinds with equal types within each layer.")
@click.option("--max-types", type=click.IntRange(1), help="Use at most so many different types.")
@click.option("--min-speed", type=float, metavar="TOKENS/S", help="At least this speed of generation on this CPU.")
@click.option(
    "--moments",
    type=_FILE,
    multiple=True,
    help="Second moments (bitladder calibrate): price the blocks of quantize --rounding instead of the library's.",
)
@click.option(
    "--rounding",
    type=click.Choice(["feedback", "descent", "best"]),
    default="best",
    show_default=True,
    help="How those blocks are chosen.",
)
@click.option("--sensitivity", type=_FILE, help="Prices from an earlier plan; with --no-feedback nothing is measured.")
@click.option(
    "--prices",
    "method",
    type=click.Choice(["forward", "fisher"]),
    default="forward",
    show_default=True,
    help="From swaps in the loaded model, or from gradients (needs bitladder[torch]).",
)
@click.option(
    "--probe-tokens", default=120_000, show_default=True, type=click.IntRange(1), help="To decode for prices."
)
@click.option("--feedback/--no-feedback", default=True, show_default=True, help="Measure recipes and correct prices.")
@click.option("--chunks", default=12, show_default=True, type=click.IntRange(2), help="To measure a recipe on.")
@click.option("--work", type=click.Path(file_okay=False, path_type=pathlib.Path), help="Folder for what is kept.")
@click.option("--suggest-prune", is_flag=True, help="Measure the model without each of its blocks instead.")
@click.option("-f", "--file", "text", help="Text to measure on.  [default: pydoc:calibration; to prune pydoc:test]")
@click.option(
    "-c", "--ctx-size", "n_ctx", type=click.IntRange(4), help="Tokens per chunk.  [default: 256; to prune 512]"
)
@options.n_batch(512)
@options.n_ubatch
@options.threads
@options.gpu_layers
@common_options
def command(output: Output, model: pathlib.Path, suggest_prune: bool, **given: Any) -> None:
    """Choose a type for each tensor: least KLD for a size, or least size for a KLD.

    Every tensor is rendered in every type of the menu, swapped into the loaded model, and its KLD measured on a text
    that should be neither the one of the imatrix nor the one to judge by. An exact solver then spends the bytes; its
    recipes are measured, prices corrected and solved again. What was measured is kept in --work and never measured
    again, so another target takes little.
    """
    if suggest_prune:
        _prune(output, model, given)
        return
    wanted = [name for name in ("like", "size", "bpw", "kld", "vram") if given[name] is not None]
    if len(wanted) != 1:
        raise click.UsageError("say what to plan for: one of --like, --size, --bpw, --kld, --vram; or --suggest-prune")
    # Imported here, so that --help does not wait for the native library.
    from bitladder.plan import Planner, Subject
    from bitladder.text.texts import load_text

    with contextlib.ExitStack() as opened, Subject(model, given["imatrix"]) as subject:
        chosen = dataclasses.replace(_options(given), rounding=_rounding(given, opened, subject.file, output))
        with Planner(subject, load_text(given["text"] or "pydoc:calibration"), chosen, output.progress) as planner:
            target, preset = _target(planner, wanted[0], given)
            prices = _prices(planner, target, preset, given)
            result = planner.plan(target, prices, preset)
            out = given["out"] or pathlib.Path(f"{model.stem}-{_word(target.text)}.toml")
            planner.write_recipe(out, result, target)
    _show(output, result, subject.places, target, out)


def _rounding(
    given: dict[str, Any], opened: contextlib.ExitStack, model: "GgufFile", output: Output
) -> "OutputRounding | None":
    """What rounds for the layers' outputs, with its files open as long as needed; None for the library's kernels."""
    from bitladder.calibrate.moments.moments_file import MomentsFile
    from bitladder.refine.round.output_rounding import OutputRounding, refuse_other_moments
    from bitladder.rounding import RoundingOptions

    if not given["moments"]:
        return None
    files = [opened.enter_context(MomentsFile(path)) for path in given["moments"]]
    refuse_other_moments(files, model, output.progress)
    return OutputRounding(files, RoundingOptions(method=given["rounding"]))


def _options(given: dict[str, Any]) -> "PlanOptions":
    from bitladder.evaluate import Settings
    from bitladder.plan import Constraints, FeedbackEffort, PlanOptions, parse_floor
    from bitladder.plan.prices.menu import measured_speeds, within_speed
    from bitladder.plan.prices.price import Effort
    from bitladder.quantize.quantize_options import parse_tensor_type

    constraints = Constraints(
        tuple(parse_tensor_type(text) for text in given["pins"]),
        tuple(parse_floor(text) for text in given["floors"]),
        tuple(tuple(kind.strip() for kind in text.split(",")) for text in given["ties"]),
        given["max_types"],
        given["min_speed"],
    )
    speeds = None
    if given["menu"] == "fast" or given["min_speed"] is not None:
        speeds = measured_speeds(given["threads"])
    chunks = given["chunks"]
    return PlanOptions(
        menu=given["menu"],
        fast=within_speed(speeds) if speeds and given["menu"] == "fast" else None,
        constraints=constraints,
        settings=Settings(
            n_ctx=given["n_ctx"] or 256,
            chunks=chunks,
            threads=given["threads"],
            gpu_layers=given["gpu_layers"],
            n_batch=given["n_batch"],
            n_ubatch=given["n_ubatch"],
        ),
        method=given["method"],
        effort=Effort(tokens=given["probe_tokens"]),
        feedback=FeedbackEffort(chunks=chunks, move_chunks=max(1, chunks // 2)) if given["feedback"] else None,
        work=given["work"],
        speeds=speeds,
    )


def _target(planner: "Planner", kind: str, given: dict[str, Any]) -> "tuple[Target, Preset | None]":
    from bitladder.plan import Target
    from bitladder.units import bpw_bytes, parse_size

    subject = planner.subject
    if kind == "like":
        preset = subject.preset(given["like"])
        return Target(f"like {given['like'].upper()}", max_bytes=preset.bytes), preset
    if kind == "kld":
        return Target(f"KLD {given['kld']:g}", max_kld=given["kld"]), None
    if kind == "size":
        size, text = parse_size(given["size"]), f"size {given['size']}"
    elif kind == "bpw":
        size, text = bpw_bytes(given["bpw"], subject.weights(), planner.header_bytes()), f"{given['bpw']:g} bpw"
    else:
        text = f"vram {given['vram']} context {given['context']}"
        size = planner.beside(parse_size(given["vram"], "--vram"), given["context"], text)
    return Target(text, max_bytes=size), planner.fitting_preset(size)


def _prices(planner: "Planner", target: "Target", preset: "Preset | None", given: dict[str, Any]) -> "Sensitivity":
    if given["sensitivity"] is not None:
        return planner.known(given["sensitivity"])
    return planner.prices_for(target, preset)


def _word(text: str) -> str:
    return text.removeprefix("like ").replace(" ", "-")


def _show(output: Output, result: "PlanResult", places: Any, target: "Target", out: pathlib.Path) -> None:
    from bitladder.show.plan_tables import as_json, lines, tables

    if output.json:
        output.print_json(as_json(result, places, target) | {"recipe": out.name})
        return
    for table in tables(result, places):
        output.print(table)
    for line in lines(result, target):
        output.line(line)
    output.line(f"wrote {out}; bitladder quantize -m MODEL --imatrix IMATRIX --recipe {out} -o OUT.gguf")


def _prune(output: Output, model: pathlib.Path, given: dict[str, Any]) -> None:
    from bitladder.evaluate import Settings, load_or_compute_base
    from bitladder.text.texts import load_text
    from bitladder.trial import blocks_left_out

    loaded, chunks = load_text(given["text"] or "pydoc:test"), 4 if given["chunks"] == 12 else given["chunks"]
    settings = Settings(
        n_ctx=given["n_ctx"] or 512,
        chunks=chunks,
        threads=given["threads"],
        gpu_layers=given["gpu_layers"],
        n_batch=given["n_batch"],
        n_ubatch=given["n_ubatch"],
    )
    with load_or_compute_base(model, loaded, settings, progress=output.progress) as base:
        found = blocks_left_out(base, settings, chunks=chunks, progress=output.progress)
    ranked = sorted(found, key=lambda one: one.kld.value)
    if output.json:
        output.print_json([{"block": one.block, "kld": one.kld.model_dump(), "bytes": one.bytes} for one in ranked])
        return
    from bitladder.show.plan_tables import prune_table

    output.line(f"{model.name} without one block, {chunks} chunks of {loaded.name}; the least loss first")
    output.print(prune_table(ranked))
    output.line(
        f"least loss: bitladder quantize … --prune-layers {ranked[0].block} (losses of several blocks add up to more "
        "than their sum: prune one, and measure again)"
    )

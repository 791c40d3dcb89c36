"""bitladder quantize."""

import collections
import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

import click

from bitladder.cli import options
from bitladder.errors import UsageError
from bitladder.show.output import Output, common_options

if TYPE_CHECKING:
    from bitladder.quantize import Preflight, Prepared, QuantizeOptions, QuantizeResult
    from bitladder.refine.round import RefineOptions

_PATH = click.Path(path_type=pathlib.Path)


class _FilesInPlace(click.Command):
    """Puts the entries of --tensor-type-file where the file is named: the first pattern that matches decides."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from bitladder.quantize.quantize_options import read_tensor_types

        option, expanded, rest = "--tensor-type-file", list[str](), iter(args)
        for one in rest:
            name, equals, path = one.partition("=")
            if name != option or (not equals and (path := next(rest, "")) == ""):
                expanded.append(one)
                continue
            for entry in read_tensor_types(path):
                expanded += ["--tensor-type", entry]
        return super().parse_args(ctx, expanded)


@click.command("quantize", cls=_FilesInPlace)
@click.argument("preset", required=False)
@click.option("-m", "--model", "source", required=True, type=_PATH, help="F16, BF16 or F32 GGUF.")
@click.option("-o", "--output", "out", type=_PATH, help="File to write; one that exists is replaced.")
@click.option("--imatrix", type=_PATH, help="Importance matrix of the same model.")
@click.option("--recipe", type=_PATH, help="Recipe (TOML): the type of each tensor. PRESET then decides the rest only.")
@click.option(
    "--tensor-type",
    "tensor_types",
    multiple=True,
    metavar="PATTERN=TYPE",
    help="Type of tensors whose name the pattern is found in; the first that matches decides.",
)
@click.option("--tensor-type-file", metavar="FILE", help="Such entries in a file, between spaces or newlines.")
@click.option("--output-tensor-type", metavar="TYPE", help="Type of output.weight.")
@click.option("--token-embedding-type", metavar="TYPE", help="Type of the token embeddings.")
@click.option("--pure", is_flag=True, help="The preset's own type for all tensors, no mixture.")
@click.option("--leave-output-tensor", is_flag=True, help="Keep output.weight as it is.")
@click.option("--allow-requantize", is_flag=True, help="Take a quantized model too; quality suffers.")
@click.option("--include-weights", multiple=True, metavar="NAME", help="Use the imatrix only for these weights.")
@click.option("--exclude-weights", multiple=True, metavar="NAME", help="Do not use the imatrix for these weights.")
@click.option("--override-kv", multiple=True, metavar="KEY=TYPE:VALUE", help="Metadata to set (int, float, bool, str).")
@click.option("--prune-layers", metavar="L0,L1,…", help="Blocks to leave out.")
@click.option("--keep-split", is_flag=True, help="Write the same shards as the input has.")
@click.option("--split-max-size", metavar="SIZE", help="Write shards of at most this size, such as 2G or 1.9GiB.")
@click.option("--no-fallback", is_flag=True, help="Stop where a width cannot hold the type, and use no other instead.")
@click.option(
    "--rounding",
    type=click.Choice(["stock", "feedback", "descent", "best"]),
    default="stock",
    show_default=True,
    help="How blocks are chosen: the library's kernels, or for the layer's output (needs --moments).",
)
@click.option(
    "--moments",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path),
    help="Second moments of the same model, from bitladder calibrate; of several files the mean counts.",
)
@click.option(
    "--sequential",
    multiple=True,
    metavar="TEXT",
    help="Round from block to block, so that later ones make up for earlier ones' errors on this calibration text.",
)
@click.option("--sequential-chunks", default=24, show_default=True, type=click.IntRange(1), help="Chunks of each.")
@click.option("--sequential-blocks", default=5, show_default=True, type=click.IntRange(1), help="Blocks at a time.")
@options.guard("chosen blocks must lower KLD")
@click.option("--dry-run", is_flag=True, help="Show types and the exact size, and write nothing.")
@options.threads
@common_options
def command(
    output: Output,
    preset: str | None,
    source: pathlib.Path,
    out: pathlib.Path | None,
    imatrix: pathlib.Path | None,
    recipe: pathlib.Path | None,
    tensor_types: tuple[str, ...],
    tensor_type_file: None,
    prune_layers: str | None,
    split_max_size: str | None,
    rounding: str,
    moments: tuple[pathlib.Path, ...],
    sequential: tuple[str, ...],
    sequential_chunks: int,
    sequential_blocks: int,
    guard: str,
    guard_chunks: int,
    dry_run: bool,
    threads: int | None,
    **plain: Any,
) -> None:
    """Quantize a full-precision GGUF to PRESET (Q4_K_M, IQ3_S, …) or a recipe.

    Options are llama-quantize's; with the same ones, the same imatrix and library every tensor's bytes equal its own,
    unless --rounding asks for better ones of the same size.
    """
    # Imported here, so that --help does not wait for the native library.
    from bitladder.quantize import QuantizeOptions, check_room, preflight, prepare, refuse_target, write
    from bitladder.quantize.quantize_options import parse_layers, parse_tensor_type
    from bitladder.recipe import read_recipe
    from bitladder.show.preflight_tables import lines, tables
    from bitladder.units import parse_size

    read = read_recipe(recipe) if recipe is not None else None
    wanted = QuantizeOptions(
        preset=preset or (read.preset if read is not None else None),
        types=read.tensors if read is not None else None,
        tensor_types=tuple(parse_tensor_type(text) for text in tensor_types),
        prune_layers=parse_layers(prune_layers) if prune_layers is not None else (),
        split_max_bytes=parse_size(split_max_size, "--split-max-size") if split_max_size is not None else None,
        **plain,
    )
    if out is not None:
        refuse_target(source, out)
    elif not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if rounding != "stock" and not dry_run and out is not None:
        if not moments:
            raise UsageError(
                f"--rounding {rounding} needs second moments: pass --moments (bitladder calibrate makes them)"
            )
        refine = _refine_options(rounding, guard, guard_chunks, threads)
        if sequential:
            refine = _in_order(refine, sequential, sequential_chunks, sequential_blocks)
        _refine(output, source, out, wanted, imatrix, moments, refine, threads)
        return
    if sequential and not dry_run:
        raise UsageError("--sequential belongs to --rounding feedback, descent or best")
    with prepare(source, wanted, imatrix=imatrix, progress=output.progress) as prepared:
        found = preflight(prepared, threads=threads)
        if dry_run or out is None:
            _show_plan(output, prepared, found)
            return
        for part in (*tables(found), *lines(found)):
            output.remark(part)
        check_room(prepared, out)
        _show_result(output, write(prepared, out, threads=threads, progress=output.progress))


def _refine_options(method: Any, guard: str, guard_chunks: int, threads: int | None) -> "RefineOptions":
    from bitladder.evaluate import Settings
    from bitladder.refine.round import RefineOptions
    from bitladder.rounding import RoundingOptions
    from bitladder.text.texts import load_text

    return RefineOptions(
        RoundingOptions(method=method),
        None if guard == "none" else load_text(guard),
        Settings(chunks=guard_chunks, threads=threads),
    )


def _in_order(refine: "RefineOptions", texts: tuple[str, ...], chunks: int, blocks: int) -> "RefineOptions":
    from bitladder.refine.round import Sequential
    from bitladder.text.texts import load_text

    read = tuple(load_text(text) for text in texts)
    return dataclasses.replace(refine, sequential=Sequential(read, chunks, blocks))


def _refine(
    output: Output,
    source: pathlib.Path,
    out: pathlib.Path,
    wanted: "QuantizeOptions",
    imatrix: pathlib.Path | None,
    moments: tuple[pathlib.Path, ...],
    refine: "RefineOptions",
    threads: int | None,
) -> None:
    from bitladder.files import sha256_file
    from bitladder.refine.round import quantize_refined
    from bitladder.refine.round.guard import guard_json
    from bitladder.show.rounding_tables import refine_lines

    made = quantize_refined(
        source, out, wanted, moments, refine, imatrix=imatrix, threads=threads, progress=output.progress
    )
    if output.json:
        result = dataclasses.asdict(made.result) | {"path": made.result.path.name}
        seen = None if made.guard is None else guard_json(made.guard)
        output.print_json(
            result | {"sha256": sha256_file(made.result.path), "guard": seen, "output_errors": made.losses}
        )
        return
    for line in refine_lines(made):
        output.line(line)
    _show_result(output, made.result)


def _show_plan(output: Output, prepared: "Prepared", found: "Preflight") -> None:
    from bitladder.show.preflight_tables import as_json, lines, tables

    if output.json:
        output.print_json(as_json(found) | {"types": prepared.choice.types})
        return
    for table in tables(found):
        output.print(table)
    for line in lines(found):
        output.line(line)


def _show_result(output: Output, result: "QuantizeResult") -> None:
    from bitladder.files import sha256_file

    if output.json:
        output.print_json(dataclasses.asdict(result) | {"path": result.path.name, "sha256": sha256_file(result.path)})
        return
    used = collections.Counter(result.types.values()).most_common()
    kinds = ", ".join(f"{count} × {kind}" for kind, count in used)
    bpw = f"{result.bpw:.4f} bpw, {result.bpw_blocks:.4f} in the blocks"
    output.line(f"{result.path}: {result.bytes} bytes, {bpw} ({kinds})")

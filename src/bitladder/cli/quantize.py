"""A model in fewer bits: `quantize`, `verify` (makes the tensors of a quant again) and `tune` (moves its scales)."""

import collections
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from bitladder.cli import options as shared
from bitladder.cli.options import options_from, warn_unused
from bitladder.cli.outputs import Command, OutputPath, check_output, note_input
from bitladder.cli.typed import INPUT, PLACE, TEXT, Presets, Whole
from bitladder.engine import Decoding
from bitladder.errors import BitladderError, UsageError
from bitladder.files import sha256_file
from bitladder.gguf import open_model, output_paths, plain_path
from bitladder.quantize import QuantizeOptions, parse_layers
from bitladder.recipe import read_recipe, read_tensor_types
from bitladder.refine import GuardOptions, ModelFiles, RefineOptions, TuneOptions
from bitladder.rounding import RoundingOptions
from bitladder.show import Output, common_options
from bitladder.text import load_text
from bitladder.units import number_of, parse_size

if TYPE_CHECKING:
    from bitladder.quantize import Preflight, PreparedQuant, QuantizeResult
    from bitladder.refine import RoundedQuant, VerifiedQuant

_UNQUANTIZED = ("F16", "BF16", "F32", "ALL_F32", "COPY")


class _Quantize(Command):
    """Puts the entries of --tensor-type-file where the file is named: the first pattern that matches decides.

    IN OUT PRESET [THREADS], the form of llama-quantize, becomes options.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        expanded, rest = list[str](), iter(args)
        for word in rest:
            name, equals, path = word.partition("=")
            if name != "--tensor-type-file" or (not equals and (path := next(rest, "")) == ""):
                expanded.append(word)
                continue
            note_input(ctx, name, path)
            for entry in read_tensor_types(path):
                expanded += ["--tensor-type", entry]
        left = super().parse_args(ctx, expanded)
        words = ctx.params["words"]
        if len(words) > 1 and not ctx.resilient_parsing:
            ctx.params |= _as_llama_quantize(words, ctx.params)
        return left


def _written(params: Mapping[str, Any]) -> str:
    """A preset without quantized types, or a recipe, can make a full-precision model."""
    plain = "".join(params["words"]).upper() in _UNQUANTIZED
    return "model" if plain or params["recipe"] is not None else "quant"


# A parameter for each option that stands for itself.
@click.command(
    "quantize",
    cls=_Quantize,
    page="quantize.md",
    examples=(
        "quantize Q4_K_M -m model-F16.gguf -o model-Q4_K_M.gguf --imatrix imatrix.gguf",
        "quantize -m model-F16.gguf -o model.gguf --recipe model.toml --imatrix imatrix.gguf",
    ),
)
@click.argument("words", nargs=-1, type=Presets(), metavar="[PRESET]")
@click.option("-m", "--model", "source", type=INPUT, help="F16, BF16 or F32 GGUF.")
@click.option("-o", "--output", "out", type=OutputPath(_written), help="File to write. An existing file is replaced.")
@click.option("--imatrix", type=INPUT, help="Importance matrix of the same model.")
@click.option("--recipe", type=INPUT, help="Recipe (TOML): the type of each tensor. PRESET decides the others.")
@click.option("--tensor-type-file", metavar="FILE", help="Entries of --tensor-type in a file, separated by whitespace.")
@options_from(QuantizeOptions)
@click.option("--prune-layers", metavar="L0,L1,…", help="Blocks to leave out.")
@click.option("--split-max-size", metavar="SIZE", help="Write shards of at most this size, such as 2G or 1.9GiB.")
@options_from(RoundingOptions, parameter="rounding", method="stock")
@click.option(
    "--moments",
    multiple=True,
    type=INPUT,
    help="Second moments of the same model, from bitladder calibrate. Several files are averaged. Can be repeated.",
)
@shared.guard("rounded blocks must lower KLD")
@options_from(GuardOptions, parameter="trying")
@click.option("--dry-run", is_flag=True, help="Show the types and the exact size. Write nothing.")
@options_from(Decoding, parameter="decoding", leave_out=("n_ctx", "n_batch", "n_ubatch"))
@common_options
@shared.effort
def quantize_command(
    output: Output,
    words: tuple[str, ...],
    source: pathlib.Path | None,
    out: pathlib.Path | None,
    imatrix: pathlib.Path | None,
    recipe: pathlib.Path | None,
    tensor_type_file: None,  # _Quantize has read it
    options: QuantizeOptions,
    prune_layers: str | None,
    split_max_size: str | None,
    rounding: RoundingOptions,
    moments: tuple[pathlib.Path, ...],
    guard: str,
    trying: GuardOptions,
    dry_run: bool,
    decoding: Decoding,
) -> None:
    """Quantize a full-precision GGUF to PRESET (Q4_K_M, IQ3_S, …) or a recipe.

    The options are llama-quantize's. With the same options, imatrix and library every tensor's bytes equal those of
    llama-quantize, unless --rounding chooses better blocks of the same size. Its own form works too:
    bitladder quantize IN.gguf OUT.gguf PRESET [THREADS].
    """
    from bitladder.quantize import check_room, preflight, prepare, write
    from bitladder.show import preflight_lines, preflight_tables

    if source is None:
        raise click.UsageError("Missing option '-m' / '--model'.")
    preset = words[0] if words else None
    read = read_recipe(recipe) if recipe is not None else None
    options = options.replace(
        preset=read.preset if preset is None and read is not None else preset,
        types=None if read is None else read.tensors,
        prune_layers=() if prune_layers is None else parse_layers(prune_layers),
        split_max_bytes=None if split_max_size is None else parse_size(split_max_size, "--split-max-size"),
    )
    if out is not None:
        check_output(plain_path(out), _written({"words": words, "recipe": recipe}))
    elif not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if rounding.method == "stock":
        idle = {"moments", "guard", "guard_chunks", "device", "gpu_layers", "effort"}
        warn_unused(output, "with --rounding stock, which is the default", idle)
    elif guard == "none":
        warn_unused(output, "with --guard none", {"guard_chunks", "gpu_layers"})
    if rounding.method != "stock" and not dry_run and out is not None:
        if not moments:
            raise UsageError(
                f"--rounding {rounding.method} needs second moments: pass --moments (bitladder calibrate makes them)"
            )
        from bitladder.refine import quantize_rounded  # numba takes a while to import

        quant = quantize_rounded(
            ModelFiles(source, imatrix, moments),
            out,
            options,
            RefineOptions(rounding=rounding, guard=trying),
            None if guard == "none" else load_text(guard, source),
            decoding,
            progress=output.progress,
        )
        _show_result(output, quant.result, quant)
        return
    with prepare(source, options, imatrix=imatrix, progress=output.progress) as prepared:
        figures = preflight(prepared, threads=decoding.threads)
        if dry_run or out is None:
            _show_preflight(output, prepared, figures)
            return
        for part in (*preflight_tables(figures), *preflight_lines(figures)):
            output.remark(part)
        for path in output_paths(out, prepared.groups):
            check_output(path, _written({"words": words, "recipe": recipe}))
        check_room(prepared, out)
        _show_result(output, write(prepared, out, threads=decoding.threads, progress=output.progress))


def _as_llama_quantize(words: tuple[str, ...], params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that IN OUT PRESET [THREADS] means. Raises UsageError if some are options too."""
    options = ("source", "out", *(("threads",) if len(words) == 4 else ()))
    if len(words) not in (3, 4) or any(params[name] is not None for name in options):
        forms = "PRESET -m IN.gguf -o OUT.gguf, or IN.gguf OUT.gguf PRESET [THREADS]"
        raise UsageError(f"{' '.join(words)}: write {forms}")
    if not pathlib.Path(words[0]).is_file():
        raise UsageError(f"{words[0]}: no such file")
    values = {"source": pathlib.Path(words[0]), "out": pathlib.Path(words[1]), "words": (words[2],)}
    if len(words) == 3:
        return values
    if not words[3].isdecimal() or int(words[3]) < 1:
        raise UsageError(f"{words[3]} is no number of threads; write IN.gguf OUT.gguf PRESET [THREADS]")
    return values | {"threads": int(words[3])}


def _show_preflight(output: Output, prepared: "PreparedQuant", figures: "Preflight") -> None:
    from bitladder.show import preflight_json, preflight_lines, preflight_tables

    if output.json:
        output.print_json(preflight_json(figures) | {"types": prepared.choice.types})
        return
    for table in preflight_tables(figures):
        output.print(table)
    for line in preflight_lines(figures):
        output.line(line)


def _show_result(output: Output, result: "QuantizeResult", rounded: "RoundedQuant | None" = None) -> None:
    from bitladder.show import result_line, rounding_json, rounding_lines

    if output.json:
        facts = dataclasses.asdict(result) | {"path": result.path.name, "sha256": sha256_file(result.path)}
        output.print_json(facts | ({} if rounded is None else rounding_json(rounded)))
        return
    for line in () if rounded is None else rounding_lines(rounded):
        output.line(line)
    output.line(result_line(result))


@click.command(
    "verify",
    cls=Command,
    page="quantize.md",
    examples=(
        "verify model-Q4_K_M.gguf -m model-F16.gguf --imatrix imatrix.gguf",
        "verify olmo2-ladder --sample 20",
    ),
)
@click.argument("quant", metavar="QUANT|RUN_DIR", type=PLACE)
@click.option(
    "-m",
    "--model",
    "source",
    type=INPUT,
    help="The full-precision GGUF that QUANT was made from; of a run, if it was given one.",
)
@click.option("--imatrix", type=INPUT, help="The importance matrix that QUANT was made with.")
@click.option(
    "--moments",
    type=INPUT,
    multiple=True,
    help="The second moments that QUANT was made with, if it was made with --rounding. Can be repeated.",
)
@click.option(
    "--sample",
    type=Whole(1),
    metavar="N",
    help="Tensors of each quant, drawn at random, other ones each time.  [default: all]",
)
@shared.threads
@common_options
def verify_command(
    output: Output,
    quant: pathlib.Path,
    source: pathlib.Path | None,
    imatrix: pathlib.Path | None,
    moments: tuple[pathlib.Path, ...],
    sample: int | None,
    threads: int | None,
) -> None:
    """Make tensors of QUANT, or of all rungs of RUN_DIR, again and compare the bytes.

    The exit code is 1 if a tensor differs. A run has in its directory what its rungs were made of.
    """
    if quant.is_dir():
        if imatrix or moments:
            raise UsageError(
                "a run has its own importance matrix and second moments: leave --imatrix and --moments out"
            )
        from bitladder.ladder import verify_run

        rungs = verify_run(quant, model=source, sample=sample, threads=threads, progress=output.progress)
        if output.json:
            output.print_json(
                {"run": quant.resolve().name, "rungs": {rung: _verified_json(rungs[rung]) for rung in rungs}}
            )
        for rung, verified in rungs.items():
            _show_verified(output, rung, verified)
        differing = {f"{rung} {name}": name for rung in rungs for name in rungs[rung].differing}
        _refuse_differing(list(differing), f"the rungs of {quant}", "the files of the run")
        return
    if source is None:
        raise UsageError("name the full-precision GGUF that the quant was made from with -m")
    shared.warn_if_quantized(output, "-m", source)
    with open_model(quant) as file:
        used = file.get("quantize.imatrix.file")
    if used is not None and imatrix is None:
        raise UsageError(f"{quant} was made with the importance matrix {used}: name it with --imatrix")
    from bitladder.refine import verify

    verified = verify(
        quant, source, imatrix=imatrix, moments=moments, sample=sample, threads=threads, progress=output.progress
    )
    if output.json:
        output.print_json({"quant": quant.name, **_verified_json(verified)})
    _show_verified(output, str(quant), verified)
    _refuse_differing(verified.differing, str(quant), f"{source} and these files")


def _verified_json(verified: "VerifiedQuant") -> dict[str, object]:
    return {"tensors": verified.origins, "differing": verified.differing}


def _show_verified(output: Output, name: str, verified: "VerifiedQuant") -> None:
    if not output.json:
        counts = collections.Counter(verified.origins.values()).most_common()
        ways = (f"{count} {'different' if way == 'differs' else way}" for way, count in counts)
        output.line(f"{name}, tensors: {', '.join(ways)}")


def _refuse_differing(differing: list[str], what: str, made_of: str) -> None:
    if differing:
        some = ", ".join(differing[:4]) + (", …" if len(differing) > 4 else "")
        raise BitladderError(
            f"{number_of(len(differing), 'tensor')} of {what} cannot be made from {made_of} ({some}); another imatrix, "
            "other options or another version of the library made them"
        )


@click.command(
    "tune",
    cls=Command,
    page="tune.md",
    examples=("tune model-Q4_K_M.gguf -m model-F16.gguf -o tuned.gguf -f calibration.txt",),
)
@click.argument("quant", type=INPUT)
@click.option("-m", "--model", required=True, type=INPUT, help="The full-precision GGUF that QUANT was made from.")
@click.option("-o", "--output", "out", required=True, type=OutputPath("quant"), help="GGUF to write.")
@click.option(
    "-f", "--file", "files", multiple=True, required=True, type=TEXT, help="Calibration text. Can be repeated."
)
@options_from(TuneOptions, tune_chunks=64)
@shared.guard("KLD must fall")
@options_from(Decoding, parameter="decoding", leave_out=("n_batch", "n_ubatch"))
@common_options
def tune_command(
    output: Output,
    quant: pathlib.Path,
    model: pathlib.Path,
    out: pathlib.Path,
    files: tuple[str, ...],
    options: TuneOptions,
    guard: str,
    decoding: Decoding,
) -> None:
    """Tune the scales of QUANT for the predictions of the whole model: same types and size, lower KLD.

    The F16 numbers of blocks move along the gradient of the KLD from the full-precision model. The integers do not
    change. Needs torch (pip install 'bitladder[torch]').
    """
    from bitladder.refine import tune

    if guard == "none":
        warn_unused(output, "with --guard none", {"tune_guard_chunks", "gpu_layers"})
    texts = [load_text(spec, model) for spec in files]
    held_out = None if guard == "none" else load_text(guard, model)
    if held_out is not None and held_out.sha256 in {text.sha256 for text in texts}:
        raise UsageError(f"--guard {guard} is also a calibration text; name another text")
    shared.warn_if_quantized(output, "-m", model)
    tuned = tune(model, quant, out, texts, held_out, options, decoding, output.progress)
    if output.json:
        facts = dataclasses.asdict(tuned) | {"path": out.name, "sha256": sha256_file(out)}
        facts |= {
            key: figure.model_dump() for key in ("before", "after", "difference") if (figure := getattr(tuned, key))
        }
        output.print_json(facts)
        return
    output.line(f"{out}: {number_of(tuned.steps, 'step')} of {tuned.n_ctx} tokens")
    if tuned.before and tuned.after and tuned.difference:
        before, after, gap = tuned.before, tuned.after, tuned.difference
        output.line(
            f"held-out text: KLD {before.value:.5f} ± {before.error:.5f} before, {after.value:.5f} ± {after.error:.5f} "
            f"tuned (difference {gap.value:+z.5f} ± {gap.error:.5f}, paired)"
        )
    else:
        output.line("not checked on held-out text (--guard none)")
    if not tuned.kept:
        output.line("no gain: the file is a copy of QUANT")

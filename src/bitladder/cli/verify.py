"""bitladder verify."""

import collections
import pathlib
from typing import TYPE_CHECKING

import click

from bitladder.cli import options
from bitladder.cli.outputs import Command
from bitladder.cli.typed import INPUT, PLACE
from bitladder.errors import BitladderError, UsageError
from bitladder.gguf import open_model
from bitladder.show import Output, common_options

if TYPE_CHECKING:
    from bitladder.refine import VerifiedQuant


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
    help="The second moments that QUANT was made with, if it was made with --rounding.",
)
@click.option(
    "--sample",
    type=click.IntRange(1),
    metavar="N",
    help="Tensors of each quant, drawn at random, other ones each time.  [default: all]",
)
@options.threads
@common_options
def command(
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
            output.print_json({"run": quant.resolve().name, "rungs": {rung: _json(rungs[rung]) for rung in rungs}})
        for rung, verified in rungs.items():
            _tell(output, rung, verified)
        differing = {f"{rung} {name}": name for rung in rungs for name in rungs[rung].differing}
        _refuse(list(differing), f"the rungs of {quant}", "the files of the run")
        return
    if source is None:
        raise UsageError("name the full-precision GGUF that the quant was made from with -m")
    options.warn_if_quantized(output, "-m", source)
    with open_model(quant) as file:
        used = file.get("quantize.imatrix.file")
    if used is not None and imatrix is None:
        raise UsageError(f"{quant} was made with the importance matrix {used}: name it with --imatrix")
    from bitladder.refine import verify

    verified = verify(
        quant, source, imatrix=imatrix, moments=moments, sample=sample, threads=threads, progress=output.progress
    )
    if output.json:
        output.print_json({"quant": quant.name, **_json(verified)})
    _tell(output, str(quant), verified)
    _refuse(verified.differing, str(quant), f"{source} and these files")


def _json(verified: "VerifiedQuant") -> dict[str, object]:
    return {"tensors": verified.origins, "differing": verified.differing}


def _tell(output: Output, name: str, verified: "VerifiedQuant") -> None:
    if not output.json:
        counts = collections.Counter(verified.origins.values()).most_common()
        ways = (f"{count} {'differ' if way == 'differs' else way}" for way, count in counts)
        output.line(f"{name}, tensors: {', '.join(ways)}")


def _refuse(differing: list[str], what: str, made_of: str) -> None:
    if differing:
        some = ", ".join(differing[:4]) + (", …" if len(differing) > 4 else "")
        raise BitladderError(
            f"{len(differing)} tensors of {what} cannot be made from {made_of} ({some}); another imatrix, other "
            "options or another version of the library made them"
        )

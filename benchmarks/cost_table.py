"""What runs of larger models take by the formulas of docs/cost.md: its table and README's, as Markdown.

    python benchmarks/cost_table.py            # prints them
    python benchmarks/cost_table.py --write    # writes them into README.md and docs/cost.md, between their marks

Nothing is measured. Shapes are those of published models, made from the numbers of their config.json. Seconds are those
of eight reference cores; with fewer bytes of memory than threads need for rounding, fewer of them round.

With a GPU (`GPU`), the layers that fit into its memory are decoded at its published rates. All else is the work of the
same cores: rounding, gradients, the library's blocks, divergences, and the products of the head with the base.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import tempfile
from collections.abc import Iterator
from unittest import mock

import click

from bitladder.ladder import Estimate, Machine, RunOptions, cost
from bitladder.ladder.estimate import estimate_steps, extent_of, shape_of
from bitladder.ladder.model_shape import ModelShape
from bitladder.ladder.plan import steps_of
from bitladder.ladder.steps import bench, imatrix
from bitladder.options import build
from bitladder.quantize import RUNGS
from bitladder.text import Text, builtin_text, load_text

THREADS, MEMORY = 8, 25 * 10**9
MACHINES = (16, 32, 64, 128, 256)  # GB
ROOT = pathlib.Path(__file__).parent.parent
FULL_BITS, QUANT_BITS = 16, 4.9  # of a weight
# width, blocks, heads, heads of keys, width of the feed-forward network, tokens, whether the head is the embedding
MODELS = {
    "1B (OLMo-2)": (2048, 16, 16, 16, 8192, 100_352, False),
    "3B (Llama 3.2)": (3072, 28, 24, 8, 8192, 128_256, True),
    "7B (OLMo-2)": (4096, 32, 32, 32, 11_008, 100_352, False),
    "8B (Llama 3)": (4096, 32, 32, 8, 14_336, 128_256, False),
    "13B (OLMo-2)": (5120, 40, 40, 40, 13_824, 100_352, False),
    "32B (OLMo-2)": (5120, 64, 40, 8, 27_648, 100_352, False),
    "70B (Llama 3)": (8192, 80, 64, 8, 28_672, 128_256, False),
}
IN_README = ("1B", "3B", "7B", "13B", "32B")
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "vocab_size", "tie_word_embeddings")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, by what its maker publishes.

    Parameters:
        name: of the card.
        products: operations a second in products of float16 matrices, summed in float32.
        bandwidth: bytes a second of its memory.
        memory: bytes.
        bus: bytes a second between it and the CPU.
        used: share of its memory that holds layers.
    """

    name: str
    products: float
    bandwidth: float
    memory: float
    bus: float
    used: float = 0.9

    def share(self, shape: ModelShape, bits: float) -> float:
        """The share of the layers that fits, of a file with so many bits a weight."""
        return min(1.0, self.used * self.memory / (shape.weights * bits / 8))


GPU = Gpu("RTX 4090", products=165e12, bandwidth=1008e9, memory=24e9, bus=25e9)


@contextlib.contextmanager
def on_gpu(gpu: Gpu, shape: ModelShape) -> Iterator[None]:
    """While this is open, formulas of what the library decodes are those of a GPU with the CPU."""
    decoding, full, quant_share = cost.decoding, gpu.share(shape, FULL_BITS), gpu.share(shape, QUANT_BITS)

    def time(share: float, cpu: float = 1.0) -> float:
        """Time of what is decoded, of that on the CPU in full precision."""
        return share * THREADS * cost.PRODUCTS / gpu.products + (1 - share) / cpu

    def decoded(shape: ModelShape, tokens: float, n_ctx: int, logits: float = 0.5) -> float:
        seconds = time(full) * decoding(shape, tokens, n_ctx, logits)
        if logits == 0:  # inputs are added up by the CPU
            inputs = sum(matrix.count * matrix.share * matrix.width for matrix in shape.inputs)
            seconds += THREADS * tokens * 4 * inputs / gpu.bus
        return seconds

    def compared(
        shape: ModelShape, tokens: float, n_ctx: int, *, quant: bool = False, scored: float = cost.SCORED
    ) -> float:
        seconds = time(quant_share, cost.quant_speed(shape)) if quant else time(full)
        head = tokens * scored * 2 * shape.head / cost.BLAS
        return seconds * decoding(shape, tokens, n_ctx, scored) + 2 * cost.scoring(shape, tokens * scored) + head

    # A generated token reads the file once. Its time is counted in those of a token of a prompt.
    token = 2 * shape.active * cost.BESIDE / gpu.products
    generated = shape.weights * FULL_BITS / 8 / gpu.bandwidth / token if full == 1 else bench.GENERATED
    with (
        mock.patch.object(cost, "decoding", decoded),
        mock.patch.object(cost, "comparing", compared),
        mock.patch.object(bench, "GENERATED", generated),
        mock.patch.object(imatrix, "WATCHED", 1.0),
    ):
        yield


def estimated(
    options: RunOptions, texts: list[Text], calibration: list[Text], memory: int = MEMORY, threads: int = THREADS
) -> Estimate:
    """What a run takes on so many reference cores with so much memory."""
    shape = shape_of(options.model)
    extent = extent_of(options, shape, texts, calibration, {}, models=1 + len(options.rungs))
    extent = dataclasses.replace(
        extent, rounding_threads=cost.rounding_threads(shape, threads, memory), threads=threads
    )
    return estimate_steps(steps_of(options), extent, Machine(threads=threads))


def of_size(tokens: int) -> Text:
    """A text of so many tokens, by the length that a token is taken to have."""
    return Text.of("text", builtin_text("calibration")[:1] * 4 * tokens)


def cost_row(name: str, model: str) -> str:
    """A row of docs/cost.md: core hours of a rung and of the ladder, and memory, for each effort."""
    cells = []
    for effort in ("fast", "normal", "high"):
        totals = []
        for rungs in (("Q4_K_M",), RUNGS):
            options = build(RunOptions, {"model": model, "out": pathlib.Path("ladder"), "rungs": rungs})
            totals.append(estimated(options.at_effort(effort), [of_size(320_000)], [of_size(200_000)]))
        memory = max(total.memory_bytes for total in totals)
        cells += [", ".join(hours(total.core_seconds) for total in totals), f"{memory / 1e9:,.0f} GB"]
    return f"| {name} | {' | '.join(cells)} |"


def hours(seconds: float) -> str:
    """Seconds as hours, with two digits at least."""
    number = seconds / 3600
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"


def span(seconds: float) -> str:
    """Minutes, from an hour on hours."""
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{hours(seconds)} h"


def readme_row(name: str, model: str, rungs: tuple[str, ...] = ("Q4_K_M",)) -> tuple[str, list[str]]:
    """A row of the README: a machine, memory, disk and hours of some rungs with the built-in texts; and the hours.

    The machine is the smallest of `MACHINES` in which the run fits. Hours with a GPU are in brackets.
    """
    base = build(RunOptions, {"model": model, "out": pathlib.Path("ladder"), "rungs": rungs})
    texts, calibration = [load_text(spec) for spec in base.texts], [load_text(spec) for spec in base.calibration]
    ways = (base.at_effort("fast"), base, base.at_effort("high").replace(tune_chunks=0))
    for machine in MACHINES:
        totals = [estimated(options, texts, calibration, machine * 10**9) for options in ways]
        memory, disk = (max(getattr(total, name) for total in totals) for name in ("memory_bytes", "disk_bytes"))
        if memory <= machine * 10**9:
            break
    with on_gpu(GPU, shape_of(model)):
        faster = [estimated(options, texts, calibration, machine * 10**9) for options in ways]
    times = [span(total.seconds) for total in totals]
    cells = [f"{time} ({span(total.seconds)})" for time, total in zip(times, faster, strict=True)]
    sizes = f"{machine} GB | {memory / 1e9:.0f} GB | {disk / 1e9:.0f} GB"
    return f"| {name.split(maxsplit=1)[0]} | {sizes} | {' | '.join(cells)} |", [*times, f"{disk / 1e9:.0f} GB"]


README_HEAD = """\
| weights | machine | memory | disk | `--effort fast` | normal, the default | `--effort high --tune-chunks 0` |
|--:|--:|--:|--:|--:|--:|--:|"""
COST_HEAD = """\
| model | fast: rung, ladder | memory | normal: rung, ladder | memory | high: rung, ladder | memory |
|---|--:|--:|--:|--:|--:|--:|"""


def tables() -> dict[str, str]:
    """The text between the marks of each page, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        models = {name: str(pathlib.Path(folder, name.split()[0])) for name in MODELS}
        for name, numbers in MODELS.items():
            pathlib.Path(models[name]).mkdir()
            config = pathlib.Path(models[name], "config.json")
            config.write_text(json.dumps(dict(zip(KEYS, numbers, strict=True))))
        readme = [readme_row(name, model)[0] for name, model in models.items() if name.split()[0] in IN_README]
        *times, disk = readme_row("7B", models["7B (OLMo-2)"], RUNGS)[1]
        whole = f"All twelve rungs of a 7B take {times[0]}, {times[1]} and {times[2]}, and {disk} of disk."
        rows = [cost_row(name, model) for name, model in models.items()]
    return {
        "README.md": "\n".join([README_HEAD, *readme, "", whole]),
        "docs/cost.md": "\n".join([COST_HEAD, *rows]),
    }


def written(page: str, table: str, name: str = "cost_table.py") -> str:
    """A page with the table between the marks of a benchmark."""
    marks = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
    text, count = re.subn(marks, lambda match: f"{match[1]}\n{table}\n\n{match[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise click.ClickException(f"the page has no marks <!-- {name} --> and <!-- end -->")
    return text


@click.command()
@click.option("--write", is_flag=True, help="Write the tables into README.md and docs/cost.md.")
def main(write: bool) -> None:
    """Prints both tables."""
    for name, table in tables().items():
        path = ROOT / name
        if write:
            path.write_text(written(path.read_text(encoding="utf-8"), table), encoding="utf-8")
        else:
            click.echo(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()

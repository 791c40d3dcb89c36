"""What runs of larger models take by the formulas of docs/cost.md: its table and README's, as Markdown.

    python benchmarks/cost_table.py

Nothing is measured. Shapes are those of published models, made from the numbers of their config.json. Seconds are those
of eight reference cores; with fewer bytes of memory than threads need for rounding, fewer of them round.
"""

import dataclasses
import json
import math
import pathlib
import tempfile
from collections.abc import Collection

import click

from bitladder.ladder import Estimate, Machine, RunOptions, cost
from bitladder.ladder.estimate import estimate_steps, extent_of, shape_of
from bitladder.ladder.plan import steps_of
from bitladder.options import build
from bitladder.quantize import RUNGS
from bitladder.text import Text, builtin_text, load_text

THREADS, MEMORY = 8, 25 * 10**9
MACHINES = (16, 32, 64, 128, 256)  # GB
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
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "vocab_size", "tie_word_embeddings")  # fmt: skip


def estimated(
    options: RunOptions, texts: list[Text], calibration: list[Text], memory: int = MEMORY, rates: Collection[str] = ()
) -> Estimate:
    """What a run takes on reference cores with so much memory; of the parts with some rates only, if there are any."""
    shape = shape_of(options.model)
    extent = extent_of(options, shape, texts, calibration, {}, models=1 + len(options.rungs))
    extent = dataclasses.replace(
        extent, rounding_threads=cost.rounding_threads(shape, THREADS, memory), threads=THREADS
    )
    fast = {rate: math.inf for rate in ("products", "blas", "kernels") if rates and rate not in rates}
    return estimate_steps(steps_of(options), extent, Machine(threads=THREADS, **fast))


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


def readme_row(name: str, model: str, rungs: tuple[str, ...] = ("Q4_K_M",)) -> str:
    """A row of the README: a machine, memory, disk and hours of some rungs with the built-in texts.

    The machine is the smallest of `MACHINES` in which the run fits. A GPU takes over matrix products of the library.
    """
    base = build(RunOptions, {"model": model, "out": pathlib.Path("ladder"), "rungs": rungs})
    texts, calibration = [load_text(spec) for spec in base.texts], [load_text(spec) for spec in base.calibration]
    ways = (base.at_effort("fast"), base.replace(method="stock"), base.replace(tune_chunks=0))
    for machine in MACHINES:
        totals = [estimated(options, texts, calibration, machine * 10**9) for options in ways]
        memory, disk = (max(getattr(total, name) for total in totals) for name in ("memory_bytes", "disk_bytes"))
        if memory <= machine * 10**9:
            break
    totals.append(estimated(ways[-1], texts, calibration, machine * 10**9, ("blas", "kernels")))
    times = " | ".join(f"{hours(total.seconds)} h" for total in totals)
    return f"| {name.split(maxsplit=1)[0]} | {machine} GB | {memory / 1e9:.0f} GB | {disk / 1e9:.0f} GB | {times} |"


@click.command()
def main() -> None:
    """Prints both tables."""
    with tempfile.TemporaryDirectory() as folder:
        for row in (readme_row, cost_row):
            for name, numbers in MODELS.items():
                path = pathlib.Path(folder, name.split()[0])
                path.mkdir(exist_ok=True)
                (path / "config.json").write_text(json.dumps(dict(zip(KEYS, numbers, strict=True))))
                click.echo(row(name, str(path)))
            click.echo()
        click.echo(f"all rungs: {readme_row('7B', str(pathlib.Path(folder, '7B')), RUNGS)}")


if __name__ == "__main__":
    main()

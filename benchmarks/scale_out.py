"""What runs of very large models take on several machines, by the formulas of docs/cost.md, as Markdown.

    python benchmarks/scale_out.py            # prints the table
    python benchmarks/scale_out.py --write    # writes it into docs/scale-out.md, between its marks

Nothing is measured. Shapes are made from numbers of a config.json; a core is the reference core of docs/cost.md. Work
of a kind is divided by the machines that it can be spread over: a rung is quantized by one machine, and tensors are
rounded by any number.
"""

import json
import pathlib
import tempfile

import click
import cost_table

from bitladder.ladder import RunOptions, Stage
from bitladder.options import build
from bitladder.quantize import RUNGS

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "scale-out.md"
MACHINES, CORES = (1, 4, 12), 32
MEMORY = {"70B": 512 * 10**9, "1T": 4096 * 10**9}  # bytes of each machine
# hidden_size and the like, as in cost_table.MODELS; then experts, those of a token, and the width of each
MODELS = {
    "70B": (8192, 80, 64, 8, 28_672, 128_256, False),
    "1T": (7168, 61, 64, 64, 18_432, 163_840, False),
}
EXPERTS = {"1T": {"n_routed_experts": 384, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "head_dim": 112}}
# The kinds of steps, and over how many machines one is spread at most: None for any number.
KINDS: dict[str, tuple[str, int | None]] = {
    "base": ("base, imatrix, second moments", 1),
    "imatrix": ("base, imatrix, second moments", 1),
    "moments": ("base, imatrix, second moments", 1),
    "smooth": ("smoothed model", 1),
    "trial": ("trials of smoothing", len(RUNGS)),
    "price": ("prices", None),
    "plan": ("recipes of rungs", len(RUNGS)),
    "preset": ("plain presets", len(RUNGS)),
    "naive": ("plain presets", len(RUNGS)),
    "round": ("rounded tensors", None),
    "quantize": ("guard and files of rungs", len(RUNGS)),
    "measure": ("measured rungs", len(RUNGS)),
}


def stages(model: str, name: str, *, effort: str) -> tuple[list[Stage], float]:
    """What each step of twelve rungs takes on one machine, and the bytes of the disk."""
    options = build(RunOptions, {"model": model, "out": pathlib.Path("ladder"), "rungs": RUNGS, "bench": False})
    options = options.at_effort(effort).replace(tune_chunks=0)
    texts = [cost_table.of_size(320_000)], [cost_table.of_size(200_000)]
    total = cost_table.estimated(options, *texts, MEMORY[name], CORES)
    return list(total.stages), total.disk_bytes


def rows(model: str, name: str, *, effort: str) -> list[str]:
    """The rows of a model: kind of work, core hours, and hours on so many machines."""
    found, disk = stages(model, name, effort=effort)
    kinds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    for stage in found:
        kind, most = KINDS.get(stage.name.split()[0], ("the rest", 1))
        line = kinds.setdefault(kind, [0.0] * (1 + len(MACHINES)))
        line[0] += stage.core_seconds / 3600
        for place, count in enumerate(MACHINES, 1):
            line[place] += stage.seconds / 3600 / min(count, most or count)
        memory[kind] = max(memory.get(kind, 0.0), stage.memory_bytes)
    kinds["together"] = [sum(line[place] for line in kinds.values()) for place in range(1 + len(MACHINES))]
    memory["together"] = max(memory.values())
    shown = [
        f"| {name} | {kind} | {line[0]:,.0f} | {memory[kind] / 1e9:,.0f} GB | "
        + " | ".join(f"{hours:,.1f}" for hours in line[1:])
        + " |"
        for kind, line in kinds.items()
        if line[0] >= 0.5
    ]
    return [*shown, f"| {name} | disk: {disk / 1e12:.1f} TB | | | | | |"]


HEAD = "| model | work | core hours | memory | " + " | ".join(f"{count} × {CORES}" for count in MACHINES) + " |"


def table() -> str:
    """The table."""
    lines = [HEAD, "|---|---|--:|--:|" + "--:|" * len(MACHINES)]
    with tempfile.TemporaryDirectory() as folder:
        for name, numbers in MODELS.items():
            place = pathlib.Path(folder, name)
            place.mkdir()
            values = dict(zip(cost_table.KEYS, numbers, strict=True)) | EXPERTS.get(name, {})
            (place / "config.json").write_text(json.dumps(values))
            lines += rows(str(place), name, effort="normal")
    return "\n".join(lines)


@click.command()
@click.option("--write", is_flag=True, help="Write the table into docs/scale-out.md.")
def main(write: bool) -> None:
    """Prints the table."""
    if not write:
        click.echo(table())
        return
    page = cost_table.written(PAGE.read_text(encoding="utf-8"), table(), "scale_out.py")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

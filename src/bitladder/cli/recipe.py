"""bitladder recipe."""

import pathlib

import click

from bitladder import recipe as recipes
from bitladder.cli.outputs import Command, OutputPath
from bitladder.cli.typed import INPUT, NamingGroup
from bitladder.errors import BitladderError
from bitladder.files import write_text
from bitladder.gguf import open_model
from bitladder.show import Output, common_options, difference, recipe_tables

_model = click.option("-m", "--model", type=INPUT, help="The model's full-precision GGUF, for shapes and checks.")


@click.group("recipe", cls=NamingGroup, context_settings={"help_option_names": ["-h", "--help"]})
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
        output.line(f"{checked.size.bytes:,} bytes of tensors, {checked.size.bpw:.4f} bpw")
    if checked.problems:
        count = f"{checked.problems} problem{'s' if checked.problems > 1 else ''}"
        raise BitladderError(f"{recipe}: {count} with {model.name}")


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

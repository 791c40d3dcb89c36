"""Recipes, the difference of two, and quants before and after they are written, as tables, lines and JSON."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from bitladder.engine import type_by_name
from bitladder.errors import BitladderError
from bitladder.gguf import block_of, in_main_block, kind_of, name_in_block, one_line, ranges, reading_order
from bitladder.quantize import Fallback, Preflight, QuantizeResult
from bitladder.recipe import RECIPE_KEY, Recipe, RecipeDiff, Shapes, Size, block_size, recipe_sha256, size_of
from bitladder.show.table import Column, Table
from bitladder.units import number_of

if TYPE_CHECKING:  # numba, which rounding needs, takes a while to import
    from bitladder.evaluate import Figure
    from bitladder.refine import GuardTrial, RoundedQuant

_ARROWS = {"up": ("▲", "green"), "down": ("▼", "red"), "level": ("=", "")}
SHOWN = 6  # names in a cell; of the others only their number is shown


def heading(recipe: Recipe, shapes: Shapes) -> list[str]:
    """The header as lines: the file, how it was made, sizes (tensor bytes only), the hash."""
    imatrix = recipe.imatrix
    fields = {
        "model": recipe.model,
        "file": recipe.file,
        "preset": recipe.preset,
        "budget": recipe.budget,
        "made": recipe.made,
        "source": recipe.source and recipe.source.name,
        "imatrix": imatrix and imatrix.name + (f", {number_of(imatrix.chunks, 'chunk')}" if imatrix.chunks else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in recipe.versions.items()),
        "file size": recipe.bytes and number_of(recipe.bytes, "byte"),
        "tensors": tensors_size(size_of(recipe.tensors, shapes)) or (recipe.bpw and f"{recipe.bpw:.4f} bpw"),
        "blocks": tensors_size(block_size(recipe.tensors, shapes)),
        "recipe": recipe_sha256(recipe.tensors),
    }
    kept = recipe.metadata.get(RECIPE_KEY)
    if kept not in (None, fields["recipe"]):
        fields["note"] = f"the file was written with recipe {kept}; its types were changed later"
    return [f"{label:<10} {one_line(str(value))}" for label, value in fields.items() if value]


def kinds_table(recipe: Recipe, shapes: Shapes) -> Table:
    """Kinds × types with counts; with the shapes of all tensors also bytes and bits per weight."""
    whole = size_of(recipe.tensors, shapes)
    table = table_of("kind", "tensors", "types", *(("bytes", "bpw") if whole else ()))
    for kind, names in _by_kind(recipe.tensors).items():
        counts = collections.Counter(recipe.tensors[name] for name in names).most_common()
        types = ", ".join(f"{count} × {type_name}" if len(names) > 1 else type_name for type_name, count in counts)
        size = whole and size_of(recipe.tensors, shapes, names)
        table.add(cell(kind), str(len(names)), cell(types), *_cells(size))
    table.rule()
    table.add("all", str(len(recipe.tensors)), "", *_cells(whole))
    return table


def layers_table(recipe: Recipe) -> Table | None:
    """Layers × kinds with the type of each tensor; None if there are no blocks.

    Layers that follow each other with equal types share a line. Kinds that are F32 in all layers are left out. In
    colour, a type with more bits than the most frequent type of its kind is green, one with fewer is yellow.
    """
    kinds = {
        kind: {layer: recipe.tensors[name] for name in names if (layer := block_of(name)) is not None}
        for kind, names in _by_kind(recipe.tensors).items()
    }
    kinds = {
        kind: types for kind, types in kinds.items() if {type_name.lower() for type_name in types.values()} - {"f32"}
    }
    layers = sorted({layer for types in kinds.values() for layer in types})
    if not layers:
        return None
    table = table_of("layer", *(one_line(kind).replace("_", "\n", 1) for kind in kinds))
    usual = {kind: collections.Counter(types.values()).most_common(1)[0][0] for kind, types in kinds.items()}
    for run, row in _runs(layers, [[types.get(layer, "") for types in kinds.values()] for layer in layers]):
        cells = [cell(text, _style(text, usual[kind])) for text, kind in zip(row, kinds, strict=True)]
        table.add(ranges(run), *cells)
    return table


def to_json(recipe: Recipe, shapes: Shapes) -> dict[str, Any]:
    """As JSON: the recipe, its hash, and its sizes (tensor bytes only; None if unknown)."""
    sizes = {"all": size_of(recipe.tensors, shapes), "blocks": block_size(recipe.tensors, shapes)}
    known = {name: {"bytes": size.bytes, "bpw": size.bpw} if size else None for name, size in sizes.items()}
    return recipe.model_dump(mode="json") | {"recipe_sha256": recipe_sha256(recipe.tensors), "sizes": known}


def tensors_size(size: Size | None) -> str | None:
    """The size of tensors in words; None for an unknown size."""
    return f"{number_of(size.bytes, 'byte')}, {size.bpw:.4f} bpw" if size else None


def cell(text: str, style: str = "") -> Text:
    """A text from a file as a cell: one line without markup."""
    return Text(one_line(text), style)


def table_of(first: str, *others: str) -> Table:
    """An empty table with these headings. Figures are aligned to the right."""
    right = {"tensors", "bytes", "bpw", "up", "down"}
    return Table([Column(first), *(Column(name, name in right, fold=name in {"types", "layers"}) for name in others)])


def _by_kind(tensors: dict[str, str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for name in sorted(tensors, key=reading_order):
        kinds[kind_of(name)].append(name)
    return kinds


def _runs(layers: Sequence[int], rows: Sequence[list[str]]) -> Iterator[tuple[list[int], list[str]]]:
    """Joins layers that follow each other with equal rows."""
    start = 0
    for end in range(1, len(layers) + 1):
        if end == len(layers) or rows[end] != rows[start] or layers[end] != layers[end - 1] + 1:
            yield list(layers[start:end]), rows[start]
            start = end


def _style(kind: str, usual: str) -> str:
    try:
        more = type_by_name(kind).bpw - type_by_name(usual).bpw if kind else 0
    except BitladderError:
        return "red"
    return "green" if more > 0 else "yellow" if more < 0 else ""


def _cells(size: Size | None) -> list[str]:
    return [f"{size.bytes:,}", f"{size.bpw:.3f}"] if size else []


def difference(changes: RecipeDiff) -> Iterator[str | Table]:
    """Lines and tables, in the order in which they are printed."""
    for name, size in (("A", changes.size_a), ("B", changes.size_b)):
        if size:
            yield f"{name}: {tensors_size(size)}"
    if changes.size_a and changes.size_b:
        gained = changes.size_b.bytes - changes.size_a.bytes
        yield f"B less A: {gained:+,} bytes ({100 * gained / changes.size_a.bytes:+z.2f} %)"
    for name, only in (("A", changes.only_a), ("B", changes.only_b)):
        for tensor, kind in only.items():
            yield one_line(f"only in {name}: {tensor} ({kind})")
    if changes.moves:
        yield ""
        yield _moves(changes)
        yield ""
        yield _changed_kinds(changes)
    count = len(changes.moves)
    yield f"{count} tensor{' differs' if count == 1 else 's differ'}, {changes.same} are the same"


def _moves(changes: RecipeDiff) -> Table:
    """The tensors with another type, by kind and types, with their layers and the bytes that B has more."""
    sized = None not in changes.bytes_by_kind().values()
    table = table_of("kind", "", "A → B", "tensors", "layers", *(("bytes",) if sized else ()))
    for group in changes.groups():
        arrow, colour = _ARROWS[group.direction]
        cells = [f"{group.before} → {group.after}", str(group.count), ranges(group.layers), _gain(group.bytes)]
        table.add(cell(group.kind), cell(arrow, colour), *(cells if sized else cells[:-1]))
    return table


def _changed_kinds(changes: RecipeDiff) -> Table:
    """How many tensors of each kind went up and down, and the bytes that B has more."""
    gains = changes.bytes_by_kind()
    moved: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in gains}
    for move in changes.moves:
        moved[kind_of(move.name)][move.direction] += 1
    table = table_of("kind", "up", "down", "bytes")
    for kind, gain in gains.items():
        table.add(cell(kind), str(moved[kind]["up"]), str(moved[kind]["down"]), _gain(gain))
    known = [gain for gain in gains.values() if gain is not None]
    total = sum(moved.values(), collections.Counter())
    table.rule()
    table.add("all", str(total["up"]), str(total["down"]), _gain(sum(known) if len(known) == len(gains) else None))
    return table


def _gain(gain: int | None) -> str:
    return "–" if gain is None else f"{gain:+,}"


def preflight_json(figures: Preflight) -> dict[str, Any]:
    """The preflight as a JSON value."""
    return {**dataclasses.asdict(figures), "bytes": figures.bytes}


def preflight_tables(figures: Preflight) -> list[Table]:
    """Kinds × types; and, if there are any, patterns and tensors that get another type."""
    parts = [_preflight_kinds(figures)]
    if figures.patterns:
        uses = [
            (row.pattern, row.type, str(len(row.matched)), str(len(row.decided)), _names(row.decided))
            for row in figures.patterns
        ]
        parts.append(_plain_table(("--tensor-type", "type", "found in", "decides", "tensors"), uses, right=(2, 3)))
    if figures.fallbacks:
        heads = ("type does not fit", "blocks", "width", "requested", "used", "extra bytes")
        parts.append(_plain_table(heads, _fallbacks(figures), right=(2, 5)))
    return parts


def preflight_lines(figures: Preflight) -> list[str]:
    """Coverage of the imatrix, size, room."""
    text = []
    if figures.weighted or figures.unweighted:
        text.append(
            f"imatrix: {number_of(figures.weighted, 'tensor')} weighted, {len(figures.unweighted)} quantized unweighted"
        )
        if figures.unweighted:
            text[-1] += f" ({_names(figures.unweighted)})"
    shards = f" in {number_of(len(figures.files), 'shard')}" if len(figures.files) > 1 else ""
    text.append(
        f"{number_of(figures.bytes, 'byte')}{shards}, {figures.bpw:.4f} bpw ({figures.bpw_blocks:.4f} in the blocks); "
        f"disk needed {figures.bytes / 1e6:,.1f} MB, memory about {figures.memory / 1e6:,.0f} MB besides the program"
    )
    return text


def _preflight_kinds(figures: Preflight) -> Table:
    rows = [
        (row.kind, row.type, str(row.count), f"{row.bytes:,}", f"{row.bpw:.3f}")
        for row in sorted(figures.kinds, key=lambda row: (row.kind, -row.bytes))
    ]
    return _plain_table(("kind", "type", "tensors", "bytes", "bpw"), rows, right=(2, 3, 4))


def _fallbacks(figures: Preflight) -> list[tuple[str, ...]]:
    """Tensors that get another type, by kind and blocks."""
    groups: dict[tuple[str, int, str, str], list[Fallback]] = {}
    for fallback in figures.fallbacks:
        groups.setdefault(
            (name_in_block(fallback.tensor), fallback.width, fallback.requested, fallback.used), []
        ).append(fallback)
    rows: list[tuple[str, ...]] = []
    for (kind, width, requested, used), members in groups.items():
        blocks = ranges([block for fallback in members if (block := block_of(fallback.tensor)) is not None])
        rows.append(
            (kind, blocks, str(width), requested, used, f"{sum(fallback.extra_bytes for fallback in members):+,}")
        )
    return rows


def _plain_table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, right: tuple[int, ...]) -> Table:
    table = Table([Column(head, index in right, fold=index not in right) for index, head in enumerate(heads)])
    for row in rows:
        table.add(*row)
    return table


def _names(names: tuple[str, ...]) -> str:
    more = f", … ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def result_line(result: QuantizeResult) -> str:
    """A quant that was written: path, size, types."""
    counts = collections.Counter(result.types.values()).most_common()
    types = ", ".join(f"{count} × {kind}" for kind, count in counts)
    bpw = f"{result.bpw:.4f} bpw, {result.bpw_blocks:.4f} in the blocks"
    return f"{result.path}: {number_of(result.bytes, 'byte')}, {bpw} ({types})"


def rounding_lines(quant: "RoundedQuant") -> list[str]:
    """Output errors by kind, and what the guard measured."""
    shown = []
    by_kind: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, (before, after) in quant.losses.items():
        by_kind[kind_of(name)][0] += before
        by_kind[kind_of(name)][1] += after
    ratios = [f"{kind} {after / before:.3f}" for kind, (before, after) in by_kind.items() if before > 0]
    if ratios:
        shown.append(f"output error relative to stock blocks, on the calibration moments: {', '.join(ratios)}")
    if quant.guard is None:
        shown.append("not checked on held-out text (--guard none)")
        return shown
    guard = quant.guard
    shown.append(
        f"held-out text ({number_of(guard.tokens, 'token')}): KLD {_with_error(guard.before)} with stock blocks, "
        f"{_with_error(guard.after)} with rounded blocks (difference {_with_error(guard.difference)}, paired)"
    )
    kept = f"{guard.tried - len(guard.stock)} of {number_of(guard.tried, 'tensor')} have rounded blocks"
    refused = [trial for trial in (*guard.trials, *guard.removals) if not trial.kept]
    shown.append(kept + "".join(f"; refused for {_trial_tensors(trial)}: {_guard_trial(trial)}" for trial in refused))
    layers = [trial for trial in guard.removals if in_main_block(trial.kind)]
    if layers:
        least = max(layers, key=lambda trial: trial.change.value)
        shown.append(f"the layer with the smallest gain: {least.kind}, {_guard_trial(least)}")
    return shown


def rounding_json(quant: "RoundedQuant") -> dict[str, Any]:
    """What `rounding_lines` shows, as JSON values."""
    from bitladder.refine import guard_json

    return {"guard": None if quant.guard is None else guard_json(quant.guard), "output_errors": quant.losses}


def _guard_trial(trial: "GuardTrial") -> str:
    return f"KLD {trial.change.value:+z.5f} ± {trial.change.error:.5f}"


def _trial_tensors(trial: "GuardTrial") -> str:
    return trial.tensors[0] if len(trial.tensors) == 1 else f"{len(trial.tensors)} {trial.kind}"


def _with_error(figure: "Figure") -> str:
    return f"{figure.value:.5f} ± {figure.error:.5f}"

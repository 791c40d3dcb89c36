"""What a run would do with a model, as a table and as JSON."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from bitladder.gguf import ranges
from bitladder.ladder import Diagnosis, Estimate, WidthMisfit, in_words
from bitladder.show.table import Column, Table

SHOWN = 4  # kinds of tensors of a width that are named


def diagnosis_json(diagnosis: Diagnosis, cost: Estimate | None = None) -> dict[str, Any]:
    """The diagnosis as a JSON value, with what a run takes."""
    names = ("seconds", "core_seconds", "memory_bytes", "disk_bytes")
    sums = None if cost is None else {name: getattr(cost, name) for name in names}
    facts = dataclasses.asdict(dataclasses.replace(diagnosis, shape=None))
    del facts["shape"]  # the estimate follows from it
    return {"works": diagnosis.works, **facts, "estimate": sums}


def diagnosis_table(diagnosis: Diagnosis, cost: Estimate | None = None) -> Table:
    """A line for each thing that matters to a run, and what the whole ladder takes; the verdict comes last."""
    table = Table([Column(""), Column("", fold=True)])
    for topic, text in _lines(diagnosis):
        table.add(Text(topic, "bold"), text)
    if cost is not None:
        table.add(Text("a run", "bold"), f"{in_words(cost)} (`bitladder estimate` for other options)")
    for remark in diagnosis.remarks:
        table.add(Text("remark", "bold"), remark)
    if diagnosis.works:
        table.add(Text("verdict", "bold"), "it works, as far as headers show")
    for reason in diagnosis.reasons:
        table.add(Text("cannot work", "bold"), reason)
    return table


def _lines(about: Diagnosis) -> Iterator[tuple[str, str]]:
    """Topic and text."""
    yield "model", f"{about.model} ({about.source})"
    if about.classes:
        yield "class", ", ".join(about.classes)
    if about.architecture is None:
        return
    yield "architecture", about.architecture
    if about.converter:
        yield "converter", "bitladder's own" if about.converter == "bitladder" else "llama.cpp's, run by bitladder"
    yield "weights", f"{about.weights:,} in {about.blocks} blocks, {about.encoding}"
    if about.tokenizer:
        yield "tokenizer", about.tokenizer
    if about.tied_head is not None:
        yield "head", "tied to the embeddings" if about.tied_head else "a matrix of its own"
    if about.experts:
        yield (
            "experts",
            f"{about.experts} in a block, {about.experts_used} for a token, {about.expert_share:.0%} of the weights; "
            "all experts of a tensor get one type",
        )
    if about.recurrent:
        text = f"{len(about.recurrent)} of the blocks ({ranges(about.recurrent)})"
        if about.recurrent_kept:
            text += f"; {', '.join(about.recurrent_kept)} stay in full precision"
        yield "recurrent", text
    if about.prediction:
        yield (
            "prediction heads",
            f"{about.prediction:,} weights for further tokens; no text reaches them, so they get Q8_0",
        )
    if about.perception:
        done = "converted to a projector beside the model" if about.projector else "left out"
        yield "images, sounds", f"{about.perception:,} weights, {done}"
    yield from _widths(about)
    why = f"positions: {about.no_gradients}" if about.no_gradients else "gradients"
    yield "moments", f"tokens are weighted by {why}"
    links = ", ".join(f"{count} × {kind}" for kind, count in about.links.items())
    yield "smoothing", links or "no scale can move; rungs are made of the original model"


def _widths(about: Diagnosis) -> Iterator[tuple[str, str]]:
    """A line for all widths in whose place the same types are used."""
    groups: dict[str, list[WidthMisfit]] = {}
    for misfit in about.misfits:
        groups.setdefault(", ".join(f"{kind} becomes {used}" for kind, used in misfit.instead.items()), []).append(
            misfit
        )
    for types, members in groups.items():
        kinds = list(dict.fromkeys(kind for misfit in members for kind in misfit.kinds))
        named = ", ".join(kinds[:SHOWN]) + (" and others" if len(kinds) > SHOWN else "")
        share = sum(misfit.weights for misfit in members) / about.weights
        part = "less than 1%" if share < 0.01 else f"{share:.0%}"
        widths = ", ".join(str(misfit.width) for misfit in members)
        yield f"rows of {widths}", f"{named} ({part} of the weights) hold no super-blocks of 256: {types}"
    if not about.misfits:
        yield "rows", "all hold super-blocks of 256"

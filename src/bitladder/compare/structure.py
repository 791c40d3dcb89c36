"""Whether a file can be a quant of the base, by its headers: architecture, vocabulary, hyperparameters, shapes."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from bitladder.files import sha256_bytes
from bitladder.gguf import GgufFile, block_of, ranges

TOKENS = "tokenizer.ggml.tokens"
# What decides how text becomes tokens. Quantizers sometimes correct token types and templates, but never these.
TOKENIZER = ("model", "pre", "merges", "scores", "add_space_prefix", "add_bos_token", "bos_token_id")
# Keys of the architecture that do not change what the model computes on a short text.
HARMLESS = (".context_length", ".rope.scaling.original_context_length", ".vocab_size", ".pooling_type")
# Tensors that a quantizer can add or leave out: a copy of a tied head, precomputed rotations, scales of a tensor.
OPTIONAL = ("output.weight", "rope_freqs.weight", ".scale", ".input_scale")


# "other": the file is certainly no quant of the base. "sign": it is probably of another checkpoint, or was changed on
# purpose. "note": the difference leaves the comparison fair.
Gravity = Literal["other", "sign", "note"]


@dataclasses.dataclass(frozen=True)
class OriginFinding:
    """A difference of a file from the base: how grave it is, what was looked at, and a sentence."""

    gravity: Gravity
    about: Literal["architecture", "vocabulary", "tokenizer", "hyperparameters", "tensors", "weights", "perplexity"]
    text: str


def gravest(findings: Sequence[OriginFinding]) -> Gravity | None:
    """The gravest of several findings; None if there are none."""
    order: tuple[Gravity, ...] = ("other", "sign", "note")
    return next((gravity for gravity in order if any(finding.gravity == gravity for finding in findings)), None)


def check_structure(base: GgufFile, model: GgufFile) -> list[OriginFinding]:
    """How the headers of `model` differ from those of `base`; empty if it can be a quant of the base."""
    if base.architecture != model.architecture:
        return [
            OriginFinding(
                "other",
                "architecture",
                f"another architecture: {model.architecture or 'none'}, the base is {base.architecture}",
            )
        ]
    return [*_vocabulary(base, model), *_hyperparameters(base, model), *_tensors(base, model)]


def _vocabulary(base: GgufFile, model: GgufFile) -> Iterable[OriginFinding]:
    ours, theirs = base.metadata.get(TOKENS), model.metadata.get(TOKENS)
    if ours is None or theirs is None:
        yield OriginFinding("other", "vocabulary", "it has no vocabulary" if ours else "the base has no vocabulary")
        return
    if ours.raw != theirs.raw:
        mine, other = list(ours.python()), list(theirs.python())
        first = next(
            (i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other))
        )
        yield OriginFinding(
            "other",
            "vocabulary",
            f"another vocabulary: {len(other)} tokens (sha256 {sha256_bytes(theirs.raw)[:12]}), the base has "
            f"{len(mine)} ({sha256_bytes(ours.raw)[:12]}); they differ from token {first} on",
        )
        return
    changed = [name for name in TOKENIZER if _raw(base, name) != _raw(model, name)]
    if changed:
        yield OriginFinding(
            "note",
            "tokenizer",
            f"the tokenizer has other settings ({', '.join(changed)}): it can cut text into other tokens; it is "
            "measured on the base's tokens",
        )


def _raw(file: GgufFile, name: str) -> bytes | None:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    return None if value is None else value.raw


def _hyperparameters(base: GgufFile, model: GgufFile) -> Iterable[OriginFinding]:
    prefix = base.architecture + "."
    changed = {
        key: (base.get(key), model.get(key))
        for key in sorted({*base.metadata, *model.metadata})
        if key.startswith(prefix) and base.get(key) != model.get(key)
    }
    grave = {key: pair for key, pair in changed.items() if not key.endswith(HARMLESS)}
    # A key that only one of the files has can be a default that the other one leaves out.
    certain = {key: pair for key, pair in grave.items() if None not in pair}
    if certain:
        yield OriginFinding("sign", "hyperparameters", f"other hyperparameters: {_pairs(certain)}")
    rest = {key: pair for key, pair in changed.items() if key not in certain}
    if rest:
        yield OriginFinding("note", "hyperparameters", f"metadata differ: {_pairs(rest)}")


def _pairs(changed: dict[str, tuple[object, object]]) -> str:
    shown = [f"{key} {_shown(theirs)}, the base has {_shown(ours)}" for key, (ours, theirs) in changed.items()]
    return "; ".join(shown[:3]) + (f"; and {len(shown) - 3} more" if len(shown) > 3 else "")


def _shown(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _tensors(base: GgufFile, model: GgufFile) -> Iterable[OriginFinding]:
    shapes = [
        name
        for name in base.tensors.keys() & model.tensors.keys()
        if base.tensors[name].shape != model.tensors[name].shape
    ]
    if shapes:
        name = min(shapes, key=list(base.tensors).index)
        yield OriginFinding(
            "other",
            "tensors",
            f"other shapes: {len(shapes)} tensors, the first {name} is {list(model.tensors[name].shape)}, in the base "
            f"{list(base.tensors[name].shape)}",
        )
    missing = [name for name in base.tensors if name not in model.tensors and not name.endswith(OPTIONAL)]
    added = [name for name in model.tensors if name not in base.tensors and not name.endswith(OPTIONAL)]
    if missing:
        blocks = {block_of(name) for name in missing} - {block_of(name) for name in model.tensors}
        if blocks and None not in blocks:
            text = f"blocks {ranges(number for number in blocks if number is not None)} are left out"
            yield OriginFinding("note", "tensors", f"pruned: {text}")
        else:
            yield OriginFinding("sign", "tensors", f"{_names(missing)} missing")
    if added:
        yield OriginFinding("sign", "tensors", f"{_names(added)} that the base does not have")


def _names(names: list[str]) -> str:
    return f"{len(names)} tensors ({names[0]}, …)" if len(names) > 1 else f"tensor {names[0]}"

"""Which type each tensor gets: options in, types out.

The library decides (`engine.presets.preset_types`). Here patterns and recipes become exact names for its request, and
its answer is checked for everything that would fail later.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping

from bitladder.engine import PresetTypes, Request, TensorType, all_types, check_overrides, plain_type, preset_types
from bitladder.errors import BitladderError, UsageError
from bitladder.gguf import GgufFile, TensorInfo, prediction_tensors
from bitladder.quantize.prune import Pruning, plan_pruning
from bitladder.quantize.quantize_options import AS_PRESET, QuantizeOptions, check_options, parse_override
from bitladder.recipe import PatternMatch, exact_patterns, match_patterns, parse_tensor_type, target_type
from bitladder.units import number_of, some_of

# The tensors of --token-embedding-type and --output-tensor-type. llama-quantize has no fallback for their widths.
EMBEDDINGS, OUTPUT = ("token_embd.weight", "per_layer_token_embd.weight"), ("output.weight",)
# The preset under which patterns apply if there is none, or one that does not quantize.
BASE = "Q8_0"


@dataclasses.dataclass(frozen=True)
class TensorChoice:
    """A tensor of the new file.

    Parameters:
        name: in the new file.
        source: the tensor that it is made of.
        type: its type.
        requested: the type that was asked for; another one where the width cannot hold it.
        why: what decided, in a few words.
    """

    name: str
    source: TensorInfo
    type: TensorType
    requested: TensorType
    why: str

    @property
    def changes(self) -> bool:
        """Whether its data are computed, and not copied."""
        return self.type != self.source.type


@dataclasses.dataclass(frozen=True)
class PatternUse:
    """A line of the match table: the tensors that a pattern matches, and those that it gives its type."""

    pattern: str
    type: TensorType
    matched: tuple[str, ...]
    decided: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ChosenTypes:
    """The types of all tensors.

    Parameters:
        tensors: in the order they are written.
        patterns: the match table of --tensor-type.
        warnings: remarks for the user.
        request: the request to the library.
        needs_imatrix: whether the library needs an importance matrix for it.
        pruning: the blocks that are left out; None for none.
    """

    tensors: tuple[TensorChoice, ...]
    patterns: tuple[PatternUse, ...]
    warnings: tuple[str, ...]
    request: Request
    needs_imatrix: bool
    pruning: Pruning | None

    @property
    def types(self) -> dict[str, str]:
        """Tensor name → type name."""
        return {tensor.name: tensor.type.name for tensor in self.tensors}


def choose(file: GgufFile, options: QuantizeOptions, *, importance: Collection[str] | None) -> ChosenTypes:
    """Chooses the type of every tensor. Nothing is written.

    Parameters:
        file: the source.
        options: preset, recipe, patterns and so on.
        importance: names of the tensors that an importance matrix knows; None if there is none.

    Raises:
        UsageError: the options cannot be used with this file.
        BitladderError: the library refuses the file.
    """
    check_options(options)
    pruning = None
    if options.prune_layers:
        pruning = plan_pruning(file.metadata, file.tensors, options.prune_layers, file.architecture)
    sources = _renamed(file, pruning)
    recipe = _recipe_types(file, options.types or {}, sources)
    pairs = [parse_tensor_type(text) for text in options.tensor_types]
    matches = match_patterns(file.path, pairs, list(sources))
    named = recipe | {name: match.type for match in matches for name in match.first}
    unreached = _unreached(file, options, named.keys() | set(importance or ()), sources)
    request = _request(options, unreached | named, sources, importance is not None)
    check_overrides(file.path, request.kv)
    answer = preset_types(file.path, request)
    if answer.types.keys() != sources.keys():
        odd = sorted(answer.types.keys() ^ sources.keys())
        raise BitladderError(f"the library and {file.path} disagree on tensors ({odd[0]}, …); is the file damaged?")
    remarks = []
    if options.types is not None:
        answer, unnamed = _exactly(file, recipe, request, answer, sources)
        remarks = _unnamed(options, [name for name in unnamed if name not in unreached])
    reasons = {name: ("no text reaches it", kind) for name, kind in unreached.items()}
    reasons |= _reasons(options, recipe, matches)
    tensors = []
    for name, kind in answer.types.items():
        source, without_fallback = sources[name], answer.misfits.get(name, kind)
        reason, reason_type = reasons.get(name, ("", None))
        if not reason or reason_type not in (without_fallback, kind):
            reason = "kept" if kind == source.type else f"preset {options.preset or ''}".strip()
        tensors.append(TensorChoice(name, source, kind, without_fallback, reason))
    uses = tuple(_use(match, tensors) for match in matches)
    _refuse(options, tensors)
    warnings = (*remarks, *_of_unreached(unreached, tensors), *_warnings(tensors, uses))
    return ChosenTypes(tuple(tensors), uses, warnings, request, answer.needs_imatrix, pruning)


def _renamed(file: GgufFile, pruning: Pruning | None) -> dict[str, TensorInfo]:
    """New name → tensor of the source."""
    if pruning is None:
        return dict(file.tensors)
    renamed = {pruning.new_name(name): tensor for name, tensor in file.tensors.items()}
    return {name: tensor for name, tensor in renamed.items() if name is not None}


def _unreached(
    file: GgufFile, options: QuantizeOptions, known: Collection[str], sources: Mapping[str, TensorInfo]
) -> dict[str, TensorType]:
    """The type of the tensors of prediction heads that nothing else decides: no text says which weights matter there.

    Parameters:
        file: the source.
        options: the options.
        known: tensors that a recipe, a pattern or an importance matrix names.
        sources: new name → tensor of the source.
    """
    heads = set(prediction_tensors(file))
    plain = options.copies or (options.preset is not None and plain_type(options.preset) is not None)
    if options.unreached_type == AS_PRESET or options.pure or plain or not heads:
        return {}
    kind = target_type(options.unreached_type, "--unreached-type")
    return {
        name: kind
        for name, tensor in sources.items()
        if tensor.name in heads and name not in known and len(tensor.shape) > 1 and tensor.type.bpw > kind.bpw
    }


def _of_unreached(unreached: Mapping[str, TensorType], tensors: list[TensorChoice]) -> list[str]:
    """A remark on the tensors of prediction heads."""
    quantized = [tensor for tensor in tensors if tensor.name in unreached and tensor.changes]
    if not quantized:
        return []
    return [
        f"no text reaches the prediction heads: {quantized[0].requested.name} for "
        f"{some_of([tensor.name for tensor in quantized], 'tensor')}; --unreached-type {AS_PRESET} gives them the "
        "types of llama-quantize"
    ]


def _recipe_types(file: GgufFile, types: Mapping[str, str], sources: Mapping[str, TensorInfo]) -> dict[str, TensorType]:
    for name in types:
        if name not in sources:
            raise UsageError(f"the recipe names {name}, which {file.path} does not have; is it for another model?")
    # A tensor that is not converted may have any type: an i32 table stays as it is.
    return {
        name: sources[name].type
        if kind.lower() == sources[name].type.name.lower()
        else target_type(kind, f"the recipe's {name}")
        for name, kind in types.items()
    }


def _request(
    options: QuantizeOptions,
    overrides: Mapping[str, TensorType],
    sources: Mapping[str, TensorInfo],
    imatrix: bool,
) -> Request:
    preset = BASE if options.preset is None or options.copies else options.preset
    embedding, embedding_misfit = _special(options.token_embedding_type, "--token-embedding-type", EMBEDDINGS, sources)
    output, output_misfit = _special(options.output_tensor_type, "--output-tensor-type", OUTPUT, sources)
    exact = exact_patterns({**overrides, **embedding_misfit, **output_misfit})
    plain = plain_type(preset)
    if plain is not None and (options.types is not None or embedding_misfit or output_misfit):
        # Under a preset that does not quantize the library ignores overrides. So the other tensors are named as well.
        preset, exact = BASE, (*exact, (".*", plain))
    return Request(
        preset,
        overrides=exact,
        output_tensor_type=output,
        token_embedding_type=embedding,
        pure=options.pure or (options.preset is None),
        leave_output_tensor=options.leave_output_tensor,
        only_copy=options.copies,
        keep_split=options.keep_split,
        imatrix=imatrix,
        kv=dict(parse_override(text) for text in options.override_kv),
        prune_layers=options.prune_layers,
    )


def _special(
    name: str | None, option: str, tensors: tuple[str, ...], sources: Mapping[str, TensorInfo]
) -> tuple[TensorType | None, dict[str, TensorType]]:
    """The type of --token-embedding-type or --output-tensor-type, and overrides where a width cannot hold it.

    The library aborts the process if a width cannot hold the type. An override gets the usual fallback.
    """
    if name is None:
        return None, {}
    kind = target_type(name, option)
    present = [name for name in tensors if name in sources]
    if all(sources[tensor].width % kind.block == 0 for tensor in present):
        return kind, {}
    return None, dict.fromkeys(present, kind)


def _exactly(
    file: GgufFile,
    recipe: Mapping[str, TensorType],
    request: Request,
    answer: PresetTypes,
    sources: Mapping[str, TensorInfo],
) -> tuple[PresetTypes, list[str]]:
    """The answer with exactly the recipe's types, and the tensors that could be quantized but are not named.

    A matrix that the library never quantizes may still get another unquantized type.
    """
    ours = _quantizable(file, request)
    types = dict(answer.types)
    for name, kind in recipe.items():
        if name in ours or kind == sources[name].type:
            continue
        if kind.quantized or len(sources[name].shape) < 2:
            raise UsageError(f"the recipe gives {name} {kind.name}, but it has to stay {sources[name].type.name}")
        types[name] = kind
    return dataclasses.replace(answer, types=types), [name for name in sources if name in ours and name not in recipe]


def _unnamed(options: QuantizeOptions, names: list[str]) -> list[str]:
    """A remark on tensors that the recipe does not name. Raises UsageError if there is no preset for them."""
    if not names:
        return []
    some = f"the recipe names no type for {names[0]} ({number_of(len(names), 'tensor')} in all)"
    if options.preset is None:
        raise UsageError(f"{some}; complete it, or name a preset for the rest")
    return [f"{some}: preset {options.preset} decides"]


def _quantizable(file: GgufFile, request: Request) -> set[str]:
    """The tensors that the library would quantize: in a request for a type that no tensor has, they alone change."""
    present = {tensor.type for tensor in file.tensors.values()}
    probe = next(kind for kind in all_types().values() if kind.block == 1 and kind not in present)
    plain = dataclasses.replace(
        request, preset=BASE, overrides=((".*", probe),), output_tensor_type=None, token_embedding_type=None
    )
    return {name for name, kind in preset_types(file.path, plain).types.items() if kind == probe}


def _reasons(
    options: QuantizeOptions, recipe: Mapping[str, TensorType], matches: tuple[PatternMatch, ...]
) -> dict[str, tuple[str, TensorType]]:
    """Tensor → the option that names it, and its type."""
    reasons = {name: ("recipe", kind) for name, kind in recipe.items()}
    for match in matches:
        reasons |= dict.fromkeys(match.first, (f"--tensor-type {match.pattern}", match.type))
    for option, text, names in (
        ("--token-embedding-type", options.token_embedding_type, EMBEDDINGS),
        ("--output-tensor-type", options.output_tensor_type, OUTPUT),
    ):
        if text is not None:
            # A pattern that names the table of per-layer embeddings takes precedence over the option.
            fixed = [name for name in names if not (name == EMBEDDINGS[1] and name in reasons)]
            reasons |= dict.fromkeys(fixed, (option, target_type(text, option)))
    return reasons


def _use(match: PatternMatch, tensors: list[TensorChoice]) -> PatternUse:
    got = {tensor.name for tensor in tensors if tensor.why == f"--tensor-type {match.pattern}"}
    return PatternUse(match.pattern, match.type, match.names, tuple(name for name in match.first if name in got))


def _refuse(options: QuantizeOptions, tensors: list[TensorChoice]) -> None:
    for tensor in tensors:
        if tensor.changes and tensor.source.type.quantized and not options.allow_requantize:
            raise BitladderError(
                f"{tensor.source.name} is already {tensor.source.type.name}; quantize from an F16, BF16 or F32 file, "
                "or allow the loss with --allow-requantize"
            )
        if tensor.requested != tensor.type and options.no_fallback:
            raise UsageError(f"{_misfit(tensor)}; --no-fallback forbids to use {tensor.type.name} instead")


def _misfit(tensor: TensorChoice) -> str:
    kind = tensor.requested
    return f"{tensor.name}: rows of {tensor.source.width} weights cannot be {kind.name} (blocks of {kind.block})"


def _warnings(tensors: list[TensorChoice], uses: tuple[PatternUse, ...]) -> tuple[str, ...]:
    lines = []
    groups: dict[tuple[TensorType, TensorType], list[TensorChoice]] = collections.defaultdict(list)
    for tensor in tensors:
        if tensor.requested != tensor.type:
            groups[tensor.requested, tensor.type].append(tensor)
    for (_, used), members in groups.items():
        more = f", and {len(members) - 1} more" if len(members) > 1 else ""
        lines.append(f"{_misfit(members[0])}{more}: {used.name} instead")
    for use in uses:
        if not use.decided:
            lines.append(
                f"--tensor-type {use.pattern}={use.type.name} decides nothing: what it matches "
                f"({some_of(use.matched, 'tensor')}) is never quantized, an earlier pattern or another option decides, "
                "or the preset does not quantize"
            )
        if use.pattern != use.pattern.lower():
            lines.append(
                f"--tensor-type {use.pattern}: patterns are put in lower case, as by llama-quantize; "
                "names are in lower case, but an escape such as \\S becomes \\s"
            )
    return tuple(lines)

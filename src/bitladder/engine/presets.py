"""What the library's own quantizer does: presets ("Q4_K_M"), and the type that it gives each tensor of a file.

Its rules are not repeated here: `llama_model_quantize` makes a dry run, and its log is read. The library trusts the
shape in a model's metadata and ends the process where a number is absurd (block_count −1). Metadata that override the
file's are therefore tried first in a process of their own, which runs this module.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.engine.deaths import working_on
from bitladder.engine.native import ggml, llama, log
from bitladder.engine.types import TensorType, all_types, type_by_name
from bitladder.errors import BitladderError, UsageError, did_you_mean

# Names that llama-quantize also accepts.
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "F32": "ALL_F32"}

_TENSOR = re.compile(r"\[\s*\d+/\s*\d+\] (\S+)\s+- \[[^]]*\], type =\s*(\S+), size =[^\n(]*(?:\((\S+)\))?\n")
_MISFIT = re.compile(r"warning: (\S+)\s+- ncols +\d+ not divisible by +\d+ \(required for type +(\S+)\)")
_FAILURE = re.compile(r"failed to quantize: ([^\n]+)")
_SECONDS = 120  # for the dry run with overrides


@dataclasses.dataclass(frozen=True)
class Request:
    """The parameters of llama_model_quantize (llama_model_quantize_params).

    Parameters:
        preset: name of the preset.
        overrides: std::regex patterns and types. The first pattern that is found in a tensor's name decides.
        output_tensor_type: type of output.weight.
        token_embedding_type: type of token_embd.weight.
        pure: whether all tensors get the preset's type.
        leave_output_tensor: whether output.weight is copied.
        only_copy: whether all tensors are copied.
        keep_split: whether the output has the shards of the input.
        imatrix: whether there is an importance matrix, with which some presets choose other types.
        kv: metadata that override those of the file.
        prune_layers: blocks that are left out.
    """

    preset: str
    overrides: tuple[tuple[str, TensorType], ...] = ()
    output_tensor_type: TensorType | None = None
    token_embedding_type: TensorType | None = None
    pure: bool = False
    leave_output_tensor: bool = False
    only_copy: bool = False
    keep_split: bool = False
    imatrix: bool = False
    kv: Mapping[str, int | float | bool | str] = dataclasses.field(default_factory=dict)
    prune_layers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class PresetTypes:
    """The types that the library gives the tensors of a file.

    Parameters:
        types: new types by tensor, in the order in which llama-quantize writes them. Where blocks are pruned the names
            are the new ones.
        misfits: for each tensor whose width does not fit the planned type, that type. `types` has the one instead.
        needs_imatrix: whether the library refuses to quantize without an importance matrix.
    """

    types: dict[str, TensorType]
    misfits: dict[str, TensorType]
    needs_imatrix: bool


@functools.cache
def presets() -> dict[str, int]:
    """Numbers (llama_ftype) of presets by name, from the bindings' constants: LLAMA_FTYPE_MOSTLY_Q4_K_M is "Q4_K_M"."""
    numbers = {}
    for name in dir(llama):
        if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED":
            numbers[name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_")] = int(getattr(llama, name))
    return numbers


def preset_number(name: str) -> int:
    """The llama_ftype of a preset. `name` is its name in any case, or the number, as in llama-quantize.

    Raises UsageError that names the closest preset, or lists all.
    """
    upper = name.upper()
    upper = ALIASES.get(upper, upper)
    if upper in presets():
        return presets()[upper]
    if upper.isdecimal() and int(upper) in presets().values():
        return int(upper)
    raise UsageError(f"unknown preset {name!r}{did_you_mean(name, sorted(presets()), 'the library knows')}")


def plain_type(preset: str) -> TensorType | None:
    """The type of a preset that does not quantize (F16, BF16, F32); None for other presets."""
    number = preset_number(preset)
    name = next(name for name, value in presets().items() if value == number).removeprefix("ALL_").lower()
    kind = {kind.name: kind for kind in all_types().values()}.get(name)
    return kind if kind is not None and not kind.quantized else None


def storable(kind: TensorType) -> bool:
    """Whether weights can be stored in a type: the library can expand it.

    Other types (q8_1, q8_K, integers) are for intermediate results, and the library's quantizer aborts for them.
    """
    return kind.name == "f32" or bool(ggml.ggml_get_type_traits(kind.id).contents.to_float)


def kernel_needs_importance(kind: TensorType) -> bool:
    """Whether the library's kernel of a type refuses to run without importance."""
    return bool(ggml.ggml_quantize_requires_imatrix(kind.id))


def preset_types(path: str | os.PathLike[str], request: Request) -> PresetTypes:
    """The types that the library gives the tensors of a file, by a dry run.

    Parameters:
        path: the file, or its first shard.
        request: the parameters.

    Raises:
        BitladderError: the library refuses the file or the request; the message has its words.
    """
    params, _keep = _params(request)
    with log.tapped() as pieces:
        # A dry run does not use the path of the output, but it must differ from that of the input.
        working_on(pathlib.Path(path))
        status = llama.llama_model_quantize(os.fsencode(path), os.fsencode(path) + b".dry", ctypes.byref(params))
    text = "".join(pieces)
    if status != 0:
        raise BitladderError(f"the library cannot quantize {os.fspath(path)}: {_failure(text)}")
    types = {name: type_by_name(new or old) for name, old, new in _TENSOR.findall(text)}
    misfits = {name: type_by_name(planned) for name, planned in _MISFIT.findall(text)}
    return PresetTypes(types, misfits, "will require an imatrix" in text)


def pattern_error(path: str | os.PathLike[str], patterns: Sequence[str]) -> str | None:
    """The error of the library's regular expressions (std::regex) in one of the patterns, or None.

    The library compiles the patterns and matches them with nothing, because it only copies.

    Parameters:
        path: a model that the library can open.
        patterns: the patterns.
    """
    overrides = tuple((pattern, type_by_name("q8_0")) for pattern in patterns)
    try:
        preset_types(path, Request("Q8_0", overrides=overrides, only_copy=True))
    except BitladderError as error:
        return str(error).rpartition(": ")[2]
    return None


def _failure(text: str) -> str:
    match = _FAILURE.search(text)
    return match[1].strip() if match else "no reason given"


def _params(request: Request) -> tuple[Any, list[Any]]:
    """The structure, and objects that must live as long as it."""
    params = llama.llama_model_quantize_default_params()
    params.ftype = preset_number(request.preset)
    params.dry_run, params.nthread = True, 1
    params.pure, params.only_copy, params.keep_split = request.pure, request.only_copy, request.keep_split
    params.quantize_output_tensor = not request.leave_output_tensor
    if request.output_tensor_type is not None:
        params.output_tensor_type = request.output_tensor_type.id
    if request.token_embedding_type is not None:
        params.token_embedding_type = request.token_embedding_type.id
    keep: list[Any] = []
    if request.imatrix:
        # A dry run reads only whether there is one.
        values = (ctypes.c_float * 1)(1.0)
        data = (llama.llama_model_imatrix_data * 2)()
        data[0].name, data[0].data, data[0].size = b"any", values, 1
        params.imatrix = data
        keep += [values, data]
    if request.overrides:
        overrides = (llama.llama_model_tensor_override * (len(request.overrides) + 1))()
        for slot, (pattern, kind) in zip(overrides, request.overrides, strict=False):
            slot.pattern, slot.type = pattern.encode(), kind.id
        params.tt_overrides = overrides
        keep.append(overrides)
    if request.kv:
        params.kv_overrides = _kv(request.kv)
        keep.append(params.kv_overrides)
    if request.prune_layers:
        layers: Sequence[int] = [*request.prune_layers, -1]
        params.prune_layers = (ctypes.c_int32 * len(layers))(*layers)
        keep.append(params.prune_layers)
    return params, keep


def _kv(values: Mapping[str, int | float | bool | str]) -> Any:
    """An array of llama_model_kv_override. The last entry has no key."""
    array = (llama.llama_model_kv_override * (len(values) + 1))()
    for slot, (key, value) in zip(array, values.items(), strict=False):
        slot.key = key.encode()
        if isinstance(value, bool):
            slot.tag, slot.value.val_bool = llama.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            slot.tag, slot.value.val_i64 = llama.LLAMA_KV_OVERRIDE_TYPE_INT, value
        elif isinstance(value, float):
            slot.tag, slot.value.val_f64 = llama.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        else:
            slot.tag, slot.value.val_str = llama.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    return array


def check_overrides(path: str | os.PathLike[str], kv: Mapping[str, int | float | bool | str]) -> None:
    """Raises BitladderError that names the values if the library fails with them; `kv` as in `Request`."""
    if kv:
        _check_overrides(os.fspath(path), json.dumps(dict(kv)))


@functools.cache
def _check_overrides(path: str, kv: str) -> None:
    shown = ", ".join(f"{key}={value}" for key, value in json.loads(kv).items())
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-m", "bitladder.engine.presets", path],
            input=kv.encode(),
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BitladderError(f"the library does not finish with {shown}; give values that the model can have") from None
    if process.returncode != 0:
        lines = [line.strip() for line in process.stderr.decode("utf-8", "replace").splitlines() if "ASSERT" in line]
        reason = f" ({lines[0].rpartition('/')[2]})" if lines else ""
        raise BitladderError(f"the library fails with {shown}{reason}; give values that the model can have")


if __name__ == "__main__":
    os.environ["GGML_NO_BACKTRACE"] = "1"  # otherwise the library starts a debugger to print where it was
    with contextlib.suppress(BitladderError):  # the caller asks again and gets the library's words
        preset_types(sys.argv[1], Request("Q8_0", only_copy=True, kv=json.load(sys.stdin)))

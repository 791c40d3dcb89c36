"""llama.cpp's converter seen from outside: what it knows of a checkpoint, and whether what it wrote is whole.

Its source is read, and nothing of it is run here. What it wrote is checked as our own output is: finite, and loaded by
the library.
"""

import ast
import collections
import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.convert import upstream
from bitladder.convert.checkpoint import Checkpoint
from bitladder.convert.tensors import first_not_finite
from bitladder.engine import Model
from bitladder.errors import BitladderError, UsageError
from bitladder.gguf import GgufFile, TensorInfo
from bitladder.progress import Progress
from bitladder.units import number_of

# Class → key of config.json and its value. transformers does not need the key, and leaves it out when it saves a model.
# llama.cpp computes something else without it.
NEEDED = {"DeepseekV3ForCausalLM": ("scoring_func", "sigmoid")}
# Types of weights that can be infinite, and how their bits are read (see `checkpoint.Raw`).
READ_AS = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


@dataclasses.dataclass(frozen=True)
class Known:
    """What a converter knows of a checkpoint.

    Parameters:
        architecture: the architecture as the GGUF names it, such as qwen3moe; None if it knows none.
        projector: whether it converts the projector of images or sounds too.
    """

    architecture: str | None
    projector: bool


def known_to(path: pathlib.Path | None, config: Mapping[str, Any], progress: Progress) -> Known:
    """What the converter of `converter_at` knows of a checkpoint. Its source is read, and nothing of it is run.

    Parameters:
        path: what --converter names, or None. Then the source archive is downloaded if it is not in the cache.
        config: the values of config.json.
        progress: is told of a download.

    Raises:
        BitladderError: the source cannot be had, or has another layout than this version's.
    """
    file = None if path is None else upstream.converter_file(path)
    home = upstream.converter_source(file, None, progress) if file is None or upstream.is_archive(file) else file.parent
    try:
        tables = _assigned(ast.parse((home / "conversion" / "__init__.py").read_text(encoding="utf-8")))
        texts, projectors = (ast.literal_eval(tables[name]) for name in ("TEXT_MODEL_MAP", "MMPROJ_MODEL_MAP"))
        outer, inner = (_class_names(values) for values in (config, config.get("text_config") or {}))
        name = next((name for name in (*inner, *outer) if name in texts), None)
        projector = any(name in projectors for name in (*outer, *_class_names(config.get("vision_config") or {})))
        if name is None:
            return Known(None, projector)
        module = ast.parse((home / "conversion" / f"{texts[name]}.py").read_text(encoding="utf-8"))
        constants = (home / "gguf-py" / "gguf" / "constants.py").read_text(encoding="utf-8")
        named = re.search(rf'MODEL_ARCH\.{_model_arch(module, name)}:\s*"([^"]+)"', constants)
        return Known(named[1] if named else name, projector)
    except (OSError, KeyError, ValueError, SyntaxError) as error:
        raise BitladderError(f"{home}: the list of architectures cannot be read ({error!r})") from error


def _class_names(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures") if isinstance(config, Mapping) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _assigned(tree: ast.Module | ast.ClassDef) -> dict[str, ast.expr]:
    """The values of a module's or class's plain assignments, by name."""
    values: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            values[node.target.id] = node.value
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
    return values


def _model_arch(module: ast.Module, name: str) -> str | None:
    """X of `model_arch = gguf.MODEL_ARCH.X` in the class that is registered under a name."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and name in {
            word.value for part in node.decorator_list for word in ast.walk(part) if isinstance(word, ast.Constant)
        }:
            value = _assigned(node).get("model_arch")
            if isinstance(value, ast.Attribute):
                return value.attr
    return None


def refuse_incomplete(config: Mapping[str, Any], path: pathlib.Path) -> None:
    """Refuses a checkpoint that llama.cpp would compute otherwise than transformers, for want of a key in config.json.

    Parameters:
        config: the values of config.json.
        path: the file.

    Raises:
        UsageError: names the key.
    """
    for name in _class_names(config):
        key, value = NEEDED.get(name, ("", ""))
        if key and config.get(key) is None:
            raise UsageError(
                f'{path} has no {key}, and without it llama.cpp computes another model; add "{key}": "{value}", as the '
                f"makers of {name} publish it"
            )


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a GGUF says of itself: its architecture, the type of most of its weights, and the number of its tensors."""

    architecture: str
    outtype: str
    tensors: int


def check_finite_file(path: pathlib.Path, progress: Progress) -> int:
    """The number of weights of a GGUF. Raises BitladderError that names a tensor with a value that is not finite."""
    with (
        GgufFile(path) as file,
        progress.task("Checking the converted weights", file.tensor_bytes) as bar,
    ):
        for tensor in file.tensors.values():
            bar.note(tensor.name)
            refuse_not_finite(tensor, file.read(tensor))
            bar.advance(tensor.nbytes)
        return sum(tensor.elements for tensor in file.tensors.values())


def check_converted(path: pathlib.Path, checkpoint: pathlib.Path, progress: Progress, beside: int = 0) -> Converted:
    """Checks a GGUF that another converter wrote.

    Every value is finite, and the library loads the file, so no tensor that its architecture needs is missing. A
    number of weights that differs from the checkpoint's is a warning: a vision part or further heads may be left out.

    Parameters:
        path: the GGUF file.
        checkpoint: directory of the checkpoint.
        progress: gets the warning.
        beside: number of weights in the projector beside it.

    Raises:
        BitladderError: names the tensor that is not finite, or has the library's reason.
    """
    weights = check_finite_file(path, progress) + beside
    with GgufFile(path) as file:
        converted = Converted(file.architecture, _outtype(file), len(file.tensors))
    with Model(path):
        pass
    if list(checkpoint.glob("*.safetensors")):
        own = Checkpoint(checkpoint).parameters
        if weights < 0.98 * own:
            progress.warn(
                f"the GGUF has {number_of(weights, 'weight')} and the checkpoint {own:,}: llama.cpp's converter leaves "
                "parts out (a vision part, prediction heads)"
            )
    return converted


def _outtype(file: GgufFile) -> str:
    """The type of most weights."""
    counts: collections.Counter[str] = collections.Counter()
    for tensor in file.tensors.values():
        counts[tensor.type.name] += tensor.elements
    return counts.most_common(1)[0][0] if counts else "f32"


def refuse_not_finite(tensor: TensorInfo, data: npt.NDArray[np.uint8]) -> None:
    """Raises BitladderError that names a tensor with a NaN or an infinity. Types of blocks are not looked at."""
    if tensor.type.name not in READ_AS:
        return
    first = first_not_finite(data.reshape(-1).view(READ_AS[tensor.type.name]))
    if first is not None:
        raise BitladderError(
            f"{tensor.name} has a value that {tensor.type.name} cannot hold, at index {first[0]}; "
            "use --outtype bf16, unless the checkpoint has it too"
        )

"""What llama.cpp's converter knows of a checkpoint, found in its source: nothing of it is run."""

import ast
import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from bitladder.convert import upstream
from bitladder.errors import BitladderError, UsageError
from bitladder.progress import Progress

# Class → key of config.json and its value. transformers does not need the key, and leaves it out when it saves a model.
# llama.cpp computes something else without it.
NEEDED = {"DeepseekV3ForCausalLM": ("scoring_func", "sigmoid")}


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

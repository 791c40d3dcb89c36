"""What a file that is there is: told by its content, so that no command overwrites a file of another kind."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Collection
from typing import Any

from bitladder.errors import BitladderError

_START = 1 << 16  # bytes from the start of a file that tell a page or a card
_MOST = 1 << 26  # bytes of the largest JSON or text that is read to tell its kind


def _gguf(path: pathlib.Path) -> tuple[str, bool] | None:
    """general.type of a GGUF ("model" where it has none), and whether a tensor of it is quantized."""
    from bitladder.gguf import open_regular, read_header

    with contextlib.suppress(BitladderError), open_regular(path) as stream:
        header = read_header(stream, path)  # of one file: a shard whose others are missing has a kind too
        kind = header.metadata.get("general.type")
        quantized = any(tensor.type.quantized for tensor in header.tensors.values())
        return ("model" if kind is None else str(kind.python())), quantized
    return None


def is_model(path: pathlib.Path) -> bool:
    """A GGUF model in any types."""
    known = _gguf(path)
    return known is not None and known[0] == "model"


def is_full_model(path: pathlib.Path) -> bool:
    """A GGUF model without quantized tensors."""
    return _gguf(path) == ("model", False)


def is_quant(path: pathlib.Path) -> bool:
    """A GGUF model with quantized tensors."""
    return _gguf(path) == ("model", True)


def is_imatrix(path: pathlib.Path) -> bool:
    """An importance matrix of either format."""
    from bitladder.calibrate import read_imatrix

    with contextlib.suppress(BitladderError):
        read_imatrix(path, finite=False)
        return True
    return False


def is_moments(path: pathlib.Path) -> bool:
    """Second moments."""
    known = _gguf(path)
    return known is not None and known[0] == "moments"


def is_base(path: pathlib.Path) -> bool:
    """A base file."""
    from bitladder.evaluate import is_base_file

    return is_base_file(path)


def is_logits(path: pathlib.Path) -> bool:
    """llama-perplexity's file of log-probabilities."""
    from bitladder.evaluate import is_logits_file

    return is_logits_file(path)


def is_recipe(path: pathlib.Path) -> bool:
    """A recipe."""
    from bitladder.recipe import read_recipe

    with contextlib.suppress(BitladderError):
        read_recipe(path)
        return True
    return False


def is_type_list(path: pathlib.Path) -> bool:
    """Lines PATTERN=TYPE, as --tensor-type-file takes them."""
    words = _text(path).split()
    return bool(words) and all("=" in word for word in words)


def is_questions(path: pathlib.Path) -> bool:
    """Questions in one of llama-perplexity's formats."""
    from bitladder.evaluate import is_task_file

    return is_task_file(path)


def is_scores(path: pathlib.Path) -> bool:
    """What `eval -o` writes."""
    return _records(path, {"model", "sha256", "versions"})


def is_comparison(path: pathlib.Path) -> bool:
    """What `compare -o` writes."""
    value = _json(_text(path))
    return isinstance(value, dict) and {"base", "models"} <= value.keys()


def is_speeds(path: pathlib.Path) -> bool:
    """What `bench -o` writes: JSON, JSON lines, CSV or a table in Markdown."""
    text = _text(path)
    first = text.partition("\n")[0]
    lines = _json(first)
    heads = {word.strip(' "') for word in first.replace("|", ",").split(",")}
    return (
        _records(path, {"build_commit", "avg_ts"})
        or (isinstance(lines, dict) and "avg_ts" in lines)
        or {"build_commit", "avg_ts"} <= heads
        or {"model", "test", "t/s"} <= heads
    )


def is_plot(path: pathlib.Path) -> bool:
    """A PNG, or the page that `stats --plot` writes."""
    start = _start(path)
    return start.startswith(b"\x89PNG") or (start.lstrip()[:9].lower() == b"<!doctype" and b"<svg" in start)


def is_any_card(path: pathlib.Path) -> bool:
    """A model card that a run wrote: it names the program."""
    return path.suffix == ".md" and b"bitladder" in _whole(path)


def is_report(path: pathlib.Path) -> bool:
    """The HTML report of a run."""
    return b"bitladder" in _whole(path) and b"<html" in _start(path).lower()


# Kind → what a person calls it, and how it is told.
KINDS: dict[str, tuple[str, Callable[[pathlib.Path], bool]]] = {
    "model": ("a GGUF model", is_model),
    "full model": ("a full-precision GGUF model", is_full_model),
    "quant": ("a quantized GGUF model", is_quant),
    "imatrix": ("an importance matrix", is_imatrix),
    "moments": ("second moments", is_moments),
    "base": ("a base file", is_base),
    "logits": ("a file of log-probabilities", is_logits),
    "recipe": ("a recipe", is_recipe),
    "types": ("a list of PATTERN=TYPE", is_type_list),
    "questions": ("a file of questions", is_questions),
    "scores": ("a Scores JSON", is_scores),
    "comparison": ("a comparison", is_comparison),
    "speeds": ("a table of speeds", is_speeds),
    "plot": ("a plot", is_plot),
    "card": ("a model card of bitladder", is_any_card),
    "report": ("a report of bitladder", is_report),
}


def _start(path: pathlib.Path) -> bytes:
    with contextlib.suppress(OSError), path.open("rb") as stream:
        return stream.read(_START)
    return b""


def _whole(path: pathlib.Path) -> bytes:
    with contextlib.suppress(OSError), path.open("rb") as stream:
        return stream.read(_MOST)
    return b""


def _text(path: pathlib.Path) -> str:
    with contextlib.suppress(UnicodeDecodeError):
        return _whole(path).decode("utf-8")
    return ""


def _json(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _records(path: pathlib.Path, fields: Collection[str]) -> bool:
    """Whether a file is a JSON object with these fields, or a list of such objects."""
    value = _json(_text(path))
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, dict) and set(fields) <= item.keys() for item in items)

"""The rule of outputs, for all commands: no output is an input, and none overwrites a file of another kind.

A parameter that names an output has the type `OutputPath`. Whatever else on the command line names a file is an input.
`Command` applies the rule before a command begins, and gives it --force. A command that chooses the name of an output
itself calls `check_output`.

What is allowed on purpose:

- A file of the kind that the command writes is replaced: the same command again makes the same file again.
- Importance matrices and second moments may be added to themselves (`imatrix --in-file X -o X`): the sum of what was
  read replaces it. `OutputPath.adds_to` names such inputs.
- `eval --base-file` and the like name what is written at first and read afterwards.
- --force overwrites a file of another kind, never an input.

The kind of a file that is there is told by its content (`KINDS`).
"""

import contextlib
import json
import pathlib
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import click

from bitladder.cli.typed import HelpfulCommand
from bitladder.errors import BitladderError, UsageError
from bitladder.files import same_file

_START = 1 << 16  # bytes from the start of a file that tell a page or a card
_MOST = 1 << 26  # bytes of the largest JSON or text that is read to tell its kind
_FORCE, _READ, _WORDS = "bitladder.force", "bitladder.read", "bitladder.words"


class OutputPath(click.Path):
    """The type of a parameter that names a file to write.

    Parameters:
        kind: what is written, a key of `KINDS`; a function chooses it by the command's parameters, None of it writes
            nothing.
        adds_to: parameters whose files may be the output.
    """

    def __init__(self, kind: str | Callable[[Mapping[str, Any]], str | None], *, adds_to: tuple[str, ...] = ()) -> None:
        super().__init__(path_type=pathlib.Path)
        self._kind = kind
        self.adds_to = adds_to

    def kind(self, params: Mapping[str, Any]) -> str | None:
        """What is written with these parameters; None if the parameter then names an input."""
        return self._kind(params) if callable(self._kind) else self._kind


class OutputFolder(click.Path):
    """The type of a parameter that names a directory in which a command keeps files of its own."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=pathlib.Path)


class Command(HelpfulCommand):
    """A command that refuses an output that is an input or a file of another kind.

    `writes` says that a command without an `OutputPath` writes files, and so has --force.
    """

    def __init__(self, *args: Any, writes: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if writes or any(isinstance(param.type, OutputPath) for param in self.params):
            help = "Overwrite a file of another kind too, if it is no input."
            force = click.Option(["--force"], is_flag=True, expose_value=False, callback=_note_force, help=help)
            self.params.insert(max(0, len(self.params) - 3), force)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Notes the words for `typed_command`."""
        ctx.meta[_WORDS] = [*args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Applies the rule and calls the command."""
        chosen = list(_outputs(ctx))
        for index, (param, path, kind) in enumerate(chosen):
            check_output(path, kind, adds_to=param.type.adds_to)  # type: ignore[attr-defined]
            for other, theirs, _ in chosen[:index]:
                if same_file(path, theirs):
                    raise UsageError(f"{param.opts[0]} and {other.opts[0]} name the same file")
        return super().invoke(ctx)


def check_output(path: pathlib.Path, kind: str, *, adds_to: tuple[str, ...] = ()) -> None:
    """Applies the rule to an output of the command that runs.

    Parameters:
        path: the file to write.
        kind: what is written, a key of `KINDS`.
        adds_to: parameters whose files may be the output.

    Raises:
        UsageError: the output is a directory, an input, or a file of another kind without --force.
    """
    context = click.get_current_context()
    words, is_kind = KINDS[kind]
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name a file")
    for flag, source in _inputs(context, adds_to):
        inside = source.is_dir() and path.exists() and not is_kind(path) and _holds(source, path)
        if inside or (not source.is_dir() and any(same_file(path, part) for part in _parts(source))):
            raise UsageError(f"{path} is an input ({flag}); name another output")
    if context.meta.get(_FORCE) or not path.is_file() or path.stat().st_size == 0:
        return
    if not is_kind(path):
        raise UsageError(f"{path} is there and is not {words}; name another output, or overwrite it with --force")


def check_folder(folder: pathlib.Path, patterns: Iterable[str], *, but: tuple[str, ...] = ()) -> None:
    """Raises UsageError if an input lies in a directory where the command that runs writes files of that name.

    Parameters:
        folder: the directory.
        patterns: what is written in it; a directory stands for all that it holds.
        but: parameters whose files may lie there.
    """
    written = [path.resolve() for pattern in patterns for path in folder.glob(pattern)]
    for flag, source in _inputs(click.get_current_context(), but):
        if any(source.resolve().is_relative_to(path) or same_file(source, path) for path in written):
            raise UsageError(f"{source} is an input ({flag}) among the files that {folder} gets; copy it elsewhere")


def typed_command() -> str:
    """The command that runs, as a shell takes it."""
    context = click.get_current_context()
    return shlex.join(["bitladder", str(context.info_name), *context.meta[_WORDS]])


def note_input(context: click.Context, flag: str, path: str) -> None:
    """Notes a file that a command read before its parameters were known."""
    context.meta.setdefault(_READ, []).append((flag, pathlib.Path(path)))


def _note_force(context: click.Context, _param: click.Parameter, value: bool) -> None:
    context.meta[_FORCE] = value


def _outputs(context: click.Context) -> Iterator[tuple[click.Parameter, pathlib.Path, str]]:
    for param in context.command.params:
        value = context.params.get(param.name or "")
        if isinstance(param.type, OutputPath) and value is not None:
            kind = param.type.kind(context.params)
            if kind is not None:
                yield param, value, kind


def _inputs(context: click.Context, but: tuple[str, ...]) -> Iterator[tuple[str, pathlib.Path]]:
    """Whatever on the command line names a file that is there, and directories among the arguments."""
    written = {id(param) for param, _, _ in _outputs(context)}
    yield from context.meta.get(_READ, ())
    for param in context.command.params:
        is_path = isinstance(param.type, click.Path | click.types.StringParamType)
        if not is_path or id(param) in written or isinstance(param.type, OutputFolder) or param.name in but:
            continue
        value = context.params.get(param.name or "")
        for item in value if isinstance(value, list | tuple) else (value,):
            for path in _named(item):
                if path.is_file() or (path.is_dir() and isinstance(param, click.Argument)):
                    yield _flag(param), path


def _named(value: Any) -> Iterator[pathlib.Path]:
    """The paths that a value may name: itself, or the sources in a list NAME:SOURCE,NAME:SOURCE."""
    if isinstance(value, pathlib.Path):
        yield value
    elif isinstance(value, str) and "\0" not in value:
        words = {value, *value.split(",")}
        for word in words | {word.partition(":")[2] for word in words}:
            if 0 < len(word) < 4096:
                yield pathlib.Path(word.strip())


def _parts(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The file, or all shards of a model."""
    from bitladder.gguf import shards_of

    return shards_of(path)


def _holds(folder: pathlib.Path, path: pathlib.Path) -> bool:
    """Whether a directory holds a file, whatever the spellings, links included."""
    if path.resolve().is_relative_to(folder.resolve()):
        return True
    return any(same_file(path, inner) for inner in folder.iterdir() if inner.is_file())


def _flag(param: click.Parameter) -> str:
    return param.opts[0] if isinstance(param, click.Option) else param.human_readable_name


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
    value = _parsed(_text(path))
    return isinstance(value, dict) and {"base", "models"} <= value.keys()


def is_speeds(path: pathlib.Path) -> bool:
    """What `bench -o` writes: JSON, JSON lines, CSV or a table in Markdown."""
    text = _text(path)
    first = text.partition("\n")[0]
    lines = _parsed(first)
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


def _parsed(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _records(path: pathlib.Path, fields: Collection[str]) -> bool:
    """Whether a file is a JSON object with these fields, or a list of such objects."""
    value = _parsed(_text(path))
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, dict) and set(fields) <= item.keys() for item in items)

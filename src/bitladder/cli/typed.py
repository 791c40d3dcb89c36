"""What is typed: unknown commands get the closest name, and lists and sizes may have spaces in them."""

import pathlib
import re
import stat
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from bitladder.errors import UsageError, did_you_mean
from bitladder.files import close_paths

# The end of a value that is a number, and what is a unit behind it.
_NUMBER, _UNIT = re.compile(r"[0-9]$"), re.compile(r"([KMGT]i?)?B|[KMGT]", re.IGNORECASE)
_FIRST, _LAST = "Options", "Options of all commands"
_COMMON = ("as_json", "quiet", "verbose", "_click_default_help")


class Choice(click.Choice[str]):
    """Words to choose from. An unknown one gets the closest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """The error about an unknown word."""
        del ctx
        return f"no choice {str(value)!r}{did_you_mean(str(value), self.choices, 'there are')}"


class Whole(click.IntRange):
    """A whole number with limits, of which `--help` says nothing: an error does."""

    name = "n"

    def _describe_range(self) -> str:
        return ""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What `click.ParamType` says."""
        number = click.INT.convert(value, param, ctx)
        assert self.min is not None
        if number < self.min or (self.max is not None and number > self.max):
            limits = f"at least {self.min}" if self.max is None else f"from {self.min} to {self.max}"
            self.fail(f"{number} is no number {limits}", param, ctx)
        return number


class FileOrName(click.types.StringParamType):
    """A text that may be a path, such as MODEL: the shell completes files."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """What `click.ParamType` says."""
        del ctx, param
        return [CompletionItem(incomplete, type="file")]


class Named(FileOrName):
    """A text that may be one of some names: the shell completes these; files, where no name fits.

    Parameters:
        names: gives the names. What they come from is imported then, and not for `--help`.
        commas: whether the text is a list, separated by commas.
        files: whether the text may be a path too.
    """

    def __init__(self, names: Callable[[], Iterable[str]], *, commas: bool = False, files: bool = True) -> None:
        self._names, self._commas, self._files = names, commas, files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """What `click.ParamType` says."""
        first, comma, last = incomplete.rpartition(",") if self._commas else ("", "", incomplete)
        items = [CompletionItem(first + comma + name) for name in self._names() if name.startswith(last)]
        if self._files and not (items and last):
            items += super().shell_complete(ctx, param, incomplete)
        return items


class Presets(FileOrName):
    """Presets, separated by commas: the shell completes their names; files, where no name fits.

    Parameters:
        ladders: whether names of ladders may stand among them.
    """

    def __init__(self, *, ladders: bool = False) -> None:
        self._ladders = ladders

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """What `click.ParamType` says."""
        from bitladder.quantize import LADDERS, preset_names

        first, comma, last = incomplete.rpartition(",")
        names = [name for name in preset_names() if name.startswith(last)]
        if isinstance(param, click.Option):  # an argument may be a file, whose name has small letters
            every = (*(LADDERS if self._ladders else ()), *preset_names())
            names = [name for name in every if name.lower().startswith(last.lower())]
        return [CompletionItem(first + comma + name) for name in names] or super().shell_complete(
            ctx, param, incomplete
        )


class InputPath(click.Path):
    """A path that is read. That there is no such file, or directory, is an error in one line, before anything else."""

    def __init__(self, *, file: bool = True, folder: bool = False) -> None:
        super().__init__(file_okay=file, dir_okay=folder, path_type=pathlib.Path)
        self._kind = "file or directory" if file and folder else "directory" if folder else "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What `click.ParamType` says."""
        path, flag = pathlib.Path(value), f"{param.opts[0]} " if isinstance(param, click.Option) else ""
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            raise UsageError(f"{flag}{path}: no such {self._kind}{close_paths(path)}") from error
        if not (self.dir_okay if is_folder else self.file_okay):
            raise UsageError(f"{flag}{path} is a {'directory' if is_folder else 'file'}; name a {self._kind}")
        return path


INPUT, FOLDER, PLACE = InputPath(), InputPath(file=False, folder=True), InputPath(folder=True)


def _texts() -> Iterable[str]:
    from bitladder.text import BUILTIN

    return BUILTIN


def _fetched_texts() -> Iterable[str]:
    from bitladder.hub import TEXTS

    return TEXTS


def _tasks() -> Iterable[str]:
    from bitladder.evaluate import task_meanings

    return task_meanings()


TEXT, FETCHED_TEXT = Named(_texts), Named(_fetched_texts, files=False)
TASK, TASKS = Named(_tasks, files=False), Named(_tasks, commas=True, files=False)


class GroupedOption(click.Option):
    """An option that stands under a heading of `--help`.

    Parameters:
        group: the heading.
        efforts: effort → the value that the option has there; a command with --effort shows it.
    """

    def __init__(
        self, *args: Any, group: str = "", efforts: Mapping[str, Any] = types.MappingProxyType({}), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.group, self.efforts = group, efforts


class _Helpful(click.Command):
    """A command whose `--help` ends in examples and the page that says more.

    Parameters:
        examples: command lines, without "bitladder".
        page: the page of the documentation.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), page: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples, self.page = tuple(examples), page
        if any(param.name == "effort" for param in self.params):
            for param in self.params:
                if isinstance(param, GroupedOption) and param.efforts:
                    said, default, rest = (param.help or "").partition("  [default:")
                    values = ", ".join(f"{name}: {value}" for name, value in param.efforts.items())
                    param.help = f"{said} With --effort {values}.{default}{rest}"

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, and where more is."""
        del ctx
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"  bitladder {example}\n")
        if self.page:
            formatter.write(f"\nMore: docs/{self.page}\n")


class HelpfulCommand(_Helpful):
    """A command whose `--help` has options under headings, then examples and the page that says more."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, those of all commands last."""
        groups: dict[str, list[tuple[str, str]]] = {_FIRST: []}
        common: list[tuple[str, str]] = []
        for param in (param for param in self.get_params(ctx) if isinstance(param, click.Option)):
            record = param.get_help_record(ctx)
            if record is not None:
                title = getattr(param, "group", "") or _FIRST
                (common if param.name in _COMMON else groups.setdefault(title, [])).append(record)
        for title, records in (groups | {_LAST: common}).items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class NamingGroup(_Helpful, click.Group):
    """A group of commands that suggests a name for an unknown one and accepts `--ladder Q4_K_M, Q6_K`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first word names, and the words after it."""
        word = click.utils.make_str(args[0])
        if not word.startswith("-") and self.get_command(ctx, word) is None:
            ctx.fail(f"no command {word!r}{did_you_mean(word, self.list_commands(ctx), 'there are')}")
        name, command, rest = super().resolve_command(ctx, args)
        return name, command, rest if command is None else joined_values(command, rest)


def joined_values(command: click.Command, words: list[str]) -> list[str]:
    """Words of a command line with each list, and each size, in one word.

    A value that ends in a comma goes on in the next word: `--ladder Q4_K_M, Q6_K`. So does the number of a size before
    its unit: `--size 3.7 GiB`.

    Parameters:
        command: the command. Only values of its options that take text are joined.
        words: the words after the command's name.
    """
    options = [
        option
        for option in command.params
        if isinstance(option, click.Option) and isinstance(option.type, click.types.StringParamType)
    ]
    flags = {flag for option in options for flag in option.opts}
    sizes = {flag for option in options if option.metavar == "SIZE" for flag in option.opts}
    joined: list[str] = []
    of = ""  # the flag whose value the last word is
    for word in words:
        unit = of in sizes and _NUMBER.search(joined[-1]) and _UNIT.fullmatch(word)
        if of and not word.startswith("-") and (joined[-1].endswith(",") or unit):
            joined[-1] += word
            continue
        flag, equals, _ = word.partition("=")
        of = joined[-1] if joined and joined[-1] in flags else flag if equals and flag in flags else ""
        joined.append(word)
    return joined

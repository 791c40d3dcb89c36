"""Options of the command line, made from the fields of an `Options` class."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from bitladder.cli.outputs import OutputFolder, OutputPath
from bitladder.cli.typed import PLACE, Choice, FileOrName, GroupedOption, Presets, Whole
from bitladder.options import OptionField, Options, build, flat

Command = Callable[..., Any]


def options_from(
    cls: type[Options],
    *,
    parameter: str = "options",
    leave_out: tuple[str, ...] = (),
    arguments: tuple[str, ...] = (),
    **defaults: Any,
) -> Callable[[Command], Command]:
    """Gives a command one option for each field of `cls` that has a flag, and hands it an object of `cls`.

    If the command has an option --effort, options that nobody typed have their values of that effort.

    Parameters:
        cls: the options; those nested in it are flattened.
        parameter: the name under which the command takes the object.
        leave_out: fields that this command has no option for; they keep their default.
        arguments: fields without a flag that arguments of the command fill.
        defaults: other defaults than the class has, by field name, where a command differs.
    """
    fields = [field for field in flat(cls) if field.name not in leave_out]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def collecting(*args: Any, **kwargs: Any) -> Any:
            values = {field.name: _typed(field, kwargs.pop(field.name)) for field in fields}
            values |= {name: kwargs.pop(name) for name in arguments}
            options = build(cls, values)
            if (effort := values.get("effort", kwargs.get("effort"))) is not None:
                options = options.at_effort(effort, typed(cls))
            return command(*args, **kwargs, **{parameter: options})

        decorated: Command = collecting
        for field in reversed(fields):
            decorated = _click_option(field, defaults.get(field.name, field.default))(decorated)
        return decorated

    return decorate


def typed(cls: type[Options]) -> set[str]:
    """The fields of `cls` whose options stand on the command line of the command that runs."""
    context = click.get_current_context()
    names = (field.name for field in flat(cls))
    return {name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def _typed(field: OptionField, value: Any) -> Any:
    if field.option.commas:
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if field.many else value


def _click_option(field: OptionField, default: Any) -> Callable[[Command], Command]:
    about = field.option
    shown = about.help
    kind: Any = field.item
    if field.item is str and about.names is not None:
        kind = Presets(ladders=about.names == "ladder") if about.names in ("preset", "ladder") else FileOrName()
    if field.choices:
        kind = Choice(field.choices)
    elif field.item is pathlib.Path:
        kind = _path_type(about.writes)
    elif field.item is int and about.least is not None:
        kind = Whole(int(about.least), None if about.most is None else int(about.most))
    if about.efforts:
        shown += f" With --effort {', '.join(f'{name}: {_shown(value)}' for name, value in about.efforts.items())}."
    more: dict[str, Any] = {"type": kind, "metavar": about.metavar}
    if field.item is bool:
        more = {"is_flag": True} if all("/" not in flag for flag in about.flags) else {}
    if field.option.commas:
        default = ",".join(default)
    elif field.many:
        more["multiple"] = True
        shown += " Can be repeated."
    if default is dataclasses.MISSING:
        more["required"] = True
    elif default is None or (field.many and not default):
        shown += f"  [default: {about.unset}]" if about.unset else ""
    elif not more.get("is_flag"):
        more["show_default"] = True
    # None is handed on too: click takes False for a pair of flags without a default.
    if default is not dataclasses.MISSING:
        more["default"] = default
    return click.option(*about.flags, field.name, cls=GroupedOption, group=field.group, help=shown, **more)


def _shown(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _path_type(writes: Any) -> click.Path:
    if writes == "folder":
        return OutputFolder()
    return PLACE if writes is None else OutputPath(writes)

"""Options of the command line: made from the fields of an `Options` class, and those that several commands share.

A command warns in one line of options on its command line that do nothing beside others.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

from bitladder import hub
from bitladder.cli.outputs import OutputFolder, OutputPath, is_quant
from bitladder.cli.typed import INPUT, PLACE, TASKS, TEXT, Choice, FileOrName, GroupedOption, Presets, Whole
from bitladder.convert import ConvertOptions
from bitladder.errors import UsageError
from bitladder.options import Effort, OptionField, Options, build, flat
from bitladder.refine import TuneOptions
from bitladder.show import Output
from bitladder.units import listed

if TYPE_CHECKING:
    from bitladder.ladder import RunOptions


Function = Callable[..., Any]
_NAMED = {"text": TEXT, "tasks": TASKS, "preset": Presets(), "ladder": Presets(ladders=True)}
threads = click.option("-t", "--threads", type=Whole(1), help="Threads of the CPU.  [default: all]")
hours_option = click.option(
    "--hours",
    type=float,
    metavar="N",
    help="Take the highest effort whose estimate is at most N hours, instead of --effort.",
)


def options_from(
    cls: type[Options],
    *,
    parameter: str = "options",
    leave_out: tuple[str, ...] = (),
    arguments: tuple[str, ...] = (),
    **defaults: Any,
) -> Callable[[Function], Function]:
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

    def decorate(command: Function) -> Function:
        @functools.wraps(command)
        def collecting(*args: Any, **kwargs: Any) -> Any:
            values = {field.name: _typed(field, kwargs.pop(field.name)) for field in fields}
            values |= {name: kwargs.pop(name) for name in arguments}
            options = build(cls, values)
            if (effort := values.get("effort", kwargs.get("effort"))) is not None:
                options = options.at_effort(effort, typed(cls))
            return command(*args, **kwargs, **{parameter: options})

        decorated: Function = collecting
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


def _click_option(field: OptionField, default: Any) -> Callable[[Function], Function]:
    about = field.option
    shown = about.help
    kind: Any = field.item
    if field.item is str and about.names is not None:
        kind = _NAMED.get(about.names) or FileOrName()
    if field.choices:
        kind = Choice(field.choices)
    elif field.item is pathlib.Path:
        kind = _path_type(about.writes)
    elif field.item is int and about.least is not None:
        kind = Whole(int(about.least), None if about.most is None else int(about.most))
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
    more["efforts"] = {name: _shown(field, value) for name, value in about.efforts.items() if value != default}
    return click.option(*about.flags, field.name, cls=GroupedOption, group=field.group, help=shown, **more)


def _shown(field: OptionField, value: Any) -> str:
    """A value that an option has at an effort, for `--help`."""
    if value is None:
        return field.option.unset or "none"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _path_type(writes: Any) -> click.Path:
    if writes == "folder":
        return OutputFolder()
    return PLACE if writes is None else OutputPath(writes)


def warn_if_quantized(output: Output, option: str, path: pathlib.Path | None) -> None:
    """Warns of a quant where a full-precision model is meant: what is measured with it is not wrong, but of the quant.

    Parameters:
        output: gets the warning.
        option: the option that names the model.
        path: the model, or None.
    """
    if path is not None and is_quant(path):
        output.progress.warn(f"{option} {path.name} is quantized; give the F16, BF16 or F32 model if you have it")


def calibrating(kind: str, default: str, added: str) -> Callable[[Function], Function]:
    """-m, -f, -o and --in-file of a command that collects figures of texts, or merges files of them.

    Parameters:
        kind: the kind of the file that is written (`cli.outputs`).
        default: its usual name.
        added: what --in-file adds, in a word.
    """
    options = (
        click.option("-m", "--model", type=INPUT, help="Full-precision GGUF."),
        click.option("-f", "--file", "files", multiple=True, type=TEXT, help="Calibration text. Can be repeated."),
        click.option(
            "-o",
            "--output",
            "out",
            default=default,
            show_default=True,
            type=OutputPath(kind, adds_to=("in_files",)),
            help="File to write. It may be one of --in-file, which is then added to.",
        ),
        click.option(
            "--in-file",
            "in_files",
            multiple=True,
            type=INPUT,
            help=f"{added} to add. Can be repeated. Without -f, the files are only merged.",
        ),
    )

    def decorate(command: Function) -> Function:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def guard(what: str) -> Callable[[Function], Function]:
    """--guard: a text on which something must hold."""
    return click.option(
        "--guard",
        type=TEXT,
        default="pydoc:test",
        show_default=True,
        metavar="TEXT",
        help=f"Text on which {what}. Use neither a calibration text nor your evaluation text. none: no check.",
    )


def effort(command: Function) -> Function:
    """--effort of a command whose options have values by effort. It stands above those (`options_from`)."""

    @functools.wraps(command)
    def wrapper(*args: Any, effort: str, **kwargs: Any) -> Any:
        return command(*args, **kwargs)

    return click.option(
        "--effort",
        type=click.Choice(get_args(Effort)),
        default="normal",
        show_default=True,
        help="How much time may be spent; an option that you give counts more.",
    )(wrapper)


def within_hours(options: "RunOptions", hours: float | None) -> "RunOptions":
    """The options with the highest effort that --hours allows. Raises UsageError if --effort is there too."""
    from bitladder.ladder import RunOptions, choose_effort

    if hours is None:
        return options
    chosen = typed(RunOptions)
    if not hours > 0:
        raise UsageError(f"--hours is {hours:g}; it must be more than 0")
    if "effort" in chosen:
        raise UsageError("--effort and --hours both choose the effort: give one of them")
    return choose_effort(options, hours, chosen)


def kept_results(command: Function) -> Function:
    """--cache and --no-cache: gives the command `results`, where results of measurements are kept."""

    @functools.wraps(command)
    def wrapper(*args: Any, cache: pathlib.Path | None, no_cache: bool, **kwargs: Any) -> Any:
        import platformdirs

        from bitladder.evaluate import NoResults, ResultFolder

        folder = platformdirs.user_cache_path("bitladder") / "results" if cache is None else cache
        return command(*args, results=NoResults() if no_cache else ResultFolder(folder), **kwargs)

    folder = click.option(
        "--cache",
        type=OutputFolder(),
        help="Folder where results are kept.  [default: the user's cache folder]",
    )
    none = click.option("--no-cache", is_flag=True, help="Measure everything again, and keep no results and no base.")
    return folder(none(wrapper))


def json_file(kind: str) -> Callable[[Function], Function]:
    """-o of a command that prints JSON: a file of the kind (`cli.outputs`) to write the JSON to."""
    return click.option("-o", "--output", "out", type=OutputPath(kind), help="Write the JSON to this file as well.")


def warn_unused(output: Output, why: str, names: Iterable[str]) -> None:
    """Warns of options on the command line that do nothing.

    Parameters:
        output: gets the warning.
        why: beside what they do nothing, such as "without --tasks".
        names: these options, by the parameters of the command that runs.
    """
    context, names = click.get_current_context(), set(names)
    flags = [
        _flag(param, context.params.get(param.name or ""))
        for param in context.command.params
        if param.name in names and context.get_parameter_source(param.name) is ParameterSource.COMMANDLINE
    ]
    if flags:
        output.progress.warn(f"{listed(flags)} {'has' if len(flags) == 1 else 'have'} no effect {why}")


def names_of(*classes: type[Options], but: tuple[str, ...] = ()) -> set[str]:
    """The names of all fields of some options that have a flag."""
    return {field.name for cls in classes for field in flat(cls)}.difference(but)


def warn_unused_by_run(output: Output, options: "RunOptions") -> None:
    """Warns of options of a run that do nothing beside its others."""
    tuning = names_of(TuneOptions)
    if not options.rounds:
        idle = tuning if options.refine.tuning.tune_chunks else tuning - {"tune_chunks"}
        warn_unused(output, "with --rounding stock", {"moments_chunks", "guard_chunks", *idle})
    elif not options.tunes:
        warn_unused(output, "without --tune-chunks", tuning - {"tune_chunks"})
    if not options.smooths:
        warn_unused(output, "without --smooth", {"scales", "order", "trial_chunks"})
    if options.cluster is None:
        warn_unused(output, "without --cluster", {"share"})
    if options.tasks is None:
        warn_unused(output, "without --tasks", {"task_count"})
    warn_unused_by_conversion(output, options.model, options.conversion)


def warn_unused_by_conversion(output: Output, model: str, options: ConvertOptions) -> None:
    """Warns of options of a conversion that do nothing: with a GGUF all of them."""
    if pathlib.Path(model).is_file() or hub.names_file(model):
        warn_unused(output, f"on {model}, which is a GGUF already", names_of(ConvertOptions))
    elif options.upstream is False and options.converter is not None:
        warn_unused(output, "with --converter", {"upstream"})
    elif options.upstream is False:
        warn_unused(output, "with --native", {"trust_remote_code"})


def _flag(param: click.Parameter, value: object) -> str:
    """The long spelling of an option as it was typed; of an argument its name."""
    if not isinstance(param, click.Option):
        return param.human_readable_name
    spellings = param.secondary_opts if param.secondary_opts and value is False else param.opts
    return next((flag for flag in spellings if flag.startswith("--")), spellings[0])

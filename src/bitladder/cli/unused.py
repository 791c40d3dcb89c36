"""Options that do nothing beside others: a command names those on its command line in a warning of one line."""

import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from bitladder import hub
from bitladder.convert import ConvertOptions
from bitladder.options import Options, flat
from bitladder.refine import TuneOptions
from bitladder.show import Output
from bitladder.units import listed

if TYPE_CHECKING:
    from bitladder.ladder import RunOptions


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

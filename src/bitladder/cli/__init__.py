"""The command line. A file for the verbs of each stage; a verb parses, calls and prints."""

import contextlib
import errno
import importlib
import os
import pathlib
import signal
import sys
import threading
from typing import Any

import click
from click.shell_completion import CompletionItem

from bitladder.cli.typed import NamingGroup
from bitladder.engine import tell_of_deaths
from bitladder.errors import BitladderError, Terminated
from bitladder.show import one_printable_line

# Module → its verbs, each with the first line of its help. A module is imported when a verb of it is used, so that
# `bitladder --help` does not pay for the native library. The command of a verb is VERB_command.
MODULES = {
    "run": {
        "run": "Make the whole ladder: convert, measure, calibrate, quantize, score, and write the card.",
        "estimate": "Show what a run would take: time, memory and disk of each step.",
        "show": "Show the ladder of a run, with a small plot.",
        "card": "Write the model card and the report of a run again.",
        "push": "Upload a finished run to the Hugging Face hub.",
    },
    "inputs": {
        "doctor": "Say whether a model works, and what a run would do with it.",
        "convert": "Convert a Hugging Face checkpoint to a full-precision GGUF.",
        "texts": "List the texts that there are to calibrate on and to measure with, and fetch them.",
        "tasks": "Show what a benchmark holds, and write it for llama-perplexity.",
        "stats": "Show what an importance matrix holds, or how two of them differ.",
    },
    "calibrate": {
        "imatrix": "Compute an importance matrix from calibration texts.",
        "calibrate": "Collect the calibration statistics that --rounding needs, and an imatrix.",
        "smooth": "Rescale channels: the same model, less quantization loss.",
    },
    "recipe": {
        "plan": "Choose the type of each tensor from measured costs, or rank blocks for pruning.",
        "recipe": "Show, check, extract, compare and export recipes: the type of each tensor.",
    },
    "quantize": {
        "quantize": "Quantize a GGUF to a preset or a recipe.",
        "verify": "Make the tensors of a quant, or of a run, again and compare the bytes.",
        "tune": "Tune the scales of a quant: same size, lower KLD.",
    },
    "evaluate": {
        "eval": "Measure perplexity and divergence from the full-precision model.",
        "compare": "Compare quants of one model from any maker: quality, types, origin, winner at equal size.",
        "bench": "Measure prompt processing and text generation in tokens per second.",
    },
}
VERBS = {verb: about for verbs in MODULES.values() for verb, about in verbs.items()}

# What a disk may answer that is full, broken, can only be read, or belongs to somebody else.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EROFS, errno.EACCES, errno.EPERM)


class _LazyGroup(NamingGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for module, verbs in MODULES.items():
            if cmd_name in verbs:
                command: click.Command = getattr(
                    importlib.import_module(f"bitladder.cli.{module}"), f"{cmd_name}_command"
                )
                return command
        return None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Verbs and options. click would import the modules of all verbs."""
        verbs = [CompletionItem(verb, help=text) for verb, text in VERBS.items() if verb.startswith(incomplete)]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    page="index.md",
    examples=("run allenai/OLMo-2-0425-1B --out olmo2-ladder", "show olmo2-ladder", "run --help"),
)
@click.version_option(package_name="bitladder", prog_name="bitladder")
def application() -> None:
    """Turn a Hugging Face language model into a measured ladder of GGUF quants."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 an error in one line, 2 a wrong option, 130 interrupted, 143 terminated."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    tell_of_deaths()
    # The specification of this variable has a path that is not absolute ignored. numba would use it, or make its cache
    # in the current directory.
    if not pathlib.Path(os.environ.get("XDG_CACHE_HOME", os.sep)).is_absolute():
        del os.environ["XDG_CACHE_HOME"]
    code = invoke(arguments)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:  # a full disk, or a reader that has gone
            if not code and stream is sys.stdout and not isinstance(error, BrokenPipeError):
                _tell(f"cannot write the output: {error.strerror}")
            code = code or 1
            # Python would try again when it exits, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def invoke(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; what goes wrong is one line on stderr."""
    try:
        result: Any = application(arguments, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:  # a group without a command; the message is its help
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            # click's own form: the usage, a hint, and the message.
            click.echo(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} -h' for help.\n", err=True)
        _tell(error.format_message(), "Error")
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as stop:
        # click turns every KeyboardInterrupt into an Abort that has it as its context.
        terminated = isinstance(stop, Terminated) or isinstance(stop.__context__, Terminated)
        message, code = "Interrupted. Run the same command to continue.", 143 if terminated else 130
    except BitladderError as error:
        message, code = str(error), error.code
    except BrokenPipeError:
        return 1
    except OSError as error:
        if error.errno not in DISK:
            raise
        place = f" {error.filename}" if error.filename else ""
        message, code = f"cannot write{place}: {error.strerror}", 1
    except MemoryError:
        message, code = "not enough memory; close other programs, or use a smaller -b", 1
    _tell(message)
    return code


def _tell(message: str, who: str = "bitladder") -> None:
    """An error in one line. Nobody hears it without a standard error."""
    with contextlib.suppress(OSError, AttributeError):
        print(f"{who}: {one_printable_line(message)}", file=sys.stderr)

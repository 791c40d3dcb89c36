"""One table of options: defaults, limits, the command line and the words that repeat it come from the fields."""

import dataclasses
import pathlib
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from bitladder.cli import application
from bitladder.cli.options import options_from
from bitladder.engine import Decoding
from bitladder.errors import UsageError
from bitladder.ladder import RunOptions
from bitladder.options import Options, build, option, words


@dataclasses.dataclass(frozen=True)
class Job(Options):
    decoding: Decoding = option(Decoding)
    texts: tuple[str, ...] = option(("a", "b"), "--text", names="text", help="Text.")
    mode: Literal["fast", "good"] = option("good", "--mode", help="Mode.")
    bench: bool = option(True, "--bench/--no-bench", help="Measure.")
    share: float = option(0.5, "--share", least=0, most=1, help="Share.")
    out: pathlib.Path | None = option(None, "--out", names="file", writes="folder", help="Output.")
    smooth: bool | None = option(None, "--smooth/--no-smooth", unset="where it helps", help="Smooth.")
    inner: int = 3  # Python only


@click.command()
@options_from(Job, share=0.25)
def command(options: Job) -> None:
    click.echo(repr(options))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    return str(result.exception or result.output.strip())


def test_the_command_line_gives_the_same_object_as_python():
    given = Job(Decoding(n_ctx=64, threads=2), ("x",), "fast", False, 0.75, pathlib.Path("d/o"))
    line = ["-c", "64", "-t", "2", "--text", "x", "--mode", "fast", "--no-bench", "--share", "0.75", "--out", "d/o"]
    assert run(*line) == repr(given)
    assert run() == repr(Job(share=0.25))
    assert [run(*flags) for flags in ((), ("--smooth",), ("--no-smooth",))] == [
        repr(Job(share=0.25, smooth=smooth)) for smooth in (None, True, False)
    ]


def test_a_run_from_the_command_line_has_the_defaults_of_python(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr("bitladder.ladder.run", lambda options, **_: runs.append(options))
    CliRunner().invoke(application, ["run", "model", "--out", str(tmp_path)])
    assert runs == [RunOptions("model", tmp_path)]


def test_words_repeat_the_options():
    given = Job(Decoding(n_ctx=64, gpu_layers=-1), ("x", "y"), "fast", False, 0.75, pathlib.Path("d/o"))
    assert run(*words(given)) == repr(given)
    assert words(Job()) == []
    assert words(given, {"file": lambda path: path.name})[-2:] == ["--out", "o"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_ctx": 3}, "--ctx-size is 3; it must be at least 4"),
        ({"threads": 0}, "--threads is 0; it must be at least 1"),
        ({"mode": "best"}, "--mode is best; it must be one of fast, good"),
        ({"share": 1.5}, "--share is 1.5; it must be at most 1"),
        ({"share": float("nan")}, "--share is nan; it must be at least 0"),
    ],
)
def test_limits_hold_in_python_too(values, message):
    with pytest.raises(UsageError, match=message):
        build(Job, values)


def test_replace_checks_limits():
    with pytest.raises(UsageError, match="--share"):
        Job().replace(share=-1)


def test_replace_reaches_nested_options():
    assert Job().replace(n_ctx=64, mode="fast") == Job(Decoding(n_ctx=64), mode="fast")
    with pytest.raises(TypeError, match="nothing"):
        Job().replace(nothing=1)


@dataclasses.dataclass(frozen=True)
class Ladder(Options):
    out: pathlib.Path = option(..., "-o", "--out", writes="folder", help="Directory.")
    rungs: tuple[str, ...] = option(("all",), "--ladder", commas=True, help="Rungs.")


def test_commas_and_what_must_be_given():
    @click.command()
    @options_from(Ladder)
    def make(options: Ladder) -> None:
        click.echo(repr(options))

    done = CliRunner().invoke(make, ["--ladder", "Q4_K_M, Q6_K", "-o", "x"])
    assert done.output.strip() == repr(Ladder(pathlib.Path("x"), ("Q4_K_M", "Q6_K")))
    assert words(Ladder(pathlib.Path("x"), ("a", "b"))) == ["--out", "x", "--ladder", "a,b"]
    missing = CliRunner().invoke(make, [])
    assert missing.exit_code == 2
    assert "--out" in missing.output

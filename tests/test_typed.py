"""What a user types: mistyped names, spaces in lists, llama-quantize's own form, and SIGTERM."""

import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from bitladder.cli import application, invoke
from bitladder.cli.recipe import plan_command, recipe_command
from bitladder.cli.run import run_command
from bitladder.cli.typed import joined_values
from bitladder.gguf import GgufFile

DOCS = pathlib.Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qantize"], "no command 'qantize'; did you mean quantize?"),
        (["recipe", "chek"], "no command 'chek'; did you mean check?"),
        (["run", "x", "--out", "y", "--ladder", "Q4_KM"], "--ladder: no preset Q4_KM; did you mean Q4_K_M?"),
        (["quantize", "q4km", "-m", "MODEL", "-o", "y.gguf"], "unknown preset 'q4km'; did you mean Q4_K_M?"),
        (["plan", "-m", "MODEL", "--like", "Q4_KM"], "unknown preset 'Q4_KM'; did you mean Q4_K_M?"),
        (["plan", "-m", "MODEL", "--size", "9M", "--menu", "q5_x"], "no such type; did you mean q5_0 or q5_1 or q5_K?"),
        (["tasks", "helaswag"], "bitladder: there is no task 'helaswag'; did you mean hellaswag?"),
        (["texts", "fetch", "wikitext2"], "did you mean wikitext-2?"),
        (["eval", "-m", "MODEL", "-f", "pydoc:tst"], "did you mean pydoc:test?"),
        (["imatrix", "-m", "MODEL", "-f", "pydoc:calibraton"], "did you mean pydoc:calibration?"),
        (["tune", "MODEL", "-m", "MODEL", "-o", "y.gguf", "-f", "wikitext-2"], "bitladder texts fetch wikitext-2"),
        (["eval", "-m", "MODEL", "--tasks", "helaswag:x"], "no task 'helaswag'; did you mean hellaswag?"),
        (["quantize", "Q4_K_M", "-m", "MODEL", "-o", "y.gguf", "--tensor-type", "attn_v=q6k"], "did you mean q6_K?"),
        (["run", "x", "--out", "y", "--mode", "qualty"], "no choice 'qualty'; did you mean quality?"),
        (["plan", "-m", "MODEL", "--moments", "MODEL", "--rounding", "bst"], "no choice 'bst'; did you mean best?"),
        (["stats", "MODEL", "--by", "teonsr"], "no choice 'teonsr'; did you mean tensor?"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value.rsplit(maxsplit=1)[-1],
)
def test_a_mistyped_name_gets_the_closest_one(words, message, tiny_gguf, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = invoke([str(tiny_gguf) if word == "MODEL" else word for word in words])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["run", "models/tyni", "--out", "d"],
        ["convert", "models/tyni"],
        ["compare", "models/tyni:Q4_K_M", "--base", "MODEL"],
        ["run", "MODEL", "--out", "d", "--compare", "models/tyni:Q4_K_M"],
    ],
    ids=["run", "convert", "compare", "others"],
)
def test_a_mistyped_path_without_a_network(words, tiny_gguf, capsys, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on this port
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert invoke([str(tiny_gguf) if word == "MODEL" else word for word in words]) == 1
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].endswith("here, and the hub cannot be reached")
    assert "Errno" not in error and not (tmp_path / "d" / "ladder.json").exists()


@pytest.mark.parametrize(
    ("line", "close"),
    [
        ("run DIR/tiny-olm --out out", "DIR/tiny-olmo"),
        ("run tiny.ggu --out out", "tiny.gguf"),
        ("estimate tiny.ggu", "tiny.gguf"),
        ("doctor DIR/tiny-olm", "DIR/tiny-olmo"),
        ("convert DIR/tiny-olm -o x.gguf", "DIR/tiny-olmo"),
        ("compare tiny.ggu --base DIR/tiny.gguf", "tiny.gguf"),
        ("bench -m tiny.ggu", "tiny.gguf"),
        ("quantize Q4_K_M -m tiny.ggu -o x.gguf", "tiny.gguf"),
        ("eval -m tiny.gguf -f DIR/tiny.tx", "DIR/tiny.txt"),
        ("eval -m tiny.gguf --tasks hellaswag:tiny.tx", "tiny.txt"),
    ],
)
def test_a_mistyped_path_gets_the_closest_one(line, close, tiny_gguf, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("tiny-olmo").mkdir()
    pathlib.Path("tiny.gguf").write_bytes(tiny_gguf.read_bytes())
    pathlib.Path("tiny.txt").write_text("x")
    words = line.replace("DIR", str(tmp_path)).split()
    assert invoke(words) == 2
    error, close = capsys.readouterr().err, close.replace("DIR", str(tmp_path))
    assert error.endswith(f"; did you mean {close}?\n") and error.count("\n") == 1
    if words[0] in ("run", "estimate", "doctor", "convert", "compare"):
        assert error.startswith(f"bitladder: {words[1]}: no such file or folder here, and no hub id")


def test_no_line_of_huggingface_hub_reaches_the_terminal():
    """Without a network it would write two lines for each attempt before our error. It reads its level on import."""
    asked = "import logging, sys; from bitladder.cli import invoke; invoke(['tasks']); "
    asked += "assert 'huggingface_hub' not in sys.modules; import huggingface_hub.utils; "
    asked += "huggingface_hub.utils.logging.get_logger('huggingface_hub.utils._http').warning('thrown, retrying')"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout and done.stderr == ""


def test_a_quant_is_warned_of_where_full_precision_is_meant(tiny_gguf, capsys, tmp_path):
    quant, out = str(tmp_path / "quant.gguf"), str(tmp_path / "imatrix.gguf")
    assert invoke(["quantize", "Q4_0", "-m", str(tiny_gguf), "-o", quant]) == 0
    capsys.readouterr()
    text = ["-f", "pydoc:test", "-c", "32", "--chunks", "2"]
    kept = ["--no-cache", "--noise-chunks", "0", "--base-file", str(tmp_path / "base")]
    for words, warned in (
        (["imatrix", "-m", quant, *text, "-o", out], "-m"),
        (["eval", "-m", quant, "--base", quant, *text, *kept], "--base"),
        (["verify", quant, "-m", quant], "-m"),
        (["imatrix", "-m", str(tiny_gguf), *text, "-o", out], None),
        (["verify", quant, "-m", str(tiny_gguf)], None),
    ):
        assert invoke([*words, "-q"]) == 0
        warning = f"warning: {warned} quant.gguf is quantized; give the F16, BF16 or F32 model if you have it\n"
        assert capsys.readouterr().err == (warning if warned else "")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("m --ladder Q4_K_M, Q6_K, Q8_0 --out d", "m --ladder Q4_K_M,Q6_K,Q8_0 --out d"),
        ("--ladder=Q4_K_M, Q6_K m", "--ladder=Q4_K_M,Q6_K m"),
        ("a, b --out d, e", "a, b --out d, e"),  # a model and a folder are no lists
        ("m --ladder", "m --ladder"),
        ("m --ladder Q6_K,", "m --ladder Q6_K,"),
        ("m --ladder Q6_K, --mode naive", "m --ladder Q6_K, --mode naive"),
    ],
)
def test_a_list_may_have_spaces(typed, words):
    assert joined_values(run_command, typed.split()) == words.split()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("-m f --size 3.7 GiB -o r", "-m f --size 3.7GiB -o r"),
        ("--vram 8 GB --context 8192", "--vram 8GB --context 8192"),
        ("--size=900 mb", "--size=900mb"),
        ("--size 900 mb", "--size 900mb"),
        ("--size G b", "--size G b"),
        ("--bpw 4 b", "--bpw 4 b"),
    ],
)
def test_a_size_may_have_a_space_before_its_unit(typed, words):
    assert joined_values(plan_command, typed.split()) == words.split()


def helpful(command=application, name=""):
    """Every command that works, with its words."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for word in command.list_commands(context):
            yield from helpful(command.get_command(context, word), f"{name} {word}".strip())
    else:
        yield name, command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", ".", "--height", "200"], "'--height': 200 is no number from 5 to 100"),
        (["show", ".", "--width", "3"], "'--width': 3 is no number at least 40"),
        (["bench", "-m", __file__, "-r", "0"], "'--repetitions': 0 is no number at least 1"),
        (["imatrix", "-m", __file__, "-c", "some"], "'some' is not a valid integer"),
    ],
)
def test_a_number_out_of_its_limits_is_told_them(words, message, capsys):
    assert invoke(words) == 2
    assert message in capsys.readouterr().err


def test_help_ends_in_examples_that_parse_and_a_page():
    for name, command in helpful():
        shown = CliRunner().invoke(command, ["--help"]).output.splitlines()
        assert shown[-1] == f"More: docs/{command.page}" and (DOCS / command.page).is_file()
        assert command.examples and f"  bitladder {command.examples[0]}" in shown
        assert all(len(line) <= 80 and "RANGE" not in line for line in shown[: shown.index("Examples:")])
        for example in command.examples:
            words = shlex.split(example)
            assert " ".join(words).startswith(name)
            # Options, their number of values, choices, and what is required; files need not be there.
            context = click.Context(command, info_name=name)
            values, rest, _ = command.make_parser(context).parse_args(words[len(name.split()) :])
            assert rest == []
            for param in command.params:
                value = values.get(param.name)
                missing = value is None or value is click.core.UNSET
                assert not (param.required and missing), f"{example}: no {param.name}"
                if isinstance(param.type, click.Choice) and not missing:
                    param.type.convert(value, param, context)


def test_help_has_one_wording_for_all_commands():
    """Only a command that has --effort speaks of it; a range and Python's None are not shown."""
    for name, command in helpful():
        context, own = click.Context(command), {param.name for param in command.params}
        for param in command.get_params(context):
            if not isinstance(param, click.Option) or param.get_help_record(context) is None:
                continue
            shown = " ".join(param.get_help_record(context)[1].split())
            where = f"{name} {param.opts[0]}: {shown}"
            assert ("With --effort" not in shown) or "effort" in own, where
            assert not re.search(r"\bNone\b|[<>]=|For run|\b[Mm]ay be repeated", shown), where
            assert param.help, where
            assert param.multiple == ("Can be repeated." in shown), where
    helps = {name: CliRunner().invoke(command, ["--help"]).output for name, command in helpful()}
    shown = {name: " ".join(text.split()) for name, text in helps.items()}
    assert "With --effort fast: 20, high: all." in shown["run"] and "With --effort fast: 20" in shown["estimate"]
    assert "With --effort fast: 4, high: 12. [default: 6; to prune 4]" in shown["plan"]
    assert "With --effort fast: 2, high: as many as --chunks." in shown["plan"]


def test_help_of_groups_ends_in_examples_and_a_page_too():
    leaves = {name for name, _ in helpful()}
    context = click.Context(application)
    groups = {"": application} | {
        word: command
        for word in application.list_commands(context)
        if isinstance(command := application.get_command(context, word), click.Group)
    }
    assert groups.keys() == {"", "texts", "recipe"}
    for name, group in groups.items():
        shown = CliRunner().invoke(group, ["--help"]).output.splitlines()
        assert shown[-1] == f"More: docs/{group.page}" and (DOCS / group.page).is_file()
        for example in group.examples:
            assert f"  bitladder {example}" in shown and example.startswith(name)
            assert any(f"{example} ".startswith(f"{leaf} ") for leaf in leaves)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("pl", {"plan"}),
        ("run m --mode q", {"quality"}),
        ("run m --ladder Q4_K_M,q6", {"Q4_K_M,Q6_K"}),
        ("estimate m --ladder pub", {"publish"}),
        ("plan -m m --like l", {"file"}),
        ("quantize Q5_K", {"Q5_K_M", "Q5_K_S"}),
        ("recipe e", {"extract", "export"}),
        ("run model", {"file"}),
        ("run m --text py", {"pydoc:calibration", "pydoc:test"}),
        ("run m --text papers", {"file"}),
        ("run m --calibration pydoc:c", {"pydoc:calibration"}),
        ("calibrate -f pydoc:t", {"pydoc:test"}),
        ("compare m --base m -f pydoc:t", {"pydoc:test"}),
        ("plan -f pydoc:t", {"pydoc:test"}),
        ("tune q --guard pydoc:t", {"pydoc:test"}),
        ("texts fetch w", {"wikitext-2"}),
        ("tasks hel", {"hellaswag"}),
        ("eval --tasks arc,hel", {"arc,hellaswag"}),
        ("eval --mo", {"--model"}),
    ],
)
def test_the_shell_completes(words, completed):
    *before, last = words.split()
    items = ShellComplete(application, {}, "bitladder", "_BITLADDER_COMPLETE").get_completions(before, last)
    assert {item.value if item.type == "plain" else item.type for item in items} == completed


def test_groups_show_their_commands():
    shown = CliRunner().invoke(recipe_command, ["--help"])
    assert shown.exit_code == 0
    assert "extract" in shown.output


def test_the_form_of_llama_quantize(tiny_gguf, tmp_path):
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert invoke(["quantize", "Q4_0", "-m", str(tiny_gguf), "-o", str(ours)]) == 0
    assert invoke(["quantize", str(tiny_gguf), str(theirs), "Q4_0", "1"]) == 0
    assert ours.read_bytes() == theirs.read_bytes()
    with GgufFile(theirs) as file:
        assert any(tensor.type.name == "q4_0" for tensor in file.tensors.values())


def test_the_form_of_llama_quantize_overwrites_no_input(tiny_gguf, tmp_path, capsys):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny_gguf.read_bytes())
    assert invoke(["quantize", str(copy), str(copy), "Q4_0"]) == 2
    assert "is an input" in capsys.readouterr().err
    assert copy.read_bytes() == tiny_gguf.read_bytes()


@pytest.mark.parametrize("words", [["IN", "OUT"], ["IN", "OUT", "Q4_0", "many"], ["IN", "OUT", "Q4_0", "-t", "1", "2"]])
def test_other_forms_are_refused(words, tiny_gguf, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    assert invoke(["quantize", *({"IN": str(tiny_gguf), "OUT": str(out)}.get(word, word) for word in words)]) == 2
    assert "IN.gguf OUT.gguf PRESET [THREADS]" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "target", [["--size", "5"], ["--kld", "0"], ["--kld", "nan"], ["--bpw", "0.1"], ["--size", "5GB"], ["--bpw", "9"]]
)
def test_an_impossible_target_is_refused_before_measuring(target, tiny_gguf, tmp_path, capsys):
    work = tmp_path / "work"
    assert invoke(["plan", "-m", str(tiny_gguf), *target, "--work", str(work), "-o", str(tmp_path / "o.toml")]) in (
        1,
        2,
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "smallest possible file" in error or "--kld is" in error or "room for more than Q8_0" in error
    assert not work.exists()


MISSING = """
run gone.gguf --out out
run ./gone/dir --out out
estimate gone.gguf
doctor gone.gguf
convert gone -o x.gguf
imatrix -m gone.gguf -f pydoc:calibration -o i.gguf
calibrate -m gone.gguf -f pydoc:calibration -o m.gguf
smooth -m gone.gguf --imatrix gone.gguf -o x.gguf
quantize Q4_K_M -m gone.gguf -o x.gguf
quantize gone.gguf x.gguf Q4_K_M
tune gone.gguf -m gone.gguf -o x.gguf
plan -m gone.gguf --like Q4_K_M
eval -m gone.gguf
bench -m gone.gguf
compare gone.gguf --base gone.gguf
stats gone.gguf
verify gone.gguf -m gone.gguf
recipe show gone.toml
recipe check gone.toml -m gone.gguf
recipe diff gone.toml gone.gguf
recipe extract gone.gguf
recipe export gone.toml
show gone
card gone
push gone someone/model
"""


@pytest.mark.parametrize("line", MISSING.strip().splitlines())
def test_a_name_that_stands_for_no_file_is_a_wrong_option_in_every_command(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(line.split()) == 2
    assert "gone" in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())


def test_a_group_without_a_command_shows_its_help(capsys):
    assert invoke(["recipe"]) == 2
    assert "Commands:" in capsys.readouterr().err.splitlines()


def test_a_cache_folder_that_is_not_absolute_is_ignored(tmp_path, monkeypatch):
    """By the specification of XDG_CACHE_HOME. numba made its cache in the current directory."""
    asked = "import os; from bitladder.cli import main\ntry: main(['--version'])\n"
    asked += "finally: print(os.environ.get('XDG_CACHE_HOME'))"
    for value in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "None"


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
def test_sigterm_stops_as_ctrl_c_does(tiny_gguf, calibration_text, tmp_path):
    out = tmp_path / "imatrix.gguf"
    words = ["imatrix", "-m", str(tiny_gguf), "-f", str(calibration_text), "-o", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bitladder", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    line = process.stderr.readline()  # the work has begun
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert (process.returncode, (line + rest).splitlines()[-1]) == (
        143,
        "bitladder: Interrupted. Run the same command to continue.",
    )
    assert [path for path in pathlib.Path(tmp_path).iterdir() if path.suffix == ".tmp"] == []

import pathlib

import pytest
from plain_options import plain_options

from bitladder.errors import UsageError
from bitladder.keys import key_of
from bitladder.ladder.options import RunOptions, choose_rungs, command_line
from bitladder.ladder.plan import steps_of
from bitladder.ladder.source import file_stem
from bitladder.quantize import LADDERS

RUNGS = ("Q4_K_M", "Q8_0")
SOURCES = {"model", "converter", "text", "calibration", "tasks"}


def options(**changes) -> RunOptions:
    return plain_options(**{"model": "org/name", "out": pathlib.Path("/somewhere/out"), "rungs": RUNGS} | changes)


def differing(**changes) -> list[str]:
    """Steps whose own options change, and those that read them."""

    def key(step):
        return step.needs, key_of({"options": step.decides()})

    before = {step.name: key(step) for step in steps_of(options())}
    changed: list[str] = []
    for step in steps_of(options(**changes)):
        if before.get(step.name) != key(step) or any(need in changed for need in step.needs):
            changed.append(step.name)
    return changed


def test_every_step_comes_after_those_it_needs():
    done = set(SOURCES)
    for step in steps_of(options(converter=pathlib.Path("x.py"))):
        assert set(step.needs) <= done
        done.add(step.name)
    assert [step.name for step in steps_of(options())] == [
        "convert", "memory", "base", "measure base", "imatrix", "quantize Q4_K_M", "measure Q4_K_M", "quantize Q8_0",
        "measure Q8_0", "bench", "score base", "score Q4_K_M", "score Q8_0",
    ]  # fmt: skip


def test_an_option_changes_only_what_depends_on_it():
    measured, scored = ([f"{verb} {name}" for name in ("base", *RUNGS)] for verb in ("measure", "score"))
    assert differing(quantized_by="me") == []
    assert differing(threads=3) == ["bench", *scored]
    assert differing(bench=False) == scored
    assert differing(chunks=5) == ["base", *measured, *scored]
    assert differing(imatrix_chunks=5) == [
        "imatrix", "quantize Q4_K_M", "measure Q4_K_M", "quantize Q8_0", "measure Q8_0", "bench", *scored,
    ]  # fmt: skip
    assert differing(tasks="continuation:x.txt") == [*measured, *scored]
    assert differing(rungs=("Q8_0",)) == ["bench", "score base", "score Q8_0"]
    assert differing(rungs=(*RUNGS, "Q6_K")) == ["quantize Q6_K", "measure Q6_K", "bench", *scored, "score Q6_K"]
    assert len(differing(outtype="f32")) == 13
    assert differing(gpu_layers=10) == [step.name for step in steps_of(options())][2:]
    # How many layers are on the GPU decides speed, and nothing else.
    ten, all_of_them = steps_of(options(gpu_layers=10)), steps_of(options(gpu_layers=99))
    pairs = zip(ten, all_of_them, strict=True)
    assert [one.name for one, other in pairs if key_of(one.decides()) != key_of(other.decides())] == ["bench"]


def test_choosing_rungs():
    assert choose_rungs(("seed",)) == LADDERS["seed"] and len(LADDERS["seed"]) == 12
    assert choose_rungs(("q8_0", "Q4_K_M", "q8_0")) == ("Q8_0", "Q4_K_M")
    assert choose_rungs(("LOW", "iq2_m", "Q8_0")) == (*LADDERS["low"], "Q8_0")
    for wrong, close in (
        ("zebra", "zebra; the ladders and presets are seed, publish, low, IQ1_M"),
        ("publsh", r"publsh; did you mean publish\?"),
        ("f16", "f16; "),
        ("all", "all; "),
    ):
        with pytest.raises(UsageError, match=f"--ladder: no preset {close}"):
            choose_rungs(("Q8_0", wrong))
    with pytest.raises(UsageError, match="no preset is named"):
        choose_rungs(())


def test_the_command_names_no_paths():
    plain = "bitladder run org/name --out out --mode naive --rounding stock"
    assert command_line(options(rungs=LADDERS["seed"]), "org/name") == plain
    full = options(
        texts=("/home/me/my text.txt", "pydoc:test"),
        calibration=("/a/b.txt", "pydoc:test"),
        converter=pathlib.Path("/opt/c.py"),
        threads=2,
        tasks="arc:/a/arc.bin,mmlu,continuation:pydoc:test",
        bench=False,
        datasets=("org/texts",),
    )
    line = command_line(full, "name")
    assert line == (
        "bitladder run name --out out --ladder Q4_K_M,Q8_0 --calibration b.txt --calibration pydoc:test"
        " --text 'my text.txt' --text pydoc:test --mode naive --rounding stock"
        " --tasks arc:arc.bin,mmlu,continuation:pydoc:test --no-bench --converter c.py --threads 2"
        " --calibration-dataset org/texts"
    )


def test_file_names_follow_the_convention():
    general = {"general.name": "A b", "general.basename": "Base", "general.size_label": "1B"}
    general["general.finetune"] = "it/x"
    assert file_stem(general, "file") == "Base-1B-it-x"
    assert file_stem({"general.name": "My Model"}, "file") == "My-Model"
    assert file_stem({}, "thing-F16") == "thing"

"""`run --compare`: files of somebody else in the run directory, from disk and from a hub of our own."""

import json
import shutil

import fake_hub
import pytest
import tiny_models
from plain_options import plain_options

from bitladder.calibrate import read_imatrix
from bitladder.convert import convert
from bitladder.errors import BitladderError, UsageError
from bitladder.hub import Fetched
from bitladder.ladder import run
from bitladder.ladder import source as module
from bitladder.ladder.options import command_line
from bitladder.ladder.source import find_others, locate
from bitladder.recipe import read_recipe
from bitladder.report import read_run
from bitladder.rundir import Layout, load_manifest

REPO = "someone/Tiny-GGUF"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that this process talks to instead of huggingface.co."""
    with fake_hub.instead_of_the_hub(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def options(small_run, tiny_checkpoint, tmp_path):
    """The options of the finished run, for a copy of it."""
    folder = shutil.copytree(small_run, tmp_path / "run")
    return plain_options(
        model=str(tiny_checkpoint), out=folder, rungs=("Q4_K_M", "Q8_0"), chunks=8, imatrix_chunks=4, n_ctx=128,
        bench=False, threads=1,
    )  # fmt: skip


def test_measured_like_the_rungs_and_only_once(options, small_run, hub):
    ours = small_run / "Tiny-Olmo2-8.9M-Q8_0.gguf"
    hub.add(REPO, {"theirs-Q8_0.gguf": ours.read_bytes()})
    told = []
    asked = options.replace(compare=(f"{REPO}:Q8_0",))
    result = run(asked, watch=told.append)
    assert hub.downloads == ["theirs-Q8_0.gguf"]
    assert run(asked).made == ()  # complete, and not fetched again
    assert hub.downloads == ["theirs-Q8_0.gguf"]
    name = "someone_theirs-Q8_0"
    assert result.made == (f"measure {name}", f"score {name}")
    assert result.labels == ("base", "Q4_K_M", "Q8_0", name)
    theirs, rung = (json.loads((options.out / "scores" / f"{one}.json").read_text()) for one in (name, "Q8_0"))
    assert (theirs["role"], theirs["source"]) == ("third-party", REPO)
    assert "doubts" not in theirs
    # It is our own Q8_0 under another name, so its figures are the rung's.
    assert theirs["sha256"] == rung["sha256"]
    assert theirs["kld"] == rung["kld"] and theirs["ppl"] == rung["ppl"]
    assert load_manifest(options.out).run.compared == (name,)
    assert [one.label for one in read_run(options.out).others] == [name]
    assert not (options.out / "theirs-Q8_0.gguf").exists()
    assert set(told[-1].best) == {"Q4_K_M", "Q8_0"}  # of rungs, whoever else is measured
    assert f"--compare {REPO}:Q8_0" in command_line(asked, "x")


def test_another_content_is_measured_again(options, small_run, tmp_path):
    other = tmp_path / "other.gguf"
    asked = options.replace(compare=(str(other),))
    shutil.copy(small_run / "Tiny-Olmo2-8.9M-Q8_0.gguf", other)
    assert run(asked).made == ("measure other", "score other")
    shutil.copy(small_run / "Tiny-Olmo2-8.9M-Q4_K_M.gguf", other)
    assert run(asked).made == ("measure other", "score other")
    assert "--compare other.gguf" in command_line(asked, "x")  # no path of this machine
    again = run(options)  # left out again: the ladder is complete without it
    assert again.made == () and again.labels == ("base", "Q4_K_M", "Q8_0")
    assert load_manifest(options.out).run.compared == ()


def test_a_file_of_another_model_is_refused_before_the_work(options, tmp_path):
    source = tmp_path / "llama"
    tiny_models.train_byte_level(source)
    tiny_models.llama(source)
    convert(source, tmp_path / "llama.gguf", outtype="f16")
    asked = options.replace(compare=(str(tmp_path / "llama.gguf"),), out=tmp_path / "new")
    with pytest.raises(
        BitladderError, match=r"--compare llama\.gguf is not a quant of this model: another architecture"
    ):
        run(asked)
    assert list(load_manifest(tmp_path / "new").steps) == ["convert"]


def test_what_is_no_model_is_refused_before_a_directory_is_made(options, small_run, tmp_path):
    (tmp_path / "text.txt").write_text("GGUF")
    for spec in ("absent.gguf", str(tmp_path / "text.txt"), str(small_run / "imatrix.gguf")):
        with pytest.raises((BitladderError, UsageError)):
            run(options.replace(compare=(spec,), out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_every_file_has_a_name_of_its_own(small_run, tmp_path, monkeypatch):
    ours = small_run / "Tiny-Olmo2-8.9M-Q8_0.gguf"
    files = {}
    for place, name in enumerate(("base.gguf", "Q4_K_M.gguf", "a b.gguf", "a-b.gguf", "x.naive.gguf")):
        path = tmp_path / str(place) / name
        path.parent.mkdir()
        path.symlink_to(ours)
        files[str(place)] = Fetched(path, "me/x" if place == 3 else None)
    monkeypatch.setattr(module, "fetch", lambda spec, option: files[spec])
    found = find_others([*files, "3", "2"], ("base", "Q4_K_M", "Q8_0"))
    assert [one.name for one in found] == ["base-2", "Q4_K_M-2", "a-b", "me_a-b", "x", "me_a-b-2", "a-b-2"]


def test_the_model_itself_may_be_a_gguf_of_the_hub(small_run, hub):
    full = (small_run / "Tiny-Olmo2-8.9M-BF16.gguf").read_bytes()
    hub.add(REPO, {"model-Q8_0.gguf": b"GGUF", "model-BF16.gguf": full})
    source = locate(f"{REPO}:BF16")
    assert source.is_gguf and source.name == "model-BF16.gguf"
    assert source.path.read_bytes() == full
    assert hub.downloads == ["model-BF16.gguf"]


def test_chunks_of_the_imatrix_are_those_of_its_file(tiny_gguf, tmp_path):
    """Seven chunks, four and three side by side; six tokens of the three are left out, as in llama-imatrix."""
    out = tmp_path / "ladder"
    run(plain_options(model=str(tiny_gguf), out=out, rungs=("Q8_0",), chunks=1, imatrix_chunks=7, bench=False))
    used = read_recipe(Layout(out).recipe("Q8_0")).imatrix
    assert used.chunks == read_imatrix(Layout(out).imatrix).chunk_count == 6

"""Estimates: shapes against files and transformers, amounts against recorded runs, room against what runs wrote."""

import dataclasses
import importlib
import json
import pathlib
import shlex
import shutil
import subprocess
from typing import get_args

import fake_hub
import pytest
from click.testing import CliRunner
from kills import tiny_run
from plain_options import plain_options

from bitladder.calibrate import MomentsFile, RoundingMomentsOptions, collect_job, job_for_rounding
from bitladder.cli import application
from bitladder.engine import Decoding
from bitladder.errors import BitladderError, UsageError
from bitladder.gguf import GgufFile
from bitladder.ladder import Machine, RunOptions, choose_effort, cost, diagnose, estimate, run
from bitladder.ladder.estimate import extent_of, measure_machine, shape_of
from bitladder.ladder.options import command_line
from bitladder.ladder.plan import steps_of
from bitladder.ladder.steps.step import Part
from bitladder.options import Effort
from bitladder.quantize import quantize
from bitladder.rundir import Layout
from bitladder.text import load_text

CONFIGS = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mixtral": {"num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
}
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 320}


@pytest.mark.parametrize("kind", CONFIGS)
def test_shapes_from_headers_and_from_config_alone_agree_with_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    values = SIZES | CONFIGS[kind]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **values))
    folder = tmp_path / "whole"
    model.save_pretrained(folder)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    blocks = [weight for name, weight in model.model.layers.named_parameters() if weight.dim() > 1]
    share = {"mixtral": 2 / 6}.get(kind, 1)
    active = sum(w.numel() * (share if w.dim() == 3 else 1) for w in blocks)
    for path in (folder, bare):
        shape = shape_of(str(path))
        assert (shape.blocks, shape.width, shape.vocabulary) == (3, 64, 320)
        assert shape.tied == model.config.tie_word_embeddings
        assert shape.weights == pytest.approx(model.num_parameters(), rel=0.02)
        # A router is no matrix of config.json's.
        assert shape.active == pytest.approx(active, rel=0.02)
    assert shape.head_size == 64 // values["num_attention_heads"]


def test_a_gguf_and_its_checkpoint_have_one_shape(tiny_gguf, tiny_checkpoint):
    converted, checkpoint = shape_of(str(tiny_gguf)), shape_of(str(tiny_checkpoint))
    assert converted.bytes == tiny_gguf.stat().st_size
    assert sorted(map(str, converted.matrices)) == sorted(map(str, checkpoint.matrices))
    assert (converted.weights, converted.head_size) == (checkpoint.weights, checkpoint.head_size)


def test_files_of_moments_have_the_bytes_of_the_formula(tiny_gguf, tmp_path):
    pytest.importorskip("torch")
    shape, files = shape_of(str(tiny_gguf)), [tmp_path / "weighted.gguf", tmp_path / "plain.gguf"]
    for path, kind in zip(files, ("weighted", "plain"), strict=True):
        job = job_for_rounding(
            tiny_gguf,
            [load_text("pydoc:calibration")],
            kind,
            options=RoundingMomentsOptions(moments_chunks=8),
            decoding=Decoding(n_ctx=64, threads=1),
        )
        collect_job(job, path)
    for path, gradients in zip(files, (True, False), strict=True):
        with MomentsFile(path) as moments:
            assert moments.provenance.weighting == ("gradients" if gradients else "tokens")
        # The head has an entry, which the formula leaves out.
        head = 2 * shape.width**2
        assert path.stat().st_size == pytest.approx(cost.moments_bytes(shape, gradients=gradients) + head, rel=0.15)


def test_the_disk_of_a_run_is_what_was_estimated(tiny_checkpoint, small_run):
    options = plain_options(model=str(tiny_checkpoint), rungs=("Q4_K_M", "Q8_0"), chunks=8, n_ctx=128, bench=False)
    expected = estimate(options, machine=Machine())
    written = sum(path.stat().st_size for path in small_run.rglob("*") if path.is_file())
    assert written == pytest.approx(expected.kept_bytes, rel=0.1)
    assert expected.disk_bytes >= expected.kept_bytes


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of some bytes, and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size):
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a small file system")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def test_a_run_fits_on_a_disk_of_its_estimate_and_is_refused_on_a_smaller_one(tiny_gguf, small_disk):
    chunks = {"chunks": 4, "imatrix_chunks": 4, "n_ctx": 128, "bench": False, "threads": 1}
    options = plain_options(model=str(tiny_gguf), rungs=("Q4_K_M", "IQ3_S"), **chunks)
    needed = estimate(options, machine=Machine()).disk_bytes
    small = small_disk(needed * 9 // 10)
    options = options.replace(out=small / "out")
    with pytest.raises(BitladderError, match=r"the step .* needs about .* GB of the disk, which has .* GB free"):
        run(options)
    assert not options.out.exists()
    # JSON, recipes and blocks of the file system are not counted.
    subprocess.run(["mount", "-o", f"remount,size={needed + (2 << 20)}", str(small)], check=True)
    assert set(run(options).rungs) == {"Q4_K_M", "IQ3_S"}


def test_what_no_later_step_reads_is_deleted_so_that_a_run_fits_on_a_smaller_disk(small_disk, tmp_path):
    """The whole way: second moments, smoothing, prices, a plan, rounding and tuning."""
    options = tiny_run(tmp_path, tmp_path / "other")
    released = options.replace(release=True)
    needed, less = (estimate(each, machine=Machine()).disk_bytes for each in (options, released))
    small = small_disk((needed + less) // 2)
    with pytest.raises(BitladderError, match=f"choose --release, which needs {less / 1e9:.3g} GB, fewer rungs"):
        run(options.replace(out=small / "out"))
    # JSON, recipes and blocks of the file system are not counted.
    subprocess.run(["mount", "-o", f"remount,size={less + (2 << 20)}", str(small)], check=True)
    result, other = run(released.replace(out=small / "out")), run(options)
    assert not Layout(result.folder).work.exists() and Layout(other.folder).work.exists()
    for path in (path for path in result.folder.rglob("*") if path.is_file() and path.name != "ladder.json"):
        assert path.read_bytes() == (other.folder / path.relative_to(result.folder)).read_bytes(), path


def test_more_work_takes_longer():
    def of(**changes):
        options = RunOptions("examples/tiny-olmo2", pathlib.Path("out")).replace(**{"threads": 1} | changes)
        return estimate(options, machine=Machine())

    few, many = of(rungs=("Q4_K_M",)), of(rungs=("Q4_K_M", "Q6_K"))
    assert few.core_seconds < many.core_seconds and few.disk_bytes < many.disk_bytes
    naive = of(rungs=("Q4_K_M",), mode="naive", method="stock")
    assert naive.core_seconds < few.core_seconds / 3


def test_a_machine_is_measured_in_multiples_of_the_reference():
    machine = measure_machine(1, rounds=False)
    assert all(0.02 < rate < 50 for rate in (machine.products, machine.blas, machine.quantization))


def test_what_the_library_quantizes_takes_time_by_its_own_rate():
    machine = Machine(kernels=2.0, quantization=0.5)
    assert machine.seconds(Part("rounding", 10.0, rate="kernels", library=4.0)) == pytest.approx(6 / 2 + 4 / 0.5)


def test_the_command(tmp_path, monkeypatch):
    module = importlib.import_module("bitladder.ladder.estimate")  # the package has a function of this name
    monkeypatch.setattr(module, "measure_machine", lambda *_, **__: Machine(threads=2))
    words = ["estimate", "examples/tiny-olmo2", "-t", "2", "--ladder", "Q4_K_M, Q6_K", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(application, words, catch_exceptions=False)
    assert done.exit_code == 0 and "quantize × 2" in done.stdout and "total: about" in done.stdout
    done = CliRunner().invoke(application, [*words, "--json"], catch_exceptions=False)
    document = json.loads(done.stdout)
    assert document["seconds"] == pytest.approx(document["core_seconds"] / 2)
    assert document["memory_bytes"] == max(stage["memory_bytes"] for stage in document["stages"])
    assert not (tmp_path / "out").exists()


def test_bands_share_the_limit_of_rendered_blocks(tiny_gguf):
    rungs = ("Q4_K_M", "Q3_K_M", "IQ2_M", "Q4_0")
    options = plain_options(model=str(tiny_gguf), rungs=rungs, mode="quality", smooth=False)

    def kept(limit):
        planning = options.planning.replace(cache_bytes=limit, menu="all")
        shape, changed = shape_of(str(tiny_gguf)), dataclasses.replace(options, planning=planning)
        extent = extent_of(changed, shape, [load_text("pydoc:test")], [load_text("pydoc:test")], {}, models=5)
        return [step.room(extent).work for step in steps_of(changed) if step.verb == "price"]

    assert len(kept(10**9)) == 4 and sum(kept(10**9)[:2]) == pytest.approx(10 * shape_of(str(tiny_gguf)).weights)
    assert sum(kept(1000)) == 1000


def test_what_has_no_cost_is_refused(tiny_gguf, tmp_path):
    quantize(tiny_gguf, tmp_path / "q.gguf", "Q8_0")
    with pytest.raises(BitladderError, match=r"q.gguf is quantized already \(.* is q8_0\)"):
        estimate(plain_options(model=str(tmp_path / "q.gguf"), rungs=("Q4_K_M",)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BitladderError, match="config.json has no hidden_size"):
        shape_of(str(tmp_path))


def test_of_a_gguf_on_the_hub_only_the_header_is_fetched(tiny_gguf, tmp_path, monkeypatch):
    with fake_hub.instead_of_the_hub(monkeypatch, tmp_path / "cache") as server:
        server.add("someone/Tiny-GGUF", {"tiny-F16.gguf": tiny_gguf.read_bytes()})
        # The first beginnings end within the metadata, and within the tensors.
        with GgufFile(tiny_gguf) as file:
            end = file.data_start
        monkeypatch.setattr("bitladder.ladder.model_shape._BEGINNINGS", (1000, end // 2, end - 300, 2 * end))
        for name in ("someone/Tiny-GGUF:F16", "someone/Tiny-GGUF/tiny-F16.gguf"):
            assert shape_of(name) == shape_of(str(tiny_gguf))
        assert server.sent < 10 * end < tiny_gguf.stat().st_size
        about, here = diagnose("someone/Tiny-GGUF:F16"), diagnose(str(tiny_gguf))
        assert about.works and about.source == "GGUF on the hub" and about.shape == here.shape
        with pytest.raises(BitladderError, match="no such GGUF in someone/Tiny-GGUF; it has tiny-F16.gguf"):
            shape_of("someone/Tiny-GGUF:Q8_0")
        monkeypatch.setattr("bitladder.ladder.model_shape._BEGINNINGS", (1000,))
        with pytest.raises(BitladderError, match=r"F16: the first 1,000 bytes hold no whole header: tiny-F16.gguf"):
            shape_of("someone/Tiny-GGUF:F16")


def test_a_mirror_that_ignores_ranges_does_not_send_the_whole_file(tiny_gguf, tmp_path, monkeypatch):
    with fake_hub.instead_of_the_hub(monkeypatch, tmp_path / "cache") as server:
        server.ranges = False
        server.add("someone/Tiny-GGUF", {"tiny-F16.gguf": tiny_gguf.read_bytes() + bytes(64 << 20)})
        with GgufFile(tiny_gguf) as file:
            monkeypatch.setattr("bitladder.ladder.model_shape._BEGINNINGS", (2 * file.data_start,))
        assert shape_of("someone/Tiny-GGUF:F16").weights == shape_of(str(tiny_gguf)).weights
        assert server.sent < 32 << 20  # the rest of what a socket holds


def test_a_run_that_does_not_fit_into_memory_is_refused(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setattr("bitladder.ladder.checks.main_memory", lambda: 50 << 20)
    options = plain_options(model=str(tiny_gguf), out=tmp_path / "out", rungs=("Q8_0",), chunks=2)
    with pytest.raises(BitladderError, match=r"the step .* needs about .* GB of memory, and this machine has 0.1 GB"):
        run(options)
    assert not options.out.exists()


def options_of(*words, monkeypatch):
    """The options that `bitladder run` makes of its command line."""
    seen = []
    monkeypatch.setattr("bitladder.ladder.run", lambda options, **_: seen.append(options))
    done = CliRunner().invoke(application, ["run", *words])
    assert seen, done.output
    return seen[0]


@pytest.mark.parametrize("effort", get_args(Effort))
def test_what_is_typed_counts_more_than_the_effort(effort, tmp_path, monkeypatch):
    words = ["examples/tiny-olmo2", "--out", str(tmp_path / "out"), "--effort", effort]
    plain = options_of(*words, monkeypatch=monkeypatch)
    usual = RunOptions(words[0], tmp_path / "out")
    assert plain == usual.at_effort(effort) and (plain == usual) == (effort == "normal")
    # Neither is the default of each effort.
    typed = options_of(*words, "--tune-chunks", "0", "--rounding", "best", monkeypatch=monkeypatch)
    assert typed.refine.tuning.tune_chunks == 0 and typed.refine.rounding.method == "best"
    assert typed.planning == plain.planning
    for options in (plain, typed):
        again = shlex.split(command_line(options, options.model))[2:]
        again[again.index("--out") + 1] = str(options.out)
        assert options_of(*again, monkeypatch=monkeypatch) == options


def test_less_effort_costs_less():
    options = RunOptions("examples/tiny-olmo2", pathlib.Path("out")).replace(rungs=("Q4_K_M",))
    seconds = [estimate(options.at_effort(name), machine=Machine()).seconds for name in get_args(Effort)]
    assert seconds[0] < 0.7 * seconds[1] and seconds[1] < 0.7 * seconds[2]


def test_hours_choose_the_effort(monkeypatch):
    monkeypatch.setattr(importlib.import_module("bitladder.ladder.estimate"), "measure_machine", lambda _: Machine())
    options = RunOptions("examples/tiny-olmo2", pathlib.Path("out")).replace(rungs=("Q4_K_M",))
    hours = {name: estimate(options.at_effort(name), machine=Machine()).seconds / 3600 for name in get_args(Effort)}
    for name, enough in hours.items():
        assert choose_effort(options, 1.01 * enough).effort == name
    assert choose_effort(options, 1.01 * hours["fast"], {"passes"}).refine.rounding.passes == 2
    with pytest.raises(UsageError, match="with the least effort the run takes"):
        choose_effort(options, 0.5 * hours["fast"])
    done = CliRunner().invoke(application, ["run", "m", "--out", "o", "--effort", "fast", "--hours", "3"])
    assert "both choose the effort" in str(done.exception)


@pytest.mark.parametrize(("flag", "tokens"), [((), 8_000), (("--probe-tokens", "100000"), 100_000)])
def test_plan_and_quantize_have_efforts_too(flag, tokens, tiny_gguf, tmp_path, monkeypatch):
    seen = []

    class StopError(Exception):
        pass

    def planner(inputs, options, progress):
        seen.append(options)
        raise StopError

    monkeypatch.setattr("bitladder.plan.Planner", planner)
    CliRunner().invoke(application, ["plan", "-m", str(tiny_gguf), "--like", "Q8_0", "--effort", "fast", *flag])
    assert seen[0].prices.probe_tokens == tokens and seen[0].feedback.chunks == 4

    def rounded(*args, **_):
        seen.append(args[3])
        raise StopError

    monkeypatch.setattr("bitladder.refine.quantize_rounded", rounded)
    moments = tmp_path / "m.gguf"
    moments.touch()
    words = ["-m", str(tiny_gguf), "-o", str(tmp_path / "q.gguf"), "--moments", str(moments), "--rounding", "best"]
    CliRunner().invoke(application, ["quantize", "Q8_0", *words, "--effort", "normal"])
    assert (seen[1].rounding.passes, seen[1].rounding.method, seen[1].guard.guard_chunks) == (2, "best", 2)


def test_as_many_threads_round_as_fit_into_memory(tiny_gguf, monkeypatch):
    module = importlib.import_module("bitladder.ladder.estimate")
    shape, options = shape_of(str(tiny_gguf)), plain_options(method="best", threads=8)
    text = load_text("pydoc:test")
    eight = cost.rounding_bytes(shape, 8) + shape.bytes / 2
    for memory, threads in ((0, 8), (eight + 1, 8), (eight - 1, 7), (1 << 20, 1)):
        monkeypatch.setattr(module, "main_memory", lambda memory=memory: int(memory))
        extent = module.extent_of(options, shape, [text], [text], {}, models=2)
        assert extent.rounding_threads == threads

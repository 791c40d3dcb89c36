"""Planning on a small real model: rendered weights, swaps in the loaded model, the command, and a run's rungs."""

import dataclasses
import json
import pathlib
import re
import shlex

import numpy as np
import pytest
import tiny_models
from plain_options import plain_options

from bitladder import evaluate as ev
from bitladder.calibrate import collect_imatrix
from bitladder.cli import invoke
from bitladder.convert import convert
from bitladder.engine import Context, Decoding, Model, log, type_by_name
from bitladder.engine.cpu_kernels import input_type
from bitladder.engine.weights import rounded
from bitladder.ladder import run
from bitladder.plan import (
    Constraints,
    FeedbackOptions,
    PlanDecoding,
    PlanInputs,
    Planner,
    PlanOptions,
    PriceOptions,
    RivalOptions,
    Target,
    Window,
    load_prices,
    memory_beside_weights,
)
from bitladder.plan.options import LawOptions
from bitladder.plan.subject import Subject
from bitladder.quantize import quantize
from bitladder.recipe import read_recipe
from bitladder.text import builtin_text, load_text

SETTINGS = ev.MeasureOptions(n_ctx=64, chunks=3, threads=1)
DECODING = PlanDecoding(n_ctx=64, threads=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random Llama of two layers with rows of 64 and 96, its imatrix and a text."""
    folder = tmp_path_factory.mktemp("small")
    tiny_models.train_byte_level(folder / "checkpoint")
    tiny_models.llama(folder / "checkpoint", vocab_size=387, tie_word_embeddings=True)
    model = folder / "small-f16.gguf"
    convert(folder / "checkpoint", model, outtype="f16")
    (folder / "text.txt").write_text(builtin_text("test")[:30_000])
    calibration = folder / "calibration.txt"
    calibration.write_text(builtin_text("calibration")[:8000])
    collect_imatrix(
        model, [load_text(str(calibration))], folder / "imatrix.gguf", decoding=Decoding(n_ctx=64, threads=1)
    )
    return folder


@pytest.fixture
def arguments(small, tmp_path):
    names = {"-m": "small-f16.gguf", "--imatrix": "imatrix.gguf", "-f": "text.txt"}
    given = [word for option, name in names.items() for word in (option, str(small / name))]
    return ["plan", *given, "-c", "64", "--chunks", "3", "-t", "1", "-q", "--work", str(tmp_path / "work")]


def inputs(small, work):
    return PlanInputs(small / "small-f16.gguf", small / "imatrix.gguf", [load_text(str(small / "text.txt"))], work=work)


def test_inputs_are_rounded_as_the_kernels_round_them():
    rows = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    rows[0, 5] = -40.0  # an outlier, which costs its block
    rows[2, 256:] = 0
    out = rounded(rows, type_by_name("q8_K"))
    for row in range(3):
        for start in (0, 256):
            block = rows[row, start : start + 256]
            step = np.abs(block).max() / 127
            assert np.abs(out[row, start : start + 256] - block).max() <= step * 0.5001
            place = np.abs(block).argmax()
            assert out[row, start + place] == pytest.approx(block[place], rel=1e-6)
    assert input_type(type_by_name("q4_K")).name == "q8_K" and input_type(type_by_name("q5_0")).name == "q8_0"
    assert input_type(type_by_name("f32")) is None


@pytest.mark.parametrize("preset", ["Q4_0", "Q4_K_M", "Q6_K"])
def test_the_recipe_of_a_preset_fits_into_its_size(preset, small, tmp_path):
    """Else a plan for the preset's size could not fall back on the preset, however bad its own recipes are."""
    with Subject(small / "small-f16.gguf", small / "imatrix.gguf") as subject:
        target = subject.preset(preset)
        assert subject.complete({name: target.types[name] for name in subject.tensors})[1] <= target.bytes
    quantize(small / "small-f16.gguf", tmp_path / "q.gguf", preset, imatrix=small / "imatrix.gguf", threads=1)
    assert (tmp_path / "q.gguf").stat().st_size == target.bytes


def test_a_size_below_the_usual_ladder_has_a_preset_to_beat(tiny_gguf):
    with Subject(tiny_gguf, None) as subject:
        smallest = subject.preset("Q2_K")  # of those that need no imatrix
        assert subject.fitting_preset(smallest.bytes).name == "Q2_K"
        assert subject.fitting_preset(smallest.bytes - 1) is None


def test_the_command_plans_and_its_file_is_as_large_as_it_says(small, arguments, tmp_path, capsys):
    out = tmp_path / "recipe.toml"
    few = ["--probe-tokens", "4000"]
    assert invoke([*arguments, *few, "--like", "Q4_0", "-o", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    recipe = read_recipe(out)
    assert recipe.tensors == said["types"] and recipe.budget == "like Q4_0" and recipe.bytes == said["bytes"]
    made = tmp_path / "q.gguf"
    imatrix = str(small / "imatrix.gguf")
    command = ["quantize", "-m", str(small / "small-f16.gguf"), "--imatrix", imatrix, "-q", "-t", "1"]
    assert invoke([*command, "--recipe", str(out), "-o", str(made)]) == 0
    naive = tmp_path / "naive.gguf"
    quantize(small / "small-f16.gguf", naive, "Q4_0", imatrix=imatrix, threads=1)
    assert made.stat().st_size == said["bytes"] <= naive.stat().st_size
    tried = {one["name"]: one for one in said["tried"]}
    assert len(tried) == len(said["tried"])
    judged = {name: one["judged_kld"]["value"] for name, one in tried.items() if one["judged_kld"]}
    assert said["kld"]["value"] == min(judged.values()) <= judged["preset Q4_0"]
    ranked = sorted(tried.values(), key=lambda one: one["kld"]["value"])
    assert {one["name"] for one in ranked[:3]} | {"preset Q4_0"} == judged.keys()
    assert said["check"]["pairs"] >= 3
    # Shares add up, and the tied embedding is among them.
    assert sum(row["share"] for row in said["kinds"]) == pytest.approx(1)
    assert sum(row["kld"] for row in said["layers"]) == pytest.approx(sum(row["kld"] for row in said["kinds"]))
    assert "token_embd" in {row["name"] for row in said["kinds"]}

    # Another budget: nothing is measured again, whether prices are found in the work folder or named.
    journal = tmp_path / "work" / "measured.jsonl"
    lines = journal.read_text().count("\n")
    prices = tmp_path / "work" / "sensitivity.json"
    budget = ["--bpw", "5.2", "--no-feedback", "-o", str(tmp_path / "second.toml")]
    capsys.readouterr()
    for more in (few, ["--sensitivity", str(prices)]):
        assert invoke([*arguments, *budget, *more]) == 0
        shown = capsys.readouterr().out
        assert "proved optimal" in shown
    _, *next_step = shlex.split(shown.splitlines()[-1].partition("; next: ")[2])
    assert invoke(next_step) == 0 and pathlib.Path(next_step[-1]).is_file()
    pathlib.Path(next_step[-1]).unlink()
    assert journal.read_text().count("\n") == lines
    second = read_recipe(tmp_path / "second.toml")
    assert second.bpw <= 5.2 and second.tensors != recipe.tensors
    document = json.loads(prices.read_text())
    assert set(document["tensors"]) == {name for name, kind in recipe.tensors.items() if kind != "f32"}
    assert all(cost >= 0 for one in document["tensors"].values() for cost in one["kld"].values())
    assert not {"seconds", "time"} & document.keys()  # later steps are keyed by this file's content

    # More effort is another price.
    assert invoke([*arguments, *budget, "--probe-tokens", "6000"]) == 0
    assert json.loads(prices.read_text())["key"] != document["key"]
    assert journal.read_text().count("\n") > lines


def test_prices_are_valid_for_all_that_decides_them_and_nothing_else(small, tmp_path):
    usual = PlanOptions(decoding=DECODING, feedback=FeedbackOptions(chunks=2))
    files = inputs(small, tmp_path)
    text = load_text("pydoc:test")

    def key(options=usual, files=files):
        with Planner(files, options) as planner:
            return planner.price_key()

    decisive = {
        "effort": key(usual.replace(prices=PriceOptions(probe_tokens=500_000))),
        "chunks of a probe": key(usual.replace(prices=PriceOptions(probe_chunks=2))),
        "the law": key(usual.replace(prices=PriceOptions(law=LawOptions(exponent_damping=2.0)))),
        "method": key(usual.replace(prices=PriceOptions(method="fisher"))),
        "rounded inputs": key(usual.replace(decoding=DECODING.replace(gpu_layers=1))),
        "tokens of a chunk": key(usual.replace(decoding=DECODING.replace(n_ctx=32))),
        "text": key(files=dataclasses.replace(files, texts=[text])),
        "imatrix": key(files=dataclasses.replace(files, imatrix=None)),
    }
    assert len({key(), *decisive.values()}) == 1 + len(decisive), decisive
    idle = usual.replace(
        cache_bytes=1 << 20,
        menu="k",  # which types have a price is asked of the prices themselves
        feedback=FeedbackOptions(chunks=2, rounds=9),
        decoding=DECODING.replace(threads=2, n_ubatch=32),
    )
    assert key(idle) == key() == key(files=dataclasses.replace(files, work=tmp_path / "elsewhere"))


def test_prices_do_not_depend_on_what_lies_in_the_journal(small, tmp_path):
    options = PlanOptions(
        decoding=DECODING, prices=PriceOptions(probe_tokens=2000, check_pairs=4), feedback=FeedbackOptions(chunks=2)
    )
    saved = []
    for work in ("used", "new"):
        with Planner(inputs(small, tmp_path / work), options) as planner:
            if work == "used":  # a killed plan left this
                planner.measurements().measure({"blk.0.attn_q.weight": "q4_0"}, 4)
                planner.measurements().measure({"blk.1.ffn_up.weight": "q8_0"}, 2)
            saved.append(planner.prices_for(Target("test", max_bytes=70_000)))
    assert saved[0] == saved[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of --like"),
        (["--like", "Q4_0", "--bpw", "4"], "one of --like"),
        (["--like", "Q9_9"], "unknown preset"),
        (["--size", "many"], "--size"),
        (["--size", "1KiB", "--no-feedback"], "byte"),
        (["--bpw", "5", "--menu", "x1"], "--menu"),
        (["--bpw", "5", "--floor", "attn_x=q8_0"], "attn_x"),
        (["--bpw", "5", "--tie", "attn_q,attn_x"], "attn_x"),
        (["--bpw", "5", "--tensor-type", "nothing=q8_0"], "nothing"),
        (["--bpw", "5", "--tensor-type", "attn_q=q4_K"], "blocks of 256"),
    ],
)
def test_errors_are_one_line(arguments, words, message, capsys):
    assert invoke([*arguments, *words]) in (1, 2)
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bpw", "5", "--rounding", "descent"], "--moments"),  # given without what it needs, not taken for a default
        (["--bpw", "5", "-f", ""], "text"),  # empty, but given
        (["--bpw", "5", "--min-speed", "0"], "--min-speed"),
        (["--bpw", "5", "--chunks", "1"], "--chunks"),
        (["--bpw", "5", "--floor", "attn_q"], "--floor attn_q"),
        (["--bpw", "5", "--min-speed", "1e9"], "no allocation is predicted to generate at least 1e+09 tokens/s"),
        (["--kld", "0"], "--kld is 0; give a divergence above 0"),
        (["--kld", "-1"], "--kld is -1; give a divergence above 0"),
        (["--like", "Q4_0", "--menu", "q8_0"], "--menu q8_0: no allocation fits into"),  # though the preset would
    ],
)
def test_what_is_given_is_never_taken_for_a_default(arguments, words, message, capsys):
    assert invoke([*arguments, *words]) in (1, 2)
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_constraints_hold(small, tmp_path):
    constraints = Constraints(
        pins=("blk.0.attn_k=q8_0",), floors=("ffn_down=q5_1",), ties=("attn_q,attn_k,attn_v",), max_types=3
    )
    options = PlanOptions(
        constraints=constraints,
        decoding=DECODING,
        measure=False,
        prices=PriceOptions(probe_tokens=1000, check_pairs=0),
        feedback=FeedbackOptions(chunks=3, judge_chunks=0),
    )
    with Planner(inputs(small, tmp_path), options) as planner:
        subject = planner.subject
        prices = planner.price(Window(4, 9))
        size = int(6.5 * subject.weights() / 8) + subject.header_bytes()
        types = planner.plan(Target("test", max_bytes=size), prices).types
        goal = planner.plan(Target("test", max_kld=1e-3), prices)
        smaller = planner.plan(Target("test", max_bytes=goal.bytes - 64), prices)
        assert types["blk.0.attn_k.weight"] == "q8_0"
        for layer in (0, 1):
            assert len({types[f"blk.{layer}.attn_{one}.weight"] for one in "qkv"}) == 1
            assert type_by_name(types[f"blk.{layer}.ffn_down.weight"]).bpw >= 6
        assert len({types[name] for name in subject.tensors}) <= 3
        assert goal.allocation.cost <= 1e-3 < smaller.allocation.cost  # no smaller file would do
        needed = "iq2_xs"
        assert subject.needy("blk.0.attn_q.weight") == set() and type_by_name(needed).block == 256


def test_buffers_leave_less_for_weights(arguments, small, tmp_path, capsys):
    out = str(tmp_path / "r.toml")
    common = [*arguments, "--no-feedback", "--probe-tokens", "500", "-o", out, "--json"]
    beside = memory_beside_weights(small / "small-f16.gguf", [64])[64]
    room = 90_000  # between the smallest possible file and Q8_0
    assert invoke([*common, "--vram", str(beside + room), "--context", "64"]) == 0
    assert 0.9 * room < json.loads(capsys.readouterr().out)["bytes"] <= room
    assert invoke([*common, "--vram", "8MiB", "--context", "64"]) == 2
    assert "room for more than Q8_0" in capsys.readouterr().err
    assert invoke([*common, "--vram", "100KiB", "--context", "64"]) == 2
    assert "--context" in capsys.readouterr().err


def test_the_memory_of_a_context_is_that_of_the_buffers_that_the_library_allocates(small):
    path, contexts = small / "small-f16.gguf", (256, 4096)
    beside = memory_beside_weights(path, contexts)
    for context in contexts:
        with Model(path) as model, log.tapped() as pieces, Context(model, Decoding(n_ctx=context), swa_full=False):
            pass
        buffers = re.findall(r"(?:KV|RS|compute|output)\s+buffer size = +([\d.]+) MiB", "".join(pieces))
        assert len(buffers) == 3
        assert beside[context] == pytest.approx(sum(map(float, buffers)) * 2**20, abs=2**14)


def test_a_run_keeps_the_best_recipe_and_says_what_was_tried(small, tmp_path):
    quick = PlanOptions(
        decoding=PlanDecoding(n_ctx=64),
        prices=PriceOptions(probe_tokens=3000),
        feedback=FeedbackOptions(chunks=3, move_chunks=2, rounds=2, random_recipes=2, exchanges=1),
        rivals=RivalOptions(simpler=True),
    )
    text = str(small / "text.txt")
    options = {
        "chunks": 3,
        "imatrix_chunks": 4,
        "n_ctx": 64,
        "bench": False,
        "threads": 1,
        "text": text,
        "planning": quick,
        "smooth": False,
    }
    model, out = str(small / "small-f16.gguf"), tmp_path / "ladder"
    for mode in ("quality", "size"):
        asked = plain_options(model=model, out=out, rungs=("Q4_0",), mode=mode, **options)
        done = run(asked)
        assert ("price original Q4_0" in done.made) == (mode == "quality")  # prices serve every mode
        assert run(asked).made == ()
        tried = json.loads((out / "candidates.json").read_text())
        names = {one["name"] for one in tried["candidates"]}
        assert {"preset Q4_0", "greedy", "weighted error"} <= names  # "exact" only if it differs from all of them
        chosen = [one for one in tried["candidates"] if one["chosen"]]
        naive = json.loads((out / "scores" / "Q4_0.naive.json").read_text())
        score = json.loads((out / "scores" / "Q4_0.json").read_text())
        assert len(chosen) == 1 and score["mode"] == mode and naive["role"] == "naive" and naive["rung"] == "Q4_0"
        by_name = {one["name"]: one for one in tried["candidates"]}
        if mode == "quality":
            assert score["bytes"] <= naive["bytes"]
            assert chosen[0]["kld"]["value"] <= by_name["preset Q4_0"]["kld"]["value"]
        recipe = read_recipe(out / "recipes" / "Q4_0.toml")
        assert recipe.bytes == score["bytes"] == next(out.glob("*-Q4_0.gguf")).stat().st_size
    assert load_prices(out / "sensitivity-Q4_0.json").tensors
    # Other rungs, also those below 4 bits, change nothing of what is there.
    rungs: tuple[str, ...] = ("Q4_0",)
    for added in ("Q5_K_M", "IQ3_S", "Q2_K"):
        before = {path: path.read_bytes() for path in [*out.glob("*.gguf"), *out.glob("planned/*"), *out.glob("sens*")]}
        more = run(plain_options(model=model, out=out, rungs=(*rungs, added), mode="size", **options))
        assert not [step for step in more.made for rung in rungs if rung in step.split()]
        assert {f"plan {added}", f"quantize {added}"} <= set(more.made)
        assert {path: path.read_bytes() for path in before} == before
        rungs = (*rungs, added)


def test_a_divergence_that_no_recipe_has_is_no_recipe(arguments, tmp_path, capsys):
    out = tmp_path / "r.toml"
    words = ["--menu", "q4_0,q8_0", "--probe-tokens", "1000", "--judge-chunks", "0", "--effort", "fast"]
    assert invoke([*arguments, *words, "--kld", "1e-9", "-o", str(out)]) == 1 and not out.exists()
    said = capsys.readouterr().err
    assert "KLD 1e-09: every tensor would stay as it is; give a larger --kld" in said


@pytest.mark.parametrize("method", ["forward", "fisher"])
def test_prices_rank_swaps_that_were_held_out(small, tmp_path, method):
    options = PlanOptions(
        decoding=DECODING,
        measure=False,
        prices=PriceOptions(method=method, probe_tokens=20_000, probe_chunks=4),
        feedback=FeedbackOptions(chunks=6, judge_chunks=0),
    )
    with Planner(inputs(small, tmp_path), options) as planner:
        subject = planner.subject
        prices = planner.prices_for(Target("test", max_bytes=70_000))
        assert prices.method == method and prices.tensors.keys() == set(subject.tensors)
        assert prices.check.rank_correlation > 0.8 and 0.3 < prices.check.median_ratio < 3
        # Kinds measured as a whole, by hand.
        names = [name for name, (kind, _) in subject.places.items() if kind == "ffn_down"]
        real = planner.models.kld(dict.fromkeys(names, "q4_0"), 4).mean()
        assert sum(prices.tensors[name].kld["q4_0"] for name in names) == pytest.approx(real, rel=0.6)

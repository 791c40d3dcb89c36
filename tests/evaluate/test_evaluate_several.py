"""Several models side by side: kept results, pairs, the noise floor, and the command's tables."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from bitladder import evaluate as ev
from bitladder import keys
from bitladder.cli import invoke
from bitladder.engine import Context
from bitladder.errors import BitladderError
from bitladder.evaluate import load_task, parse_specs, several
from bitladder.evaluate.base import cache
from bitladder.evaluate.identity import decode
from bitladder.evaluate.noise import noise_floor, other_ubatch
from bitladder.quantize import quantize
from bitladder.text import load_text

SETTINGS = ev.MeasureOptions(n_ctx=128, chunks=10, threads=1)


@pytest.fixture(scope="module")
def folder(tiny_gguf, tmp_path_factory):
    made = tmp_path_factory.mktemp("several")
    shutil.copy(tiny_gguf, made / "full.gguf")
    for preset in ("Q3_K_M", "Q4_0", "Q6_K", "Q8_0"):
        quantize(tiny_gguf, made / f"{preset}.gguf", preset, threads=1)
    (made / "test.txt").write_text(load_text("pydoc:test").text[:20_000], encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def wanted(folder):
    text = load_text(str(folder / "test.txt"))
    (spec,) = parse_specs(f"continuation:{folder / 'test.txt'}")
    with ev.load_or_compute_base(folder / "full.gguf", text, SETTINGS) as base:
        yield ev.EvalRequest(
            (text,),
            SETTINGS,
            (base,),
            (load_task(spec),),
            ev.MeasureOptions(n_ctx=768, threads=1),
            task_count=12,
            noise_chunks=2,
        )


def watched(monkeypatch):
    """The names of the functions that measure, in the order of their calls from now on."""
    measured = []
    for name in ("measure", "score_task", "noise_floor"):
        real = getattr(several, name)

        def watch(first, *rest, _real=real, _name=name, **options):
            measured.append(_name)
            return _real(first, *rest, **options)

        monkeypatch.setattr(several, name, watch)
    return measured


def test_what_is_known_is_not_measured_again(folder, wanted, tmp_path, monkeypatch):
    measured = watched(monkeypatch)
    results = ev.ResultFolder(tmp_path / "results")
    two = [folder / "Q4_0.gguf", folder / "Q8_0.gguf"]
    first = ev.evaluate_several(two, wanted, results=results)
    assert sorted(measured) == ["measure", "measure", "noise_floor", "score_task", "score_task"]
    measured.clear()
    renamed = tmp_path / "renamed.gguf"
    shutil.copy(two[0], renamed)
    again = ev.evaluate_several([renamed, two[1]], wanted, results=results)
    assert not measured
    for before, after in zip(first, again, strict=True):
        same = {"model", "paired"}
        assert before.model_dump(exclude=same) == after.model_dump(exclude=same)
    assert again[0].model == "renamed.gguf" == again[1].paired.model
    assert again[1].paired.kld == first[1].paired.kld
    ev.evaluate_several([*two, folder / "Q3_K_M.gguf"], wanted, results=results)
    assert measured == ["measure", "score_task"]
    measured.clear()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(several, "kernels", lambda: "CPU : NEON = 1")
        ev.evaluate_several(two[:1], wanted, results=results)
    assert sorted(measured) == ["measure", "noise_floor", "score_task"]
    measured.clear()
    for kept in (tmp_path / "results").rglob("*.npz"):  # damaged results are made again
        kept.write_bytes(kept.read_bytes()[:100])
    assert ev.evaluate_several(two[:1], wanted, results=results)[0].kld == first[0].kld
    assert sorted(measured) == ["measure", "noise_floor", "score_task"]


@pytest.mark.parametrize(
    ("module", "name", "again"),
    [
        (several, "MEASURE", ["measure", "measure"]),
        (several, "TASKS", ["score_task", "score_task"]),
        (several, "NOISE", ["noise_floor"]),
    ],
)
def test_another_version_of_an_algorithm_measures_again(folder, wanted, tmp_path, monkeypatch, module, name, again):
    results = ev.ResultFolder(tmp_path / "results")
    two = [folder / "Q4_0.gguf", folder / "Q8_0.gguf"]
    ev.evaluate_several(two, wanted, results=results)
    measured = watched(monkeypatch)
    algorithm = getattr(module, name)
    monkeypatch.setattr(module, name, dataclasses.replace(algorithm, changes=(*algorithm.changes, "another way")))
    ev.evaluate_several(two, wanted, results=results)
    assert measured == again


def test_another_version_of_the_base_is_another_base(folder, wanted, tmp_path, monkeypatch):
    path = tmp_path / "old.base"
    ev.make_base(folder / "full.gguf", wanted.texts[0], path, SETTINGS)
    new = dataclasses.replace(cache.BASE, changes=(*cache.BASE.changes, "another way"))
    monkeypatch.setattr(cache, "BASE", new)
    with pytest.raises(BitladderError, match="another version of bitladder's algorithm"):
        ev.open_base(path, wanted.texts[0], SETTINGS, ev.identify(folder / "full.gguf"))


def test_entries_of_algorithms_are_noticed(folder, wanted):
    with keys.recorded() as used:
        ev.evaluate_several([folder / "Q8_0.gguf"], wanted)
    assert used == {"measure", "tasks", "noise"}
    with keys.recorded() as used:
        ev.bench([folder / "Q8_0.gguf"], [ev.SpeedTest(4)], ev.SpeedOptions(1, threads=1))
    assert used == {"bench"}


def test_pairs_are_differences_of_the_scores(folder, wanted):
    models = [folder / "Q4_0.gguf", folder / "Q8_0.gguf", folder / "Q4_0.gguf"]
    found = ev.evaluate_several(models, wanted)
    assert found[0].paired is None
    pair = found[1].paired
    assert pair.model == "Q4_0.gguf"
    assert pair.per == "chunk"
    assert pair.kld.value == pytest.approx(found[1].kld.value - found[0].kld.value)
    assert pair.kld.value < -3 * pair.kld.error < 0
    assert pair.ppl.value == pytest.approx(found[1].ppl.value - found[0].ppl.value)
    assert 0 < pair.ppl.error < found[1].ppl.error / 3
    gain = found[1].tasks["continuation"].accuracy.value - found[0].tasks["continuation"].accuracy.value
    assert pair.tasks["continuation"].difference.value == pytest.approx(gain)
    itself = found[2].paired
    assert (itself.kld.value, itself.kld.error, itself.ppl.value, itself.ppl.error) == (0, 0, 0, 0)


def in_batches(path, chunks, sizes):
    """Divergence of a model in batches of the second size from the same in batches of the first, [tokens], by hand."""
    logs = []
    for size in sizes:
        settings = ev.MeasureOptions(n_ctx=128, threads=1, n_ubatch=size)
        with settings.load(path) as model, Context(model, settings) as context:
            rows = [part.astype(np.float64) for i in range(len(chunks)) for _, part in decode(context, chunks, i)]
        logits = np.concatenate(rows)
        logits -= logits.max(axis=1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1)


def test_the_noise_floor_is_what_another_batch_size_does(folder, wanted):
    """To the full-precision model, and to quants of which nearly all is rounded inputs."""
    noise = noise_floor(wanted.bases[0], 4, SETTINGS)
    assert (noise.chunks, noise.n_ubatch) == (4, 8)
    chunks = wanted.bases[0].chunks.head(4)
    # What keeping a base costs, by a measurement in which nothing else differs.
    kept = ev.measure(folder / "full.gguf", wanted.texts[0], SETTINGS, base=wanted.bases[0]).scores.kld
    found, expected = noise.batch, in_batches(folder / "full.gguf", chunks, (128, 8))
    # The root of a small divergence is a distance: two differ by no more than their ends do.
    assert abs(np.sqrt(found.value) - np.sqrt(expected.mean())) <= np.sqrt(kept.value) + 1e-4
    for quant, rounded in (("Q8_0", noise.activations_batch), ("Q6_K", noise.activations_k_batch)):
        expected = in_batches(folder / f"{quant}.gguf", chunks, (128, 8))
        assert rounded.value == pytest.approx(expected.mean(), rel=0.5)
        assert rounded.max >= rounded.value


def test_the_noise_floor_lies_below_the_best_quant(folder, wanted):
    noise = noise_floor(wanted.bases[0], 4, SETTINGS)
    best = ev.measure(folder / "Q8_0.gguf", wanted.texts[0], SETTINGS, base=wanted.bases[0]).scores.kld.value
    # Q8_0's kernels round inputs as well, so its divergence is this and that of its weights together.
    assert noise.batch.value < noise.activations.value < best
    assert noise.activations.max >= noise.activations.value > 0
    # Blocks of 256 have a larger step than those of 32 in them.
    assert noise.activations_k.value > noise.activations.value


@pytest.mark.parametrize("n_ctx", [4, 63, 64, 512])
@pytest.mark.parametrize("n_batch", [1, 32, 64, 512])
@pytest.mark.parametrize("n_ubatch", [1, 8, 63, 64, 512])
def test_the_other_batch_is_on_the_other_side_of_a_kernel(n_ctx, n_batch, n_ubatch):
    size = min(n_ctx, n_batch, n_ubatch)
    other = other_ubatch(ev.MeasureOptions(n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch))
    assert 1 <= other <= n_ctx and other != size
    if n_ctx >= 64:  # tokens from which flash attention works in tiles
        assert (size < 64) != (other < 64)
    else:  # one token is multiplied as a vector
        assert (size == 1) != (other == 1)


def test_no_text(folder, wanted):
    (scores,) = ev.evaluate_several(
        [folder / "Q8_0.gguf"], ev.EvalRequest((), SETTINGS, tasks=wanted.tasks, task_count=12)
    )
    assert scores.ppl is None
    assert scores.tasks["continuation"].count == 12
    assert scores.tasks_average is None  # of the five benchmarks, none was run


def test_several_texts(folder, tmp_path, capsys):
    """Each text is measured as by itself, the mean is that of both, and a pair is compared on each."""
    (tmp_path / "other.txt").write_text(load_text("pydoc:calibration").text[:9_000], encoding="utf-8")
    texts = [folder / "test.txt", tmp_path / "other.txt"]
    base = ["--base", folder / "full.gguf", "-c", 128, "--chunks", 9, "-t", 1, "--noise-chunks", 0]
    base += ["--cache", tmp_path / "cache", "-q"]
    models = ["-m", folder / "Q4_0.gguf", "-m", folder / "Q6_K.gguf"]
    alone = []
    for text in texts:
        assert invoke([str(word) for word in ["eval", *models, *base, "-f", text, "--json"]]) == 0
        alone.append(json.loads(capsys.readouterr().out))
    both = [word for text in texts for word in ("-f", text)]
    assert invoke([str(word) for word in ["eval", *models, *base, *both, "-o", tmp_path / "out.json"]]) == 0
    shown = capsys.readouterr().out
    assert "test.txt + other.txt" in shown and "means of the texts" in shown and "KLD, other.txt" in shown
    together = json.loads((tmp_path / "out.json").read_text())
    for place in (0, 1):
        scores, parts = together[place], [part[place] for part in alone]
        assert scores["chunks"] == sum(part["chunks"] for part in parts)
        assert scores["kld"]["value"] == pytest.approx(np.mean([part["kld"]["value"] for part in parts]))
        assert scores["kld"]["error"] == pytest.approx(np.hypot(*(part["kld"]["error"] for part in parts)) / 2)
        assert scores["ppl"]["value"] == pytest.approx(np.sqrt(np.prod([part["ppl"]["value"] for part in parts])))
        for text, part in zip(scores["texts"], parts, strict=True):
            for name in ("text", "chunks", "tokens_scored", "ppl", "kld", "delta_p", "same_top_p"):
                assert text[name] == part[name]
    pair = together[1]["paired"]
    assert [text["paired"] for text in together[1]["texts"]] == [part[1]["paired"] for part in alone]
    gaps = [part[1]["paired"]["kld"] for part in alone]
    assert pair["kld"]["value"] == pytest.approx(np.mean([gap["value"] for gap in gaps]))
    assert pair["kld"]["error"] == pytest.approx(np.hypot(*(gap["error"] for gap in gaps)) / 2)
    assert pair["ppl"]["value"] == pytest.approx(together[1]["ppl"]["value"] - together[0]["ppl"]["value"])


def test_one_file_holds_one_text(folder, tmp_path, capsys):
    words = ["eval", "-m", folder / "Q4_0.gguf", "-f", "pydoc:test", "-f", folder / "test.txt", "--base"]
    assert invoke([str(word) for word in [*words, folder / "full.gguf", "--base-file", tmp_path / "x.base"]]) == 2
    assert "--base-file names a file of one text" in capsys.readouterr().err
    assert invoke([str(word) for word in ["eval", "-m", folder / "Q4_0.gguf", *["-f", "pydoc:test"] * 2]]) == 2
    assert "name each text once" in capsys.readouterr().err


def test_command(folder, tmp_path, capsys):
    arguments = ["eval", "--base", folder / "full.gguf", "-f", folder / "test.txt", "-c", 128, "--chunks", 8, "-t", 1]
    arguments += ["--noise-chunks", 1, "--cache", tmp_path / "cache", "-q", "-o", tmp_path / "out.json"]
    for name in ("Q8_0", "Q4_0"):
        arguments += ["-m", folder / f"{name}.gguf"]
    assert invoke([str(one) for one in arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.index("Q4_0.gguf") < shown.index("Q8_0.gguf")  # the smaller file first
    assert "Noise floor" in shown
    assert "Difference from Q8_0.gguf, paired by chunk" in shown
    data = json.loads((tmp_path / "out.json").read_text())
    assert [one["model"] for one in data] == ["Q8_0.gguf", "Q4_0.gguf"]
    assert np.isfinite(data[1]["paired"]["kld"]["value"])
    assert data[0]["noise"]["chunks"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kl-divergence"], "--kl-divergence compares with --kl-divergence-base"),
        (["--kl-divergence-base", "x.kld", "--base", "MODEL"], "from one full-precision model"),
        (["--tasks", "chess:x"], "chess"),
        (["--tasks", "hellaswag:absent.txt"], "absent.txt"),
    ],
)
def test_bad_options(arguments, message, folder, tmp_path, capsys):
    model = str(folder / "Q4_0.gguf")
    given = [model if one == "MODEL" else one for one in arguments]
    assert invoke(["eval", "-m", model, *given, "--cache", str(tmp_path)]) != 0
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())

"""`bitladder compare` on models that were really trained: quants of the base, of checkpoints near it, and others."""

import json
import math

import numpy as np
import pytest
import tiny_models
import torch

from bitladder.cli import invoke
from bitladder.compare import (
    check_structure,
    check_weights,
    defeats,
    gaps_on_texts,
    perplexity_sign,
    size_groups,
)
from bitladder.convert import convert
from bitladder.evaluate import Figure, Measurement, NamedFile, Scores, mixed_pairs, over_texts
from bitladder.gguf import GgufFile
from bitladder.quantize import quantize
from bitladder.text import load_text

SIZES = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 385, "max_position_embeddings": 256}


def train(model, ids, steps, rate):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base.gguf; near and far: the same after a little and after much more training; wide, other: no relatives."""
    made = tmp_path_factory.mktemp("compare")
    text = tiny_models.TEXT * 12
    (made / "test.txt").write_text(text, encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        source = made / "checkpoint"
        tokenizer = tiny_models.train_byte_level(source)
        model = tiny_models.llama(source, **SIZES).float().train()
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :512].reshape(4, 128)
        for name, steps, rate in (("base", 12, 2e-3), ("near", 8, 1e-4), ("far", 12, 2e-3)):
            train(model, ids, steps, rate)
            model.save_pretrained(source)
            convert(source, made / f"{name}.gguf", outtype="f16")
    finally:
        torch.set_num_threads(threads)
    for name in ("base", "near", "far"):
        for preset in ("Q4_0", "Q8_0"):
            quantize(made / f"{name}.gguf", made / f"{name}-{preset}.gguf", preset, threads=1)
    quantize(made / "base.gguf", made / "base-Q4_1.gguf", "Q4_1", threads=1)
    other = made / "other"
    tiny_models.train_byte_level(other, vocab_size=370)
    tiny_models.llama(other, **SIZES | {"vocab_size": 371})
    convert(other, made / "other.gguf", outtype="f16")
    tiny_models.train_byte_level(other)
    tiny_models.llama(other, **SIZES | {"intermediate_size": 128, "rope_theta": 5e5})
    convert(other, made / "wide.gguf", outtype="f16")
    return made


def findings(folder, name):
    with GgufFile(folder / "base.gguf") as base, GgufFile(folder / name) as model:
        structure = check_structure(base, model)
        if any(one.gravity == "other" for one in structure):
            return structure
        return structure + check_weights(base, model, threads=1)


def run(folder, *arguments):
    given = ["compare", *arguments, "--base", folder / "base.gguf", "-f", folder / "test.txt", "-c", "64", "-t", "1"]
    return invoke([str(one) for one in [*given, "--no-cache", "-q"]])


@pytest.mark.parametrize("name", ["base.gguf", "base-Q4_0.gguf", "base-Q4_1.gguf", "base-Q8_0.gguf"])
def test_quants_of_the_base_are_not_doubted(folder, name):
    assert findings(folder, name) == []


@pytest.mark.parametrize("name", ["far-Q4_0.gguf", "far-Q8_0.gguf"])
def test_another_checkpoint_shows_in_its_weights(folder, name):
    found = findings(folder, name)
    assert {(one.gravity, one.about) for one in found} == {("sign", "weights")}
    assert "another checkpoint" in found[0].text


def test_distance_is_that_of_the_weights(folder):
    """Against gguf's own reader and quantizer."""
    import gguf

    from bitladder.compare.same_model import distances

    with GgufFile(folder / "base.gguf") as base, GgufFile(folder / "far-Q8_0.gguf") as model:
        found = distances(base, model, 1).matrices["attn_k", "q8_0"]
    actual = rounded = size = 0.0
    readers = [gguf.GGUFReader(folder / name) for name in ("base.gguf", "far-Q8_0.gguf")]
    tensors = [{tensor.name: tensor for tensor in reader.tensors} for reader in readers]
    for block in range(2):
        name = f"blk.{block}.attn_k.weight"
        ours = tensors[0][name].data.astype(np.float32)
        theirs = gguf.quants.dequantize(tensors[1][name].data, gguf.GGMLQuantizationType.Q8_0)
        again = gguf.quants.quantize(ours, gguf.GGMLQuantizationType.Q8_0)
        spans = [slice(start, start + 8) for start in np.linspace(0, len(ours) - 8, 4, dtype=int)]
        for span in spans:
            actual += float(np.square(theirs[span] - ours[span], dtype=np.float64).sum())
            back = gguf.quants.dequantize(again[span], gguf.GGMLQuantizationType.Q8_0)
            rounded += float(np.square(back - ours[span], dtype=np.float64).sum())
            size += float(np.square(ours[span], dtype=np.float64).sum())
    assert found.share == pytest.approx(math.sqrt(actual / size), rel=1e-5)
    assert found.expected == pytest.approx(math.sqrt(rounded / size), rel=0.02)  # ties fall otherwise there


@pytest.mark.parametrize(
    ("name", "about", "words"),
    [("other.gguf", "vocabulary", "371 tokens"), ("wide.gguf", "tensors", "ffn_")],
)
def test_another_model_shows_in_its_headers(folder, name, about, words):
    grave = [one for one in findings(folder, name) if one.gravity == "other"]
    assert grave[0].about == about
    assert words in grave[0].text
    if name == "wide.gguf":
        assert any("rope.freq_base 500000" in one.text for one in findings(folder, name))


def test_another_architecture(folder, tiny_gguf):
    with GgufFile(folder / "base.gguf") as base, GgufFile(tiny_gguf) as model:
        (found,) = check_structure(base, model)
    assert (found.gravity, found.about) == ("other", "architecture")
    assert "olmo2" in found.text


def test_a_near_checkpoint_shows_in_its_perplexity(folder, capsys):
    """The weights of a checkpoint a few steps on are lost in rounding; its perplexity is not."""
    assert findings(folder, "near-Q8_0.gguf") == []
    assert run(folder, folder / "near-Q8_0.gguf", folder / "base-Q8_0.gguf", "--json") == 0
    near, honest = json.loads(capsys.readouterr().out)["models"]
    assert [(one["gravity"], one["about"]) for one in near["findings"]] == [("sign", "perplexity")]
    assert honest["findings"] == []
    assert near["ln_ppl_less_base"]["value"] < 0


@pytest.mark.parametrize(
    ("gap", "error", "kld", "doubted", "level"),
    [
        (0.01, 0.001, 0.02, False, None),
        (-0.01, 0.005, 0.02, False, None),  # two standard errors are an accident
        (-0.01, 0.001, 0.02, False, "note"),
        (-0.03, 0.001, 0.02, False, "sign"),
        (-0.01, 0.001, 0.02, True, "sign"),
    ],
)
def test_what_a_low_perplexity_says(gap, error, kld, doubted, level):
    found = perplexity_sign(Figure(value=gap, error=error), kld, doubted)
    assert [one.gravity for one in found] == ([level] if level else [])


def measured(name, size, kld, seed):
    """A made-up measurement: per-token KLDs that share the text's ups and downs."""
    generator = np.random.default_rng(seed)
    text = np.random.default_rng(0).gamma(0.5, 1, (16, 50))
    tokens = (text * kld * generator.normal(1, 0.05, text.shape)).ravel()
    zero = np.zeros(tokens.size)
    scores = Scores.model_validate(
        {"model": name, "sha256": name, "bytes": size, "bpw": 4, "chunks": 16, "versions": {},
         "kld": {"value": tokens.mean(), "error": 0.1, **dict.fromkeys(
             ("max", "p999", "p99", "p95", "p90", "median", "p10", "p05", "p01", "p001", "min"), 0)}}
    )  # fmt: skip
    return Measurement(scores, {"nll": zero, "nll_base": zero, "kld": tokens})


def test_the_winner_is_told_by_pairs():
    """Own errors of ±0.1 hide everything; pairs do not."""
    models = [measured("a", 1000, 0.20, 1), measured("b", 1005, 0.10, 2), measured("c", 1009, 0.20, 3),
              measured("d", 1500, 0.15, 4), measured("e", 500, 0.40, 5)]  # fmt: skip
    found = defeats(models, 1.01)
    assert [one and one.by for one in found] == [1, None, 1, 1, None]
    assert found[3].bytes == 495
    expected = models[3].arrays["kld"].mean() - models[1].arrays["kld"].mean()
    assert found[3].kld.value == pytest.approx(expected)
    (group,) = size_groups(models, 1.01)
    assert group.members[0] == 1 and group.sure and set(group.members) == {0, 1, 2}
    # Without tolerance a is smaller than b, so b does not beat it at equal size.
    assert [one and one.by for one in defeats(models, 1)] == [None, None, 1, 1, None]
    alike = [measured("a", 1000, 0.20, 1), measured("c", 1000, 0.2001, 3)]
    assert not size_groups(alike, 1.01)[0].sure and defeats(alike, 1.01) == [None, None]


def test_models_that_texts_order_in_two_ways():
    """Own errors of ±0.1 hide everything; pairs do not."""
    names = ("prose", "code")

    def on_texts(name, size, klds, seed):
        parts = []
        for place, kld in enumerate(klds):
            part = measured(name, size, kld, seed + place)
            text = {"text": NamedFile(name=names[place], sha256=names[place]), "tokens_scored": 800}
            part.scores.__dict__.update(text)
            tokens = part.arrays["kld"]
            arrays = {"nll": np.ones(800), "nll_base": np.ones(800), "kld": tokens, "delta_p": np.zeros(800),
                      "same_top": np.ones(800, bool)}  # fmt: skip
            parts.append(Measurement(part.scores, arrays))
        return over_texts(parts)

    models = [on_texts("a", 1000, (0.20, 0.30), 1), on_texts("b", 1005, (0.10, 0.35), 11),
              on_texts("c", 1500, (0.09, 0.20), 21), on_texts("d", 1600, (0.15, 0.15), 31)]  # fmt: skip
    pairs = mixed_pairs(
        [model.scores.bytes for model in models], lambda this, other: gaps_on_texts(models[this], models[other])
    )
    # c is better than a and b on both; d, the largest, is worse than b and c on prose only.
    assert [(pair.this, pair.other) for pair in pairs] == [(0, 1), (3, 1), (3, 2)]
    gap = models[0].arrays["kld"].mean() - models[1].arrays["kld"].mean()
    assert np.mean([figure.value for figure in pairs[0].gaps]) == pytest.approx(gap)


def test_several_texts(folder, capsys, tmp_path):
    (tmp_path / "more.txt").write_text(load_text("pydoc:test").text[:6000])
    quants = [folder / name for name in ("base-Q8_0.gguf", "base-Q4_0.gguf")]
    assert run(folder, *quants, "-f", tmp_path / "more.txt", "-o", tmp_path / "out.json") == 0
    shown = capsys.readouterr().out
    assert "more.txt + test.txt" in shown and "KLD on each text" in shown
    for model in json.loads((tmp_path / "out.json").read_text())["models"]:
        scores = model["scores"]
        on_texts = [text["kld"]["value"] for text in scores["texts"]]
        assert scores["kld"]["value"] == pytest.approx(np.mean(on_texts))
        gaps = [text["ln_ppl_ratio"]["value"] for text in scores["texts"]]
        assert model["ln_ppl_less_base"]["value"] == pytest.approx(np.mean(gaps))
    assert json.loads((tmp_path / "out.json").read_text())["mixed"] == []


def test_command(folder, capsys, tmp_path):
    quants = [folder / name for name in ("base-Q8_0.gguf", "base-Q4_0.gguf", "far-Q4_0.gguf", "other.gguf")]
    assert run(folder, *quants, "-o", tmp_path / "out.json") == 0
    shown = capsys.readouterr().out
    assert "another vocabulary" in shown and "doubtful" in shown
    assert "base-Q4_0.gguf wins: KLD of far-Q4_0.gguf differs by +" in shown
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["base"] == "base.gguf"
    by_name = {one["model"]: one for one in data["models"]}
    assert by_name["other.gguf"]["scores"] is None
    assert by_name["base-Q8_0.gguf"]["types"]["attn_k"] == {"q8_0": 2}
    assert by_name["far-Q4_0.gguf"]["beaten"]["by"] == "base-Q4_0.gguf"
    honest, far = (by_name[f"{name}-Q4_0.gguf"]["scores"]["kld"]["value"] for name in ("base", "far"))
    assert by_name["far-Q4_0.gguf"]["beaten"]["kld"]["value"] == pytest.approx(far - honest)


def test_what_is_no_model_is_one_line(folder, capsys):
    for name in ("absent.gguf", str(folder / "test.txt")):
        assert run(folder, name) != 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err and not captured.out

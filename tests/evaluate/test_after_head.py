"""Bases of models whose graph scales or caps logits after the head: checked against the library's own logits."""

import json

import gguf
import numpy as np
import pytest
import tiny_models
from rewritten import rewritten

from bitladder.cli import invoke
from bitladder.convert import convert
from bitladder.evaluate.base import hidden
from bitladder.gguf import GgufFile


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.llama(folder / "checkpoint", tie_word_embeddings=True)
    tiny_models.train_byte_level(folder / "checkpoint")
    return convert(folder / "checkpoint", folder / "llama.gguf", outtype="f32").path


def as_architecture(path, out, architecture, numbers, post_norms=False):
    """A llama GGUF as another architecture, with further numbers in its metadata."""
    norms = []
    if post_norms:
        for tensor in gguf.GGUFReader(path).tensors:
            if tensor.name.endswith(("attn_norm.weight", "ffn_norm.weight")):
                kind = "post_attention_norm" if "attn" in tensor.name else "post_ffw_norm"
                norms.append((f"{tensor.name.rsplit('.', 2)[0]}.{kind}.weight", np.array(tensor.data)))
    return rewritten(path, out, architecture=architecture, numbers=numbers, extra=norms)


KINDS = {
    "granite divides": ("granite", {"logit_scale": 4.0}, False),
    "gemma2 caps": (
        "gemma2",
        {"final_logit_softcapping": 2.5, "attn_logit_softcapping": 50.0, "attention.sliding_window": 64},
        True,
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_has_no_divergence_from_itself(name, llama, tmp_path, capsys):
    architecture, numbers, post_norms = KINDS[name]
    model = as_architecture(llama, tmp_path / "m.gguf", architecture, numbers, post_norms)
    with GgufFile(model) as file:
        assert file.architecture == architecture
    words = ["eval", "-m", str(model), "--base", str(model), "-f", "pydoc:test", "-c", "64", "--chunks", "3"]
    assert invoke([*words, "--noise-chunks", "0", "--no-cache", "--json", "-q"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert abs(scores["kld"]["value"]) < 1e-6
    assert scores["same_top_p"]["value"] > 0.99
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]  # --no-cache keeps no base


def test_what_is_not_known_is_refused(llama, tmp_path, capsys, monkeypatch):
    model = as_architecture(llama, tmp_path / "m.gguf", "granite", {"logit_scale": 4.0})
    possible_after = hidden.possible_after
    monkeypatch.setattr(hidden, "possible_after", lambda identity: possible_after(identity)[:1])
    words = ["eval", "-m", str(model), "--base", str(model), "-f", "pydoc:test", "-c", "64", "--chunks", "2", "-q"]
    assert invoke([*words, "--no-cache"]) == 1
    assert "change them afterwards in a way that is not known here" in capsys.readouterr().err

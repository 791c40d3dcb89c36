"""Rendered tensors: the library's own blocks, their error, and a cache that is valid for as long as its key is."""

import numpy as np
import pytest

from bitladder.engine import quantize_rows, type_by_name
from bitladder.gguf import GgufFile
from bitladder.trial import Renderer, render, render_all

NAME, KIND = "blk.1.ffn_down.weight", type_by_name("q4_K")


@pytest.fixture
def file(tiny_gguf):
    with GgufFile(tiny_gguf) as opened:
        yield opened


@pytest.fixture
def importance(file):
    width = file.tensors[NAME].width
    return {NAME: np.random.default_rng(0).uniform(0.1, 4, (1, width)).astype(np.float32)}


class Never:
    """A rounding method that must not be called."""

    key = "stock"

    def __call__(self, *_):
        raise AssertionError("rendered again")


def test_blocks_are_the_librarys_and_are_kept(file, importance, tmp_path):
    first = Renderer(file, importance, folder=tmp_path, threads=1)
    weights, values = first.weights(NAME), first.values(NAME, KIND)
    assert np.array_equal(first.blocks(NAME, KIND), quantize_rows(weights, KIND, importance[NAME][0]))
    squares = (values.astype(np.float64) - weights) ** 2
    assert first.error(NAME, KIND) == pytest.approx(float((squares * importance[NAME][0]).sum()), rel=1e-5)
    again = Renderer(file, importance, rounding=Never(), folder=tmp_path, threads=1)
    assert np.array_equal(again.blocks(NAME, KIND), first.blocks(NAME, KIND))
    assert again.error(NAME, KIND) == first.error(NAME, KIND)
    kept = next(tmp_path.glob("*.blocks"))
    data = bytearray(kept.read_bytes())
    data[5] ^= 1
    kept.write_bytes(data)  # as a power cut may leave it
    with pytest.raises(AssertionError, match="rendered again"):
        again.blocks(NAME, KIND)


def test_blocks_of_another_library_are_not_taken(file, importance, tmp_path, monkeypatch):
    """Kernels change: after an upgrade the same weights may have other blocks."""
    Renderer(file, importance, folder=tmp_path, threads=1).blocks(NAME, KIND)
    facts = render.versions()
    monkeypatch.setattr(render, "versions", lambda: facts | {"llama_cpp_commit": "0" * 40})
    with pytest.raises(AssertionError, match="rendered again"):
        Renderer(file, importance, rounding=Never(), folder=tmp_path, threads=1).blocks(NAME, KIND)


def test_each_input_is_in_the_key(file, importance):
    def key(name=NAME, kind=KIND, given=importance, method="stock"):
        rounding = Never()
        rounding.key = method
        return Renderer(file, given, rounding=rounding, threads=1).key(name, kind)

    other = {NAME: importance[NAME] * 2}
    keys = [key(), key("blk.0.ffn_down.weight"), key(kind=type_by_name("q5_K")), key(given={}), key(given=other)]
    keys.append(key(method="another"))
    assert len(set(keys)) == len(keys)
    assert key(given={NAME: importance[NAME].copy()}) == keys[0]


def test_many_tensors_have_the_errors_of_each(file, importance):
    names = [f"blk.{block}.ffn_down.weight" for block in range(3)]
    renderer = Renderer(file, importance, threads=2)
    errors = render_all(renderer, [(name, kind) for name in names for kind in ("q4_K", "q3_K")])
    alone = Renderer(file, importance, threads=1)
    assert errors == {(name, kind): alone.error(name, type_by_name(kind)) for name, kind in errors}
    assert len(errors) == 6

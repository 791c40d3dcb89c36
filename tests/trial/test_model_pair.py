"""Recipes that are measured side by side have the figures of one after the other, whatever is asked for meanwhile."""

import contextlib
import threading

import numpy as np
import pytest

from bitladder import evaluate as ev
from bitladder.engine import Decoding, main_memory
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile
from bitladder.text import builtin_text, load_text
from bitladder.trial import ModelPair, Renderer, SwappedModel, copies

SETTINGS = ev.MeasureOptions(n_ctx=64, chunks=2)


@pytest.fixture(scope="module")
def alone(tiny_gguf, tmp_path_factory):
    """What loads the embedded model with some threads, recipes, and their figures by one thread."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "text.txt").write_text(builtin_text("test")[:20_000])
    text = load_text(str(folder / "text.txt"))
    with contextlib.ExitStack() as opened:
        base = opened.enter_context(
            ev.load_or_compute_base(tiny_gguf, text, SETTINGS.replace(threads=1), path=folder / "base")
        )
        file = opened.enter_context(GgufFile(tiny_gguf))
        names = [name for name, tensor in file.tensors.items() if tensor.type.name == "f16"]
        recipes = [{name: kind} for name in names[:4] for kind in ("q4_0", "q5_0")]
        recipes.insert(3, dict.fromkeys(names, "q4_0"))

        def load(threads):
            return SwappedModel(base, Renderer(file, {}, threads=threads), SETTINGS.replace(threads=threads))

        with load(1) as model:
            yield load, recipes, [model.kld(recipe, 1) for recipe in recipes]


def equal(pair, recipes, klds):
    return all(np.array_equal(pair.kld(recipe, 1), kld) for recipe, kld in zip(recipes, klds, strict=True))


@pytest.mark.parametrize("threads", [2, 3])
def test_figures_are_those_of_one_after_the_other(alone, threads):
    load, recipes, klds = alone
    with ModelPair(lambda: load(threads), copied=True) as pair:
        pair.expect(recipes)
        assert equal(pair, recipes, klds)
        assert pair.model(1) is not pair.model(0)
        assert equal(pair, recipes[:2], klds[:2])  # nothing is expected


def test_another_question_ends_what_is_measured_ahead(alone):
    load, recipes, klds = alone
    with ModelPair(lambda: load(2), copied=True) as pair:
        pair.expect(recipes)
        assert equal(pair, recipes[:2], klds[:2])
        whole = pair.kld(recipes[-1], 2)
        assert whole.shape[0] == 2 and np.array_equal(whole[:1], klds[-1])
        assert equal(pair, recipes, klds)
        pair.expect(recipes)
        assert equal(pair, recipes[1:], klds[1:])


def test_an_error_is_raised_where_its_recipe_is_asked_for_and_no_thread_stays(alone):
    load, recipes, klds = alone
    wrong = [*recipes[:3], {"no such tensor": "q4_0"}, *recipes[4:]]
    with ModelPair(lambda: load(2), copied=True) as pair:
        pair.expect(wrong)
        assert equal(pair, recipes[:3], klds[:3])
        with pytest.raises((BitladderError, KeyError)):
            pair.kld(wrong[3], 1)
        assert equal(pair, recipes[4:], klds[4:])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane")]


def test_only_a_model_that_is_small_beside_memory_has_a_copy():
    assert copies(1 << 20, Decoding(threads=2))
    assert not copies(1 << 20, Decoding(threads=1))
    assert not copies(1 << 20, Decoding(threads=2, gpu_layers=99))
    assert not copies(main_memory() / 8, Decoding(threads=2))

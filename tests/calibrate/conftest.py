"""Models and a text of which second moments are collected."""

import pytest
import tiny_models
from moe import write_moe

from bitladder.convert import convert
from bitladder.text import Text, load_text


@pytest.fixture(scope="module")
def text(calibration_text):
    return Text("part.txt", load_text(str(calibration_text)).text[:3000], "0")


@pytest.fixture(scope="module")
def moe(tiny_gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    write_moe(tiny_gguf, path, experts=6)
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A random Llama whose head is tied to the embeddings: the transformers model and its GGUF."""
    folder = tmp_path_factory.mktemp("tied")
    tiny_models.train_byte_level(folder)
    model = tiny_models.llama(folder, tie_word_embeddings=True)
    convert(folder, folder / "tied.gguf", outtype="f32")
    return model, folder / "tied.gguf"

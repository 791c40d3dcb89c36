"""A checkpoint of each module's own that its tests may change."""

import pathlib
import shutil

import pytest
import tiny_models


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The smallest Llama. Modules that want another one have their own."""
    folder = tmp_path_factory.mktemp("convert") / "Tiny"
    tiny_models.llama(folder, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    tiny_models.train_byte_level(folder)
    return folder


@pytest.fixture
def folder(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A fresh copy to change."""
    return pathlib.Path(shutil.copytree(original, tmp_path / "Tiny"))

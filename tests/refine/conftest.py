"""A text for models that are made here."""

import pytest
import tiny_models

from bitladder.text import load_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_models.TEXT * 6)
    return load_text(str(path))

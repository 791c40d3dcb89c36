"""The key of interrupted work, and what becomes of a folder with another key."""

import numpy as np
import pytest

from bitladder.calibrate import UnfinishedWork, job_key, unfinished
from bitladder.engine import Decoding
from bitladder.errors import BitladderError
from bitladder.keys import Algorithm
from bitladder.text import Text

FIRST, SECOND = (Algorithm("a", changes) for changes in (("first",), ("first", "second")))


def test_the_key_has_model_texts_algorithms_options_and_library(tiny_gguf, tmp_path, monkeypatch):
    text, other = Text("a", "words", "1"), Text("a", "words", "2")
    key = job_key(tiny_gguf, [text], FIRST, decoding=Decoding())
    assert job_key(tiny_gguf, [text], FIRST, decoding=Decoding(threads=1)) == key
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(tiny_gguf.read_bytes())
    keys = [
        key,
        job_key(changed, [text], FIRST, decoding=Decoding()),
        job_key(tiny_gguf, [other], FIRST, decoding=Decoding()),
        job_key(tiny_gguf, [text], SECOND, decoding=Decoding()),
        job_key(tiny_gguf, [text], FIRST, decoding=Decoding(n_ctx=256)),
    ]
    monkeypatch.setattr(unfinished, "versions", lambda: {"llama_cpp_commit": "another"})
    keys.append(job_key(tiny_gguf, [text], FIRST, decoding=Decoding()))
    assert len(set(keys)) == len(keys)


def test_a_folder_with_another_key_is_emptied_and_a_strange_one_is_left_alone(tmp_path):
    out, part = tmp_path / "out", np.arange(3.0)
    UnfinishedWork(out, "key").put("part", part)
    assert np.array_equal(UnfinishedWork(out, "key").get("part"), part)
    assert not UnfinishedWork(out, "another key").has("part")
    (tmp_path / "out.parts").mkdir()
    with pytest.raises(BitladderError, match=r"out\.parts is in the way"):
        UnfinishedWork(out, "key")

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


@pytest.mark.parametrize("place", [0, 9, -1])
def test_a_changed_byte_is_noticed_and_the_work_begins_anew(place, tmp_path):
    rows = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for name in ("array", "rows", "appended"):
        work = UnfinishedWork(tmp_path / "out", "key")
        work.put("array", rows)
        work.put_rows("rows", (2, 12), iter(rows.reshape(2, 12)))
        for index, row in enumerate(rows):
            work.append_row("appended", index, row)
        assert np.array_equal(work.get("array"), rows) and np.array_equal(work.get("rows"), rows.reshape(2, 12))
        assert work.kept_rows("appended", (3, 4)) == 2 and np.array_equal(work.read_row("appended", 1, (3, 4)), rows[1])
        data = bytearray((work.folder / name).read_bytes())
        data[len(data) // 2 + place if place >= 0 else place] ^= 4
        (work.folder / name).write_bytes(data)
        again = UnfinishedWork(tmp_path / "out", "key")
        with pytest.raises(BitladderError, match=f"{name} is damaged, and was deleted"):
            again.read_row(name, 1, (3, 4)) if name == "appended" else again.get(name)
        assert not any(tmp_path.iterdir())

"""Second moments in passes, chunk beside chunk, cut short and merged: the same bytes, and errors at once."""

import sys
import threading

import numpy as np
import pytest

from bitladder.calibrate import MomentsFile, MomentsOptions, UnfinishedWork, collect_moments
from bitladder.calibrate.moments import passes
from bitladder.calibrate.moments.triangles import sums_bytes
from bitladder.cli import invoke
from bitladder.engine import Decoding, Model
from bitladder.errors import BitladderError
from bitladder.text import Reading

DECODING = Decoding(n_ctx=64, threads=1)
PLAIN = MomentsOptions(weighting="tokens")
SMALL = {"reading": Reading(chunks=3), "decoding": DECODING}
GIB = 2**30


@pytest.mark.parametrize("which", ["tied", "moe"])
def test_little_memory_takes_passes_and_gives_the_same_bytes(which, request, text, tmp_path, monkeypatch):
    path = request.getfixturevalue(which)
    path, memory = (path, 2 * sums_bytes(256)) if which == "moe" else (path[1], sums_bytes(96))
    collect_moments(path, [text], tmp_path / "a.gguf", imatrix=tmp_path / "ai.gguf", options=PLAIN, **SMALL)
    held = []
    original = passes.MomentCollector.__init__

    def counting(self, parts, pool):
        held.append(sum((part.stop - part.start) * sums_bytes(part.entry.input.width) for part in parts))
        original(self, parts, pool)

    monkeypatch.setattr(passes.MomentCollector, "__init__", counting)
    little = PLAIN.replace(memory=memory / GIB)
    few = collect_moments(path, [text], tmp_path / "b.gguf", imatrix=tmp_path / "bi.gguf", options=little, **SMALL)
    assert few.passes == len(held) > 3 and max(held) <= memory
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (tmp_path / "ai.gguf").read_bytes() == (tmp_path / "bi.gguf").read_bytes()


def test_killed_in_two_passes_it_ends_with_the_same_bytes(tied, text, tmp_path, monkeypatch):
    path, decoded = tied[1], []
    memory = 7 * sums_bytes(64)
    options = SMALL | {"options": PLAIN.replace(memory=memory / GIB)}
    whole = collect_moments(path, [text], tmp_path / "a.gguf", imatrix=tmp_path / "ai.gguf", **options)
    assert whole.passes == 2
    original, kill_at = passes.watch_chunks, [2, 5]

    def dying(*arguments, **options):
        for done, kept in original(*arguments, **options):
            yield done, kept  # the state is saved before this goes on
            decoded.append(done)
            if len(decoded) in kill_at:
                raise KeyboardInterrupt

    monkeypatch.setattr(passes, "watch_chunks", dying)
    monkeypatch.setattr(UnfinishedWork, "due", lambda _: True)
    options["imatrix"] = tmp_path / "bi.gguf"
    for _ in kill_at:
        with pytest.raises(KeyboardInterrupt):
            collect_moments(path, [text], tmp_path / "b.gguf", **options)
        assert not (tmp_path / "b.gguf").exists() and (tmp_path / "b.gguf.parts").is_dir()
    collect_moments(path, [text], tmp_path / "b.gguf", **options)
    assert decoded == [1, 2, 3, 1, 2, 3]
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (tmp_path / "ai.gguf").read_bytes() == (tmp_path / "bi.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "ai.gguf", "b.gguf", "bi.gguf"]


@pytest.mark.parametrize("n_ubatch", [512, 32])
@pytest.mark.parametrize("which", ["tied", "moe"])
def test_threads_change_no_byte(which, n_ubatch, request, text, tmp_path):
    """One thread decodes chunk by chunk, two and three two chunks side by side."""
    path = request.getfixturevalue(which)
    path, files = path if which == "moe" else path[1], set()
    for threads in (1, 2, 3):
        out, beside = tmp_path / f"{threads}.gguf", tmp_path / f"{threads}.imatrix"
        decoding = Decoding(n_ctx=64, n_ubatch=n_ubatch, threads=threads)
        reading = Reading(chunks=7)
        collect_moments(path, [text], out, imatrix=beside, options=PLAIN, reading=reading, decoding=decoding)
        files.add(out.read_bytes() + beside.read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("broken", [2, 3])
def test_an_error_in_a_chunk_ends_the_one_beside_it(tied, text, tmp_path, monkeypatch, broken):
    inputs = sys.modules["bitladder.calibrate.inputs"]
    original, reading = inputs.decode_columns, Reading(chunks=6, spread=False)
    with Model(tied[1], vocab_only=True) as model:
        row = reading.rows(model, [text], 64)[broken]

    def decode_columns(context, rows, first, stop):
        if np.array_equal(rows[0], row):
            raise BitladderError("this chunk is broken")
        original(context, rows, first, stop)

    monkeypatch.setattr(inputs, "decode_columns", decode_columns)
    options = {"options": PLAIN, "reading": reading}
    with pytest.raises(BitladderError, match="this chunk is broken"):
        collect_moments(tied[1], [text], tmp_path / "m", decoding=DECODING.replace(threads=2), **options)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane ")]


def test_what_another_job_or_a_crash_left_is_not_used(tied, text, tmp_path, monkeypatch):
    out = tmp_path / "m.gguf"
    monkeypatch.setattr(UnfinishedWork, "due", lambda _: True)
    monkeypatch.setattr(passes, "write_imatrix", lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        collect_moments(tied[1], [text], out, imatrix=tmp_path / "i", options=PLAIN, **SMALL)
    (tmp_path / "m.gguf.parts" / "state").write_bytes(b"PK\x03\x04 and then nothing")
    monkeypatch.undo()
    collect_moments(tied[1], [text], out, imatrix=tmp_path / "i", options=PLAIN, **SMALL)
    (tmp_path / "m.gguf.parts").mkdir()
    with pytest.raises(BitladderError, match=r"m\.gguf\.parts is in the way"):
        collect_moments(tied[1], [text], out, options=PLAIN, **SMALL)


def test_halves_merge_to_the_whole(moe, text, tmp_path):
    options = {"decoding": DECODING, "options": PLAIN}
    first, second = Reading(chunks=1, spread=False), Reading(chunks=3, from_chunk=1, spread=False)
    collect_moments(moe, [text], tmp_path / "whole", reading=Reading(chunks=4, spread=False), **options)
    collect_moments(moe, [text], tmp_path / "a", reading=first, **options)
    collect_moments(moe, [text], tmp_path / "b", reading=second, in_files=[tmp_path / "a"], **options)
    assert invoke(["calibrate", "-q", "--in-file", str(tmp_path / "b"), "-o", str(tmp_path / "c")]) == 0
    with MomentsFile(tmp_path / "b") as merged, MomentsFile(tmp_path / "c") as alone:
        assert alone.provenance == merged.provenance and alone.names() == merged.names()
        assert all(np.array_equal(alone.packed(name), merged.packed(name)) for name in merged.names())
        assert all(alone.entry(name) == merged.entry(name) for name in merged.names())
    with MomentsFile(tmp_path / "whole") as whole, MomentsFile(tmp_path / "b") as merged:
        assert merged.names() == whole.names() and merged.provenance.chunk_count == 4
        for name in whole.names():
            a, b = whole.read(name), merged.read(name)
            assert a.counts.tolist() == b.counts.tolist() and merged.entry(name) == whole.entry(name)
            assert np.abs(a.inputs - b.inputs).max() <= 1e-3 * a.inputs.max()

"""Moments of several texts: each text read by itself, or all in one go, killed anywhere, gives the same bytes."""

import pathlib

import numpy as np
import pytest
import tiny_models
from heard import Heard
from moe import mixture, write_mixture

from bitladder.calibrate import (
    GradientOptions,
    MomentsFile,
    MomentsJob,
    MomentsOptions,
    UnfinishedWork,
    collect_moments,
    collect_text,
    join_texts,
)
from bitladder.calibrate.gradients import gradient_pass
from bitladder.calibrate.moments import passes
from bitladder.convert import convert
from bitladder.engine import Decoding
from bitladder.errors import BitladderError
from bitladder.text import Reading, Text, load_text

DECODING = Decoding(n_ctx=64, threads=1)
GRADIENTS, PLAIN = MomentsOptions(weighting="gradients"), MomentsOptions(weighting="tokens")
POSITIONS = MomentsOptions(weighting="positions")
LITTLE = 1e-6  # GiB: each block is a segment of its own, each matrix a pass


@pytest.fixture(scope="module")
def texts(calibration_text):
    """Three texts, the second of which is short."""
    whole = load_text(str(calibration_text)).text
    return [
        Text(f"{start}.txt", whole[start:stop], str(start)) for start, stop in ((0, 900), (900, 1140), (1140, 2000))
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by-text")
    tiny_models.train_byte_level(folder)
    tiny_models.llama(folder)
    convert(folder, folder / "llama.gguf", outtype="f32")
    write_mixture("olmoe", mixture("olmoe"), folder / "llama.gguf", folder / "olmoe.gguf")
    return folder


def in_one_go(model, texts, out, chunks, options):
    collect_moments(model, texts, out, reading=Reading(chunks=chunks), decoding=DECODING, options=options)
    return out.read_bytes()


CASES = [
    ("llama", 4, GRADIENTS),  # nine chunks: some are for the leverages
    ("llama", 2, GRADIENTS),  # too few for that
    ("llama", 1, MomentsOptions(weighting="gradients", gradients=GradientOptions(fewest=2))),  # nothing else of a text
    ("llama", 4, GRADIENTS.replace(memory=LITTLE)),
    ("olmoe", 4, GRADIENTS),
    ("olmoe", 4, PLAIN),
    ("llama", 4, PLAIN.replace(memory=LITTLE)),
    ("llama", 4, POSITIONS),
]


@pytest.mark.parametrize(("name", "chunks", "options"), CASES)
def test_texts_that_are_read_one_by_one_give_the_same_bytes(models, texts, tmp_path, name, chunks, options):
    model, out = models / f"{name}.gguf", tmp_path / "joined.gguf"
    whole = in_one_go(model, texts, tmp_path / "whole.gguf", chunks, options)

    def job():
        return MomentsJob(model, texts, Reading(chunks=chunks), DECODING, options, progress=Heard())

    if options.memory is None and name == "llama":
        collect_text(job(), out, 0)
        with pytest.raises(BitladderError, match=r"joined\.gguf\.text-1\.parts is not complete"):
            join_texts(job(), out)
    for number in (2, 0, 1):  # on machines of their own, in any order, one of them twice
        collect_text(job(), out, number)
    collect_text(job(), out, 2)
    result = join_texts(job(), out)
    assert out.read_bytes() == whole and result.weighting == options.weighting
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joined.gguf", "whole.gguf"]


@pytest.mark.parametrize(("name", "chunks", "options"), [CASES[0], CASES[3], *CASES[5:]])
def test_killed_before_each_chunk_it_ends_with_the_same_bytes(
    models, texts, tmp_path, monkeypatch, name, chunks, options
):
    model, out = models / f"{name}.gguf", tmp_path / "killed.gguf"
    whole = in_one_go(model, texts, tmp_path / "whole.gguf", chunks, options)
    met, kills = set(), 0

    def once(place):
        if place not in met:
            met.add(place)
            raise KeyboardInterrupt

    chunk, watch, keep = gradient_pass.GradientPass._chunk, passes.watch_chunks, UnfinishedWork.put_arrays

    def dying_chunk(self, segment, turn, entries):
        once((segment.first, turn.chunk))
        return chunk(self, segment, turn, entries)

    def dying_watch(*arguments, done, **more):
        for read, kept in watch(*arguments, done=done, **more):
            yield read, kept  # the state is saved before this goes on
            once((len(met) if options.memory else 0, read))

    def dying_keep(self, name, arrays):
        once(("before", name))
        keep(self, name, arrays)
        once(("after", name))

    monkeypatch.setattr(gradient_pass.GradientPass, "_chunk", dying_chunk)
    if options.memory is None:  # else each matrix is a pass
        monkeypatch.setattr(passes, "watch_chunks", dying_watch)
    monkeypatch.setattr(UnfinishedWork, "put_arrays", dying_keep)
    monkeypatch.setattr(UnfinishedWork, "due", lambda _: True)
    while not out.exists():
        try:
            in_one_go(model, texts, out, chunks, options)
        except KeyboardInterrupt:
            kills += 1
            assert kills < 500
    assert kills > 9 and out.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.gguf", "whole.gguf"]


def test_texts_together_are_the_mean_of_each(models, texts, tmp_path):
    """By tokens, as far as F16 holds it."""
    model = models / "llama.gguf"
    in_one_go(model, texts, tmp_path / "all.gguf", 4, PLAIN)
    each = []
    for number, text in enumerate(texts):
        in_one_go(model, [text], tmp_path / f"{number}.gguf", 4, PLAIN)
        with MomentsFile(tmp_path / f"{number}.gguf") as file:
            each.append({name: file.read(name) for name in file.names()})
    with MomentsFile(tmp_path / "all.gguf") as file:
        for name in file.names():
            tokens = np.array([moments[name].counts[0] for moments in each])
            expected = sum(moments[name].inputs[0] * count for moments, count in zip(each, tokens, strict=True))
            found = file.read(name)
            assert found.counts[0] == tokens.sum() and len(set(tokens)) > 1
            assert np.abs(found.inputs[0] - expected / tokens.sum()).max() < 2e-3 * np.abs(found.inputs[0]).max()


def test_sums_of_another_model_are_not_joined(models, texts, tmp_path):
    """The folder of a text is found by what the model holds, not by when it was written."""
    copy, out = tmp_path / "copy.gguf", tmp_path / "m.gguf"
    copy.write_bytes((models / "llama.gguf").read_bytes())
    job = MomentsJob(copy, texts, Reading(chunks=2), DECODING, PLAIN)
    complete = collect_text(job, out, 0)
    pathlib.Path(copy).touch()
    assert MomentsJob(copy, texts, Reading(chunks=2), DECODING, PLAIN).work(out, 0).has(complete.name)
    with copy.open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 1]))
    assert not MomentsJob(copy, texts, Reading(chunks=2), DECODING, PLAIN).work(out, 0).has(complete.name)

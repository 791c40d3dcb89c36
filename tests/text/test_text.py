"""Texts made from texts, and their chunks."""

import hashlib

import numpy as np
import pytest

from bitladder.engine import Model
from bitladder.errors import BitladderError, UsageError
from bitladder.text import Reading, Text, excerpts, load_text, load_texts, set_apart, text_chunks

RAW = b"caf\xc3\xa9 \xff\xfe end"  # not UTF-8


def raw_text():
    return Text.of("raw", RAW.decode("utf-8", "surrogateescape"))


def test_a_text_is_known_by_its_bytes(tmp_path):
    assert raw_text().sha256 == hashlib.sha256(RAW).hexdigest()
    data = RAW + b" and so on" * 20_000  # among so many bytes a stray one is kept
    (tmp_path / "raw").write_bytes(data)
    loaded = load_text(str(tmp_path / "raw"))
    assert loaded.sha256 == hashlib.sha256(data).hexdigest()
    assert loaded.text.encode("utf-8", "surrogateescape") == data.removesuffix(b"\n")


def test_what_is_set_apart_and_what_is_left_make_up_the_texts():
    texts = [load_text("pydoc:test"), raw_text()]
    kept, held_out = set_apart(texts, 0.25)
    assert [text.name for text in kept] == [text.name for text in texts]
    ends = [text.text.removeprefix(part.text) for text, part in zip(texts, kept, strict=True)]
    assert [part.text + end for part, end in zip(kept, ends, strict=True)] == [text.text for text in texts]
    assert [text.text for text in held_out] == ends and [text.name for text in held_out] == ["pydoc:test", "raw"]
    assert [len(end) / len(text.text) for text, end in zip(texts, ends, strict=True)] == pytest.approx(
        [0.25] * 2, abs=0.1
    )


def test_passages_lie_all_over_the_text():
    text = load_text("pydoc:test")
    short = excerpts([text], chunks=3, n_ctx=64)
    passages = [passage for passage in short.text.split("\n\n") if passage]
    places = [text.text.index(passage) / len(text.text) for passage in passages]
    assert min(places) < 0.3 and max(places) > 0.7
    assert len(short.text) >= 3 * 64 * 4
    assert excerpts([short], chunks=3, n_ctx=64) is short


def test_passages_of_several_texts_take_turns():
    texts = [Text.of(name, "\n".join(f"{name}{line:05}" for line in range(lines))) for name, lines in
             (("a", 9000), ("b", 30), ("c", 4000))]  # fmt: skip
    passages = excerpts(texts, chunks=9, n_ctx=64).text.split("\n\n")
    # b has one passage to give; the others give the rest, half and half.
    assert [passage[0] for passage in passages] == ["a", "b", "c", *"acacac", "a"]
    for name, lines in (("a", 9000), ("c", 4000)):
        places = [int(passage[1:6]) for passage in passages if passage[0] == name]
        assert min(places) < lines / 4 and max(places) > lines * 0.7


@pytest.mark.parametrize("chunks", [2, 4, 7, 8, 12, 16, 40])
def test_the_chunks_that_are_read_lie_all_over_a_text_too(chunks):
    """Tokens of words have four characters and more, so that half of the passages are read."""
    text = Text.of("numbers", "\n".join(f"{number:07}" for number in range(400_000)))
    passages = excerpts([text], chunks, n_ctx=512).text.split("\n\n")
    places = [int(passage[:7]) / 400_000 for passage in passages[: (chunks + 1) // 2]]
    gaps = np.diff([0.0, *sorted(places), 1.0])
    assert max(gaps) < 2.1 / len(places)
    assert len(set(passages)) == chunks + 1


def test_texts_are_told_apart(tmp_path):
    for folder, content in (("a", "one text"), ("b", "another text"), ("c", "one text")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "wiki.txt").write_text(content)
    files = [str(tmp_path / folder / "wiki.txt") for folder in "abc"]
    assert [text.name for text in load_texts(files[:2])] == ["wiki.txt", "wiki.txt (2)"]
    with pytest.raises(UsageError, match=r"wiki\.txt and wiki\.txt are the same"):
        load_texts(files)


def test_chunks_of_several_texts_follow_one_another(tiny_gguf):
    texts = [load_text("pydoc:test"), load_text("pydoc:calibration")]
    with Model(tiny_gguf, vocab_only=True) as model:
        tokens = [model.tokenize(text.text) for text in texts]
        rows = Reading(chunks=2, from_chunk=1, spread=False).rows(model, texts, 64)
        with pytest.raises(BitladderError, match=r"--from-chunk \d+ leaves too few"):
            text_chunks(model, texts[0], 64, from_chunk=len(tokens[0]) // 64 - 1)
        bos = model.bos if model.add_bos else None
    expected = np.concatenate([part[64 : 3 * 64].reshape(2, 64) for part in tokens])
    assert np.array_equal(rows[:, 1:], expected[:, 1:])
    assert np.array_equal(rows[:, 0], expected[:, 0] if bos is None else [bos] * 4)

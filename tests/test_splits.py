"""Models in shards: written, read, loaded by the library, and what is wrong with them said."""

import itertools
import shutil

import gguf
import numpy as np
import pytest

from bitladder.engine.model import Model
from bitladder.errors import BitladderError
from bitladder.model.reader import GgufFile
from bitladder.model.splits import parse_size
from bitladder.quantize import QuantizeOptions, quantize

LIMIT = 3_000_000


@pytest.fixture(scope="module")
def shards(tiny_gguf, tmp_path_factory):
    """The first of several shards of the embedded model."""
    folder = tmp_path_factory.mktemp("shards")
    return quantize(tiny_gguf, folder / "m.gguf", QuantizeOptions("COPY", split_max_bytes=LIMIT)).path


def parts_of(first):
    return sorted(first.parent.glob("*.gguf"))


def test_shards_are_named_and_hold_what_the_whole_file_holds(shards, tiny_gguf):
    parts = parts_of(shards)
    assert len(parts) > 2
    assert [part.name for part in parts] == [f"m-{n:05}-of-{len(parts):05}.gguf" for n in range(1, len(parts) + 1)]
    with GgufFile(tiny_gguf) as whole, GgufFile(shards) as split:
        assert list(split.parts) == parts
        assert split.tensors.keys() == whole.tensors.keys()
        for name, tensor in whole.tensors.items():
            assert np.array_equal(split.read(split.tensors[name]), whole.read(tensor))
        assert split.size == sum(part.stat().st_size for part in parts)


def test_the_library_and_the_gguf_package_read_them(shards, tiny_gguf):
    with Model(shards) as split, Model(tiny_gguf) as whole:
        assert (split.n_params, split.size) == (whole.n_params, whole.size)
    count = 0
    parts = parts_of(shards)
    for number, part in enumerate(parts):
        reader = gguf.GGUFReader(part)
        assert reader.fields["split.no"].contents() == number
        assert reader.fields["split.count"].contents() == len(parts)
        count += len(reader.tensors)
        assert sum(int(tensor.n_bytes) for tensor in reader.tensors) <= LIMIT or len(reader.tensors) == 1
    assert gguf.GGUFReader(parts[0]).fields["split.tensors.count"].contents() == count


def test_no_shard_could_have_taken_the_next_tensor(shards):
    readers = [gguf.GGUFReader(part) for part in parts_of(shards)]
    for reader, after in itertools.pairwise(readers):
        padded = sum(-(-int(tensor.n_bytes) // 32) * 32 for tensor in reader.tensors)
        assert padded + int(after.tensors[0].n_bytes) > LIMIT


def test_kept_shards_hold_the_same_tensors(shards, tmp_path):
    made = quantize(shards, tmp_path / "q.gguf", QuantizeOptions("Q8_0", keep_split=True)).path
    for before, after in zip(parts_of(shards), parts_of(made), strict=True):
        names = [{tensor.name for tensor in gguf.GGUFReader(part).tensors} for part in (before, after)]
        assert names[0] == names[1]
    joined = quantize(shards, tmp_path / "joined" / "q.gguf", QuantizeOptions("Q8_0")).path
    with GgufFile(made) as split, GgufFile(joined) as whole:
        assert "split.count" not in whole.metadata
        for name, tensor in whole.tensors.items():
            assert np.array_equal(split.read(split.tensors[name]), whole.read(tensor))


def test_what_is_wrong_with_shards(shards, tmp_path):
    for part in parts_of(shards):
        shutil.copy(part, tmp_path / part.name)
    parts = parts_of(tmp_path / shards.name)
    with pytest.raises(BitladderError, match=parts[0].name):
        GgufFile(parts[1])
    kept = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(BitladderError, match=parts[1].name):
        GgufFile(parts[0])
    shutil.copy(parts[2], parts[1])  # a shard in the place of another
    with pytest.raises(BitladderError):
        GgufFile(parts[0])
    parts[1].write_bytes(kept[:-100])
    with pytest.raises(BitladderError, match=parts[1].name):
        GgufFile(parts[0])


def test_a_failure_leaves_no_shard(tiny_gguf, tmp_path, monkeypatch):
    from bitladder.quantize import stream

    real, calls = stream.quantize_rows, []

    def fail_late(*arguments):
        calls.append(1)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(stream, "quantize_rows", fail_late)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_gguf, tmp_path / "q.gguf", QuantizeOptions("Q8_0", split_max_bytes=1_000_000), threads=1)
    assert not list(tmp_path.iterdir())


def test_sizes_are_as_llama_gguf_split_takes_them():
    assert parse_size("2G") == 2_000_000_000
    assert parse_size("300M") == 300_000_000
    for wrong in ("", "0", "3X", "-1M", "G"):
        with pytest.raises(BitladderError):
            parse_size(wrong)

"""GGUF files: read like the gguf package reads them, written so that it reads them, and refused when damaged."""

import struct

import gguf
import numpy as np
import pytest

from bitladder.engine import type_by_name
from bitladder.errors import BitladderError
from bitladder.files import replacing
from bitladder.gguf import GgufFile, GgufWriter, TensorPlan, file_size, string, strings, u32


def test_reads_what_the_gguf_package_reads(tiny_gguf):
    reference = gguf.GGUFReader(tiny_gguf)
    with GgufFile(tiny_gguf) as file:
        for key, value in file.metadata.items():
            assert value.python() == reference.fields[key].contents(), key
        assert [t.name for t in reference.tensors] == list(file.tensors)
        for tensor in reference.tensors:
            ours = file.tensors[tensor.name]
            assert ours.shape == tuple(tensor.shape) and ours.type.id == tensor.tensor_type
            assert np.array_equal(file.read(ours).reshape(-1), tensor.data.view(np.uint8).reshape(-1))
        part = file.tensors["blk.0.ffn_up.weight"]
        assert np.array_equal(file.read(part, 10, 20), file.read(part)[10:20])


def write_small(path, metadata=None, name="a.weight"):
    f32 = type_by_name("f32")
    plans = [TensorPlan(name, (8, 3), f32), TensorPlan("b.weight", (5,), f32)]
    metadata = metadata or {"general.architecture": string("x"), "x.list": strings(["α", "", "c"]), "x.n": u32(7)}
    arrays = {name: np.arange(24, dtype=np.float32), "b.weight": np.ones(5, np.float32)}
    with path.open("wb") as stream:
        writer = GgufWriter(stream, metadata, plans)
        for key, array in arrays.items():
            writer.write(key, array.view(np.uint8)[:16])
            writer.write(key, array.view(np.uint8)[16:])
        writer.finish()
    assert path.stat().st_size == file_size(metadata, plans)


def test_written_files_are_read_by_the_gguf_package(tmp_path):
    write_small(tmp_path / "small.gguf")
    reference = gguf.GGUFReader(tmp_path / "small.gguf")
    assert reference.fields["x.list"].contents() == ["α", "", "c"]
    assert reference.tensors[0].data.tolist() == np.arange(24).reshape(3, 8).tolist()


def test_every_truncation_is_noticed(tmp_path):
    write_small(tmp_path / "small.gguf")
    data = (tmp_path / "small.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, len(data) - 40, 7), len(data) - 13]:
        cut.write_bytes(data[:size])
        with pytest.raises(BitladderError, match=r"cut\.gguf"):
            GgufFile(cut)


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF\x03", b"GGUX\x03", "not a GGUF"),
        (b"GGUF\x03", b"GGUF\x09", "version 9"),
        (b"b.weight", b"a.weight", "a.weight occurs twice"),
        (struct.pack("<IQQ", 2, 8, 3), struct.pack("<IQQ", 2, 0, 3), "a.weight has the shape"),
        (struct.pack("<IQQI", 2, 8, 3, 0), struct.pack("<IQQI", 2, 8, 3, 99), "type number 99"),
        (struct.pack("<IQIQ", 1, 5, 0, 96), struct.pack("<IQIQ", 1, 5, 0, 1 << 30), "b.weight should lie"),
        (struct.pack("<IQIQ", 1, 5, 0, 96), struct.pack("<IQIQ", 1, 5, 0, 4), "b.weight should lie"),
    ],
)
def test_damage_is_named(tmp_path, old, new, message):
    write_small(tmp_path / "small.gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(patched((tmp_path / "small.gguf").read_bytes(), old, new))
    with pytest.raises(BitladderError, match=message):
        GgufFile(bad)


def test_replacing_leaves_nothing_behind(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(BitladderError, match="is a directory"), replacing(tmp_path):
        pass


def test_a_device_is_not_replaced_and_a_link_stays(tmp_path):
    with pytest.raises(BitladderError, match="not a regular file"), replacing("/dev/null"):
        pass
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


def test_a_full_disk_is_one_clear_line(tmp_path):
    with (
        pytest.raises(BitladderError, match=r"cannot write .*No space left"),
        replacing(tmp_path / "file"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")

"""Models in shards: written, read, loaded by the library, and what is wrong with them said."""

import hashlib
import itertools
import pathlib
import shutil

import gguf
import numpy as np
import pytest

from bitladder.engine import Model, type_by_name
from bitladder.errors import BitladderError, UsageError
from bitladder.evaluate import identify
from bitladder.gguf import (
    GgufFile,
    TensorPlan,
    group_as,
    group_by_size,
    i32,
    output_paths,
    plain_path,
    shard_path,
    shards_of,
    split_sizes,
    string,
    u16,
    u32,
    writing,
)
from bitladder.ladder.source import describe
from bitladder.ladder.store import open_store
from bitladder.quantize import QuantizeOptions, quantize
from bitladder.units import parse_size

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
    from bitladder.quantize import write_quant

    real, calls = write_quant.quantize_rows, []

    def fail_late(*arguments):
        calls.append(1)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(write_quant, "quantize_rows", fail_late)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_gguf, tmp_path / "q.gguf", QuantizeOptions("Q8_0", split_max_bytes=1_000_000), threads=1)
    assert not list(tmp_path.iterdir())


def plans_of(file):
    return [TensorPlan(tensor.name, tensor.shape, tensor.type) for tensor in file.tensors.values()]


def copy_in(groups, source, out):
    """Write a model again, in those groups; returns its files."""
    with GgufFile(source) as file, writing(out, file.metadata, groups) as writer:
        for plan in itertools.chain(*groups):
            data = file.read(file.tensors[plan.name]).reshape(-1)
            writer.write(plan.name, data[:4])
            writer.write(plan.name, data[4:])
    return output_paths(out, groups)


@pytest.mark.parametrize("size", ["3M", "4M", "90M"])
def test_llama_gguf_split_makes_the_same_shards_and_merges_ours(size, tiny_gguf, tmp_path, tools):
    if not (tools.folder / "llama-gguf-split").exists():
        pytest.skip("LLAMA_CPP_TOOLS has no llama-gguf-split")
    (tmp_path / "theirs").mkdir()
    tools.run("llama-gguf-split", "--split", "--split-max-size", size, tiny_gguf, tmp_path / "theirs" / "m")
    with GgufFile(tiny_gguf) as whole:
        groups = group_by_size(plans_of(whole), parse_size(size))
        ours = copy_in(groups, tiny_gguf, tmp_path / "ours" / "m.gguf")
        assert [path.stat().st_size for path in ours] == split_sizes(whole.metadata, groups)
        theirs = sorted((tmp_path / "theirs").iterdir())
        if len(groups) == 1:  # they number a model of one file, we do not
            assert [path.name for path in (*ours, *theirs)] == ["m.gguf", "m-00001-of-00001.gguf"]
            return
        assert [path.name for path in ours] == [path.name for path in theirs]
        for a, b in zip(ours, theirs, strict=True):
            mine, reference = gguf.GGUFReader(a), gguf.GGUFReader(b)
            assert [tensor.name for tensor in mine.tensors] == [tensor.name for tensor in reference.tensors]
            assert mine.fields.keys() == reference.fields.keys()
            for key, field in reference.fields.items():
                assert mine.fields[key].types == field.types and mine.fields[key].contents() == field.contents(), key
        merged = tmp_path / "merged.gguf"
        tools.run("llama-gguf-split", "--merge", ours[0], merged)
        with GgufFile(merged) as again, GgufFile(theirs[0]) as split:
            assert list(again.tensors) == list(whole.tensors) == list(split.tensors)
            for name, tensor in whole.tensors.items():
                data = whole.read(tensor)
                assert np.array_equal(again.read(again.tensors[name]), data)
                assert np.array_equal(split.read(split.tensors[name], 1), data[1:])


def test_kept_shards_are_llama_quantizes(shards, tmp_path, tools):
    made = quantize(shards, tmp_path / "ours.gguf", QuantizeOptions("Q4_K_M", keep_split=True)).path
    tools.run("llama-quantize", "--keep-split", shards, tmp_path / "theirs.gguf", "Q4_K_M")
    for part in shards_of(made):
        mine, theirs = gguf.GGUFReader(part), gguf.GGUFReader(part.with_name(part.name.replace("ours", "theirs")))
        for a, b in zip(mine.tensors, theirs.tensors, strict=True):
            assert (a.name, a.tensor_type) == (b.name, b.tensor_type) and np.array_equal(a.data, b.data)


F32 = type_by_name("f32")
SMALL = [TensorPlan("a", (8, 2), F32), TensorPlan("b", (8, 9), F32), TensorPlan("c", (3,), F32)]  # 64, 288, 12 bytes
GENERAL = {"general.architecture": string("llama"), "x.n": u32(7)}


def write_small(out, groups=((SMALL[0],), (SMALL[1],), (SMALL[2],))):
    with writing(out, GENERAL, groups) as writer:
        for plan in itertools.chain(*groups):
            writer.write(plan.name, np.full(plan.nbytes, ord(plan.name), np.uint8))
    return output_paths(out, groups)


def names(groups):
    return ["".join(plan.name for plan in group) for group in groups]


def test_groups():
    assert names(group_by_size(SMALL, 10_000)) == ["abc"]
    assert names(group_by_size(SMALL, 64 + 288)) == ["ab", "c"]
    assert names(group_by_size(SMALL, 64 + 287)) == ["a", "bc"]
    assert names(group_by_size(SMALL, 288 + 31)) == ["a", "b", "c"]  # c has 12 bytes, padded 32
    assert names(group_by_size(SMALL, 1)) == ["a", "b", "c"]  # each larger than the limit, and the first too
    assert names(group_by_size([], 1)) == [""]


def test_names(tmp_path):
    assert shard_path(pathlib.Path("d/X.gguf"), 2, 3) == pathlib.Path("d/X-00002-of-00003.gguf")
    assert shard_path(pathlib.Path("X.v1"), 1, 12).name == "X.v1-00001-of-00012.gguf"
    assert shard_path(pathlib.Path("X-00001-of-00005.gguf"), 2, 3).name == "X-00002-of-00003.gguf"
    assert plain_path(pathlib.Path("X-00001-of-00005.gguf")).name == "X.gguf"
    assert len(shards_of(pathlib.Path("X-00001-of-00005.gguf"))) == 5
    assert len(shards_of(pathlib.Path("X-00002-of-00005.gguf"))) == len(shards_of(pathlib.Path("X.gguf"))) == 1
    made = write_small(tmp_path / "X-00001-of-00009.gguf")
    assert [path.name for path in made] == [f"X-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert [path.name for path in write_small(tmp_path / "Y-00001-of-00009.gguf", [SMALL])] == ["Y.gguf"]
    with pytest.raises(BitladderError, match="65,536 shards"):
        output_paths("X.gguf", [[]] * 65536)


def test_only_the_first_shard_carries_metadata(tmp_path):
    first, *others = write_small(tmp_path / "X.gguf")
    keys = ["split.no", "split.count", "split.tensors.count"]
    own = [key for key in gguf.GGUFReader(first).fields if not key.startswith("GGUF.")]
    assert own == [*GENERAL, *keys]
    for other in others:
        assert [key for key in gguf.GGUFReader(other).fields if not key.startswith("GGUF.")] == keys
    with GgufFile(first) as file:
        assert [tensor.part for tensor in file.tensors.values()] == [0, 1, 2]
        assert file.get("x.n") == 7 and (file.read(file.tensors["c"]) == ord("c")).all()
        # Written again as one file, nothing of the split is left.
        (joined,) = copy_in([plans_of(file)], first, tmp_path / "Y.gguf")
        assert group_as(SMALL[::-1], file.tensors) == [[plan] for plan in SMALL]
    assert joined.read_bytes() == write_small(tmp_path / "Z.gguf", [SMALL])[0].read_bytes()


def test_a_first_shard_without_tensors_is_kept(tmp_path):
    first, _ = write_small(tmp_path / "X.gguf", [[], SMALL])
    with GgufFile(first) as file:
        assert len(file.parts) == 2 and list(file.tensors) == ["a", "b", "c"]
        assert [len(group) for group in group_as(SMALL[1:], file.tensors)] == [0, 2]


def replaced_in(path, key, value):
    """A shard's bytes with another value of the same type for a key of the split."""
    data = path.read_bytes()
    place = data.index(key.encode()) + len(key) + 4
    return data[:place] + value.raw + data[place + len(value.raw) :]


def test_shards_that_do_not_belong_together(tmp_path):
    def fresh():
        return write_small(tmp_path / "X.gguf")

    first, second, third = fresh()
    third.unlink()
    with pytest.raises(BitladderError, match=f"shard 3 of 3 is missing: {third}; fetch it"):
        GgufFile(first)
    second.unlink()
    with pytest.raises(BitladderError, match=r"shard 2 of 3 is missing: .* \(and 1 more\); fetch it"):
        GgufFile(first)
    first, second, third = fresh()
    with pytest.raises(BitladderError, match=f"is shard 2 of 3; name the first: {first}"):
        GgufFile(second)
    shutil.copy(second, third)
    with pytest.raises(BitladderError, match=f"{third.name} is shard 2, not 3: the names are mixed up"):
        GgufFile(first)
    fresh()
    third.write_bytes(replaced_in(third, "split.count", u16(4)))
    with pytest.raises(BitladderError, match=f"{third.name} is of another model than {first.name}: a shard of 4"):
        GgufFile(first)
    fresh()
    second.write_bytes(replaced_in(second, "split.tensors.count", i32(9)))
    with pytest.raises(BitladderError, match=f"{second.name} is of another model .* with 9 tensors"):
        GgufFile(first)
    fresh()
    shutil.copy(write_small(tmp_path / "Y.gguf", [[SMALL[1]], [SMALL[0]], [SMALL[2]]])[1], second)
    with pytest.raises(BitladderError, match=f"{second.name}: tensor a is also in {first.name}"):
        GgufFile(first)
    fresh()
    groups = [[SMALL[0]], [SMALL[1], TensorPlan("d", (3,), F32)], [SMALL[2]]]
    shutil.copy(write_small(tmp_path / "Y.gguf", groups)[1], second)
    second.write_bytes(replaced_in(second, "split.tensors.count", i32(3)))
    with pytest.raises(BitladderError, match="the 3 shards should have 3 tensors and have 4"):
        GgufFile(first)


def test_names_that_do_not_fit_the_metadata(tmp_path):
    first, *_ = write_small(tmp_path / "X.gguf")
    for name in ("renamed.gguf", "X-00001-of-00002.gguf"):
        shutil.copy(first, tmp_path / name)
        with pytest.raises(BitladderError, match="is the first of 3 shards.*: call it .*-00001-of-00003.gguf"):
            GgufFile(tmp_path / name)
    shutil.copy(write_small(tmp_path / "whole.gguf", [SMALL])[0], tmp_path / "Z-00002-of-00003.gguf")
    with pytest.raises(BitladderError, match="named as shard 2 of 3, but its metadata have no split"):
        GgufFile(tmp_path / "Z-00002-of-00003.gguf")


def test_the_last_name_not_to_be_had_takes_the_others_back(tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("kept")
    real = pathlib.Path.replace

    def refuse_first(self, target):
        if target.name.startswith("X-00001"):
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", refuse_first)
    with pytest.raises(BitladderError, match=r"cannot write .*X-00001-of-00003.gguf: Input/output error"):
        write_small(tmp_path / "X.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("failing", [3, 2, 1])
def test_shards_that_cannot_all_be_replaced_stay(failing, tmp_path, monkeypatch):
    old = write_small(tmp_path / "X.gguf")
    before = {path.name: path.read_bytes() for path in old}
    real = pathlib.Path.replace

    def refuse(self, target):
        assert not old[0].exists(), "killed now, old and new shards would be taken for one model"
        if target == old[failing - 1] and ".old" not in self.name:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", refuse)
    other = TensorPlan("a", (8, 4), F32)
    with pytest.raises(BitladderError, match=f"cannot write .*X-0000{failing}-of-00003.gguf: Input/output error"):
        write_small(tmp_path / "X.gguf", ((other,), (SMALL[1],), (SMALL[2],)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    write_small(tmp_path / "X.gguf", ((other,), (SMALL[1],), (SMALL[2],)))
    assert {path.name for path in tmp_path.iterdir()} == before.keys()
    with GgufFile(old[0]) as file:
        assert file.tensors["a"].shape == (8, 4)


def test_the_shard_that_does_not_fit_is_named(tmp_path, monkeypatch):
    real = pathlib.Path.open

    def full(self, mode="r", *arguments, **options):
        if self.name.startswith(".X-00002") and mode == "wb":
            return real(pathlib.Path("/dev/full"), mode, buffering=0)
        return real(self, mode, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "open", full)
    with pytest.raises(BitladderError, match=r"cannot write .*X-00002-of-00003.gguf: No space left"):
        write_small(tmp_path / "X.gguf")
    assert not list(tmp_path.iterdir())


def test_a_tensor_left_out_or_out_of_turn_leaves_nothing(tmp_path):
    with pytest.raises(BitladderError, match="internal: tensor b"), writing("X.gguf", {}, [SMALL[:2], SMALL[2:]]) as w:
        w.write("a", np.zeros(64, np.uint8))
    with pytest.raises(BitladderError, match="internal: .*00002"), writing("X.gguf", {}, [SMALL[:1], SMALL[1:]]) as w:
        w.write("a", np.zeros(64, np.uint8))
    with pytest.raises(ValueError, match="out of turn"), writing("X.gguf", {}, [SMALL[:1], SMALL[1:]]) as w:
        w.write("c", np.zeros(12, np.uint8))
    assert not list(tmp_path.iterdir())


def test_a_split_model_is_one_model_to_measure_and_to_run_with(shards, tiny_gguf, tmp_path):
    parts = parts_of(shards)
    digests = [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts]
    joined = hashlib.sha256("".join(digests).encode()).hexdigest()
    split, whole = identify(shards), identify(tiny_gguf)
    assert split.sha256 == joined and split.bytes == sum(part.stat().st_size for part in parts)
    assert (split.vocabulary, split.bpw, split.head.name) == (whole.vocabulary, whole.bpw, whole.head.name)
    facts, reference = describe(shards), describe(tiny_gguf)
    assert facts | {"file": "", "bytes": 0} == reference | {"file": "", "bytes": 0} and facts["bytes"] == split.bytes
    for part in parts:
        shutil.copy(part, tmp_path / part.name)
    first, *_, last = parts_of(tmp_path / shards.name)
    with open_store(tmp_path, keep=first) as store:
        assert store.sha256(first, "model") == joined
        last.write_bytes(last.read_bytes()[::-1])
        assert store.sha256(first, "model") != joined
    shutil.copy(first, tmp_path / "stranger.gguf")
    (tmp_path / "ladder.json").unlink()
    with pytest.raises(UsageError, match=r"already has stranger\.gguf"), open_store(tmp_path, keep=first):
        pass

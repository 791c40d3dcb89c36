"""Tensor names are parsed in one place."""

import pathlib
import re

import gguf
import pytest

import bitladder
from bitladder.gguf import (
    around_block,
    block_of,
    imatrix_place,
    in_main_block,
    in_previous_block,
    kind_of,
    name_in_block,
    one_line,
    ranges,
)


@pytest.mark.parametrize("block", [0, 7, 123])
def test_every_name_that_llama_cpp_knows_is_parsed(block):
    for known in gguf.TENSOR_NAMES.values():
        name = known.format(bid=block, xid=1) + ".weight"
        inside = "{bid}" in known and ".blk." in f".{known}"
        assert block_of(name) == (block if inside else None), name
        # The kind names the tensor again with its block, and nothing of the block is left in it.
        assert kind_of(name) == kind_of(known.format(bid=block + 1, xid=1) + ".weight") or not inside, name
        if inside:
            before, number, after = around_block(name)
            assert before + number + after == name and int(number) == block
            assert kind_of(name) + ".weight" == name_in_block(name)
            assert in_main_block(name) == known.startswith("blk.")


def test_names_by_the_rules_of_llama_imatrix():
    assert imatrix_place("blk.3.attn_q.weight") == (3, "attn_q")
    assert imatrix_place("enc.blk.12.ffn_up.weight") == (12, "ffn_up")
    assert imatrix_place("output.weight") == (None, "output")
    assert imatrix_place("v.patch_embd") == (None, "v.patch_embd")
    assert imatrix_place("blk.x.y.weight") == (None, "y")
    assert imatrix_place("weight") == (None, "weight") and imatrix_place("blk") == (None, "blk")
    assert in_previous_block("dec.blk.10.q.weight") == "dec.blk.9.q.weight"
    assert in_previous_block("blk.0.q.weight") is in_previous_block("output.weight") is None


def test_names_in_text():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7, 8" and ranges([]) == ""
    assert one_line("blk.0\n\x1b[31mx") == "blk.0  [31mx"


def test_no_other_file_has_a_pattern_for_blocks():
    folder = pathlib.Path(bitladder.__file__).parent
    pattern = re.compile(r"blk\\\.|startswith\(\"blk|split\(\"blk|\"blk\" in ")
    found = [path for path in folder.rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))]
    assert [path.relative_to(folder).as_posix() for path in found] == ["gguf/names.py"], found

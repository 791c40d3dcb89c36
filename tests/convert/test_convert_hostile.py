"""Files of a checkpoint that lie: one line, at once, and with little memory. None of them reaches llama.cpp."""

import json
import pathlib
import random
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import tiny_models
from heard import Heard
from reference_logits import native_logits

from bitladder.convert import convert
from bitladder.convert.checkpoint_files import read_header
from bitladder.convert.tokenizer import read_vocabulary
from bitladder.errors import BitladderError

DEEP = "[" * 100_000


def change(path: pathlib.Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(folder: pathlib.Path) -> str:
    """The message, which is one line and comes without much memory; no file is left."""
    tracemalloc.start()
    try:
        with pytest.raises(BitladderError) as caught:
            convert(folder, folder.parent / "out.gguf", outtype="f32")
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("num_hidden_layers", 10**8),
        ("num_hidden_layers", 10**400),
        ("num_hidden_layers", 2.0),
        ("num_hidden_layers", True),
        ("vocab_size", 10**9),
        ("hidden_size", 1 << 30),
        ("intermediate_size", 1 << 30),
        ("num_attention_heads", 1 << 30),
        ("num_key_value_heads", 1 << 30),
        ("head_dim", 1 << 30),
        ("num_attention_heads", None),
        ("num_attention_heads", 0),
        ("num_key_value_heads", -4),
    ],
)
def test_numbers_that_the_files_do_not_hold(key: str, number: Any, folder: pathlib.Path) -> None:
    change(folder / "config.json", **{key: number})
    message = refusal(folder)
    assert key in message or "by config.json it should be" in message


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", "added_tokens.json"],
)
@pytest.mark.parametrize(
    "content", ["", "{", "[1]", DEEP, "\xff", '{"a": ' + "9" * 5000 + "}", "version https://git-lfs.x"]
)
def test_json_that_cannot_be_read(name: str, content: str, folder: pathlib.Path) -> None:
    if "index" in name:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content.encode("latin-1"))
    assert name in refusal(folder)


SHAPE = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HEADERS: dict[str, Any] = {
    "no object": [1],
    "an entry that is none": {"a": 1},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
    "shape that is none": {"a": {**SHAPE, "shape": 4}},
    "negative": {"a": {**SHAPE, "shape": [-2, -2]}},
    "not whole": {"a": {**SHAPE, "shape": [2.0, 2]}},
    "huge": {"a": {**SHAPE, "shape": [1 << 62, 4, 4]}},
    "texts": {"a": {**SHAPE, "shape": "22"}},
    "place before the file": {"a": {**SHAPE, "data_offsets": [-16, 0]}},
    "place behind the file": {"a": {**SHAPE, "data_offsets": [1 << 50, (1 << 50) + 16]}},
    "end before the beginning": {"a": {**SHAPE, "data_offsets": [16, 0]}},
    "three places": {"a": {**SHAPE, "data_offsets": [0, 8, 16]}},
    "an end that is a text": {"a": {**SHAPE, "data_offsets": [0, "16"]}},
    "an end that is an object": {"a": {**SHAPE, "data_offsets": [0, {}]}},
    "an end that is huge": {"a": {**SHAPE, "data_offsets": [0, 10**300]}},
    "a type with a zero byte": {"a": {**SHAPE, "dtype": "F32\0"}},
    "a type that is none": {"a": {**SHAPE, "dtype": 7}},
    "another size": {"a": {**SHAPE, "shape": [2, 3]}},
    "a name with a line break": {"a\n\x1b[2J": {**SHAPE, "shape": [2, 3]}},
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers(case: str, tmp_path: pathlib.Path) -> None:
    data = json.dumps(HEADERS[case]).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(16))
    with pytest.raises(BitladderError) as caught:
        read_header(tmp_path / "model.safetensors")
    assert "model.safetensors" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("data", [b"version https://git-lfs.github.com/spec/v1\noid", b"", struct.pack("<Q", 1 << 62)])
def test_safetensors_that_are_none(data: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(BitladderError, match="git lfs pull" if b"lfs" in data else "truncated"):
        read_header(tmp_path / "model.safetensors")
    header = DEEP.encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(BitladderError, match="nested too deeply"):
        read_header(tmp_path / "model.safetensors")


VALUES = [
    None,
    True,
    -1,
    1 << 31,
    10**30,
    1.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    "a\0b",
    "\x1b[31m",
    [],
    [1],
    {},
    {"a": 1},
]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_random_values_of_other_types(name: str, folder: pathlib.Path) -> None:
    """Each is converted or refused in one line."""
    chance, path, out = random.Random(name), folder / name, folder.parent / "out.gguf"
    data = path.read_bytes()
    start = 8 if name == "model.safetensors" else 0
    end = 8 + int.from_bytes(data[:8], "little") if start else len(data)
    counts = {"converted": 0, "refused": 0}
    for _ in range(60):
        content = json.loads(data[start:end])
        inner, keys = content, list(content)
        while True:
            key = chance.choice(keys)
            if not isinstance(inner[key], dict | list) or not inner[key] or chance.random() < 0.2:
                break
            inner = inner[key]
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        inner[key] = chance.choice(VALUES)
        changed = json.dumps(content).encode()
        path.write_bytes((struct.pack("<Q", len(changed)) if start else b"") + changed + data[end:])
        heard = Heard()
        try:
            convert(folder, out, outtype="f32", progress=heard)
            counts["converted"] += 1
        except BitladderError as error:
            counts["refused"] += 1
            assert str(error).isprintable()
        assert all(warning.isprintable() for warning in heard.warnings)
    assert counts["converted"] > 2


def test_adapter_alone(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert "merge it into its base model" in refusal(folder)


def added(number: Any, text: Any) -> dict[str, Any]:
    return {"added_tokens": [{"id": number, "content": text}]}


TOKENIZERS: dict[str, dict[str, Any]] = {
    "an id that is negative": added(-1, "x"),
    "an id that is a text": added("x", "x"),
    "an id that is huge": added(10**30, "x"),
    "an id of yes": added(True, "x"),
    "a text that is none": added(390, 7),
    "half a surrogate pair": added(390, "a\ud800"),
    "added tokens that are no list": {"added_tokens": {"a": 1}},
    "an added token that is none": {"added_tokens": ["<s>"]},
    "no vocabulary": {"model": {"type": "BPE", "merges": [["a", "b"]]}},
    "a vocabulary that is a list": {"model": {"type": "BPE", "vocab": ["a"], "merges": [["a", "b"]]}},
    "ids that are texts": {"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": [["a", "b"]]}},
    "ids that are negative": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["a", "b"]]}},
    "the same id twice": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": [["a", "b"]]}},
    "a token without end": {"model": {"type": "BPE", "vocab": {"a" * 100_000: 0}, "merges": [["a", "b"]]}},
    "merges that are none": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [7]}},
    "merges that are a text": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": "a b"}},
    "no merges": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
    "a post-processor that is cut": {"post_processor": {"type": "BertProcessing"}},
    "a template without tokens": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x"}}],
            "special_tokens": {},
        }
    },
    "a normalizer that is a list": {"normalizer": ["NFC"]},
    "a pre-tokenizer that is a text": {"pre_tokenizer": "ByteLevel"},
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(case: str, folder: pathlib.Path) -> None:
    change(folder / "tokenizer.json", **TOKENIZERS[case])
    assert "tokenizer.json" in refusal(folder)


@pytest.mark.parametrize("place", ["added_tokens", "vocab"])
def test_token_far_beyond_the_embeddings(place: str, folder: pathlib.Path) -> None:
    """An id of 4·10⁸ costs nothing: the token is left out."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    if place == "vocab":
        tokenizer["model"]["vocab"]["far"] = 400_000_000
    else:
        tokenizer["added_tokens"].append({"id": 400_000_000, "content": "far"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    heard = Heard()
    tracemalloc.start()
    vocabulary = read_vocabulary(folder, 400, heard)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert len(vocabulary.tokens) == 400
    assert any("left out" in warning for warning in heard.warnings)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", ["a\0b", "\0", "[PAD395]", "[EMPTY_390]", ""])
def test_texts_that_llama_cpp_would_mix_up(text: str, special: bool, folder: pathlib.Path) -> None:
    """A text ends at a zero character there, and an empty token gets a name. The same text twice ends the process."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = [*tokenizer["added_tokens"], {"id": 390, "content": text, "special": special}]
    change(folder / "tokenizer.json", added_tokens=tokens)
    if text == "a\0b":
        assert "the tokens 66 and 390" in refusal(folder)
        return
    path = convert(folder, folder.parent / "out.gguf", outtype="f32").path
    assert np.isfinite(native_logits(path, [5, 6, 7])).all()


@pytest.mark.parametrize("data", [b"\xff" * 200_000, b"\n" + b"\xff" * 9, b"\x0a\x02\x0a\x05", b"", b"\0" * 1000])
def test_sentencepiece(data: bytes, folder: pathlib.Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(data)
    assert "is not a SentencePiece model" in refusal(folder)


def test_tokenizer_files_that_differ(tmp_path: pathlib.Path) -> None:
    """tokenizer.json beside the tokenizer.model of another model: it is taken, as in transformers."""
    model = tiny_models.train_sentencepiece(tmp_path)
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    first, second = model.id_to_piece(300), model.id_to_piece(301)
    vocab[first], vocab[second] = 301, 300
    content: dict[str, Any] = {
        "model": {"type": "BPE", "vocab": vocab, "merges": [[" ", " "]], "byte_fallback": True},
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "added_tokens": [],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    heard = Heard()
    assert read_vocabulary(tmp_path, 400, heard).tokens[300] == second
    assert any("tokenizer.json is taken" in warning for warning in heard.warnings)
    content["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BitladderError, match=r"tokenizer\.model and tokenizer\.json have different tokens"):
        read_vocabulary(tmp_path, 400)

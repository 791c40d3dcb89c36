"""Parity: llama.cpp cuts text into the same tokens as the checkpoint's own tokenizer."""

import ctypes
import json
import lzma
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import pytest
import tiny_models
from heard import Heard
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, Qwen2Tokenizer

from bitladder.convert import bpe, sentencepiece
from bitladder.convert.tokenizer import read_vocabulary, write_vocabulary
from bitladder.convert.vocabulary import Kind
from bitladder.errors import BitladderError
from bitladder.progress import SILENT

llama_cpp: Any = pytest.importorskip("llama_cpp")

REAL = pathlib.Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
SPECIAL = "<s>one</s> two <extra>three <extra> <s></s>\n<extra>"
Tokenize = Callable[..., list[int]]


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    pass


@pytest.fixture
def native(tmp_path: pathlib.Path) -> Iterator[Callable[..., Tokenize]]:
    """A function that loads a checkpoint's tokenizer into llama.cpp and returns its tokenizer."""
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    loaded = []

    def load(folder: pathlib.Path, size: int, heard: Heard | None = None) -> Tokenize:
        path = tmp_path / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        vocabulary = read_vocabulary(folder, size, heard or SILENT)
        write_vocabulary(vocabulary, folder, writer, SILENT)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert model, "llama.cpp does not load the vocabulary"
        loaded.append(model)
        vocab = llama_cpp.llama_model_get_vocab(model)

        def tokenize(text: str, *, special: bool = True) -> list[int]:
            data = text.encode()
            out = (llama_cpp.llama_token * (len(data) + 8))()
            count = llama_cpp.llama_tokenize(vocab, data, len(data), out, len(out), special, True)
            assert count >= 0
            return list(out[:count])

        return tokenize

    yield load
    for model in loaded:
        llama_cpp.llama_model_free(model)


def same(tokenize: Tokenize, reference: Any, texts: list[str]) -> None:
    for text in texts:
        assert tokenize(text, special=False) == reference.encode(text, add_special_tokens=False), text
        assert tokenize(text) == reference.encode(text), text


def pieces() -> list[str]:
    """The awkward page whole, by lines, and pieces with white space at their ends."""
    lines = tiny_models.AWKWARD.splitlines(keepends=True)
    ends = ["", " ", "\n", "  x", "x  "]
    return [*ends, tiny_models.AWKWARD, tiny_models.TEXT, *lines, *(line.strip() for line in lines)]


@pytest.mark.parametrize("style", ["gpt2", "smollm", "llama3", "qwen2"])
@pytest.mark.parametrize("bos", [True, False])
def test_byte_level(style: str, bos: bool, tmp_path: pathlib.Path, native: Any) -> None:
    reference = tiny_models.train_byte_level(tmp_path, style=style, bos=bos)
    heard = Heard()
    same(native(tmp_path, 400, heard), reference, [*pieces(), SPECIAL])
    assert heard.warnings == []


@pytest.mark.parametrize("style", ["gpt4o", "tekken"])
def test_approximate_pre_tokenizers_say_so(style: str, tmp_path: pathlib.Path, native: Any) -> None:
    reference = tiny_models.train_byte_level(tmp_path, style=style)
    heard = Heard()
    tokenize = native(tmp_path, 400, heard)
    assert any("pre-tokenizer" in warning for warning in heard.warnings)
    same(tokenize, reference, ["Hello, world! CamelCase It's 12345 x/y\n\n  z"])


def test_types_padding_and_both_merge_forms(tmp_path: pathlib.Path) -> None:
    tiny_models.train_byte_level(tmp_path)
    pairs = read_vocabulary(tmp_path, 400)
    assert pairs.types[:2] == [Kind.CONTROL, Kind.CONTROL]
    assert (pairs.tokens[384], pairs.types[384]) == ("<extra>", Kind.USER_DEFINED)
    assert (pairs.tokens[399], pairs.types[399]) == ("[PAD399]", Kind.UNUSED)
    assert pairs.types[2] == Kind.NORMAL
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert isinstance(content["model"]["merges"][0], list)
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert read_vocabulary(tmp_path, 400).merges == pairs.merges
    assert bpe.read_merges([["a b", "c"]], tmp_path) == [("aĠb", "c")]


def test_ignore_merges(tmp_path: pathlib.Path) -> None:
    """Llama 3 takes words whole; where merging gives the same it does not matter, elsewhere the names differ."""
    tiny_models.train_byte_level(tmp_path, style="llama3")
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    assert read_vocabulary(tmp_path, 400).pre == "dbrx"
    tokenizer["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert read_vocabulary(tmp_path, 400).pre == "llama-bpe"
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = bpe.QWEN2
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert read_vocabulary(tmp_path, 400).pre == "qwen2"
    tokenizer["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BitladderError, match="ignore_merges"):
        read_vocabulary(tmp_path, 400)


def test_sentencepiece(tmp_path: pathlib.Path, native: Any) -> None:
    reference = tiny_models.train_sentencepiece(tmp_path)
    tokenize = native(tmp_path, 420)
    for text in pieces():
        assert tokenize(text, special=False) == reference.encode(text), text
        assert tokenize(text) == [1, *reference.encode(text)]


def test_added_tokens_json_beside_tokenizer_model(tmp_path: pathlib.Path) -> None:
    """It often names the model's own control tokens again, or tokens that the embeddings have no rows for."""
    tiny_models.train_sentencepiece(tmp_path)
    alone = read_vocabulary(tmp_path, 400)
    again = {"</s>": 2, "<s>": 1, "<unk>": 0}
    (tmp_path / "added_tokens.json").write_text(json.dumps(again))
    assert read_vocabulary(tmp_path, 400) == alone
    (tmp_path / "added_tokens.json").write_text(json.dumps({**again, "<pad>": 400, "<more>": 401}))
    heard = Heard()
    assert read_vocabulary(tmp_path, 400, heard) == alone
    assert "2 tokens with ids beyond the model's 400 embeddings" in heard.warnings[0]
    padded = read_vocabulary(tmp_path, 410)
    assert padded.tokens[400:] == ["<pad>", "<more>", *(f"[PAD{i}]" for i in range(402, 410))]
    assert padded.types[400:402] == [Kind.USER_DEFINED] * 2


def as_tokenizer_json(folder: pathlib.Path, model: Any) -> tuple[Tokenizer, dict[str, int], list[tuple[str, str]]]:
    """transformers' form of a SentencePiece model, written to tokenizer.json; its vocabulary and merges."""
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    pairs = [
        (model.get_score(vocab[text]), (text[:cut], text[cut:]))
        for text in vocab
        if not model.is_byte(vocab[text])
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    merges = [pair for _, pair in sorted(pairs, key=lambda scored: -scored[0])]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer, vocab, merges


@pytest.mark.parametrize("files", ["both", "tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("flag", [None, False, True])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_space_before_a_text(files: str, flag: bool | None, kind: str, tmp_path: pathlib.Path, native: Any) -> None:
    if kind != "LlamaTokenizer" and files == "tokenizer.model":
        pytest.skip("transformers reads tokenizer.model alone with Llama's class")
    as_tokenizer_json(tmp_path, tiny_models.train_sentencepiece(tmp_path))
    if files != "both":
        (tmp_path / ("tokenizer.model" if files == "tokenizer.json" else "tokenizer.json")).unlink()
    config = {"tokenizer_class": kind, "add_prefix_space": flag, "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    expected = reference("fox a", add_special_tokens=False).input_ids
    assert native(tmp_path, 400)("fox a", special=False) == expected


def test_byte_fallback_tokenizer_json(tmp_path: pathlib.Path, native: Any) -> None:
    """transformers' form of the same vocabulary, without tokenizer.model: the same tokens again."""
    reference, vocab, merges = as_tokenizer_json(tmp_path, tiny_models.train_sentencepiece(tmp_path))
    (tmp_path / "tokenizer.model").unlink()
    heard = Heard()
    tokenize = native(tmp_path, 420, heard)
    assert heard.warnings == []
    for text in [*pieces()[1:], "<s>one</s> two"]:
        assert tokenize(text, special=False) == reference.encode(text, add_special_tokens=False).ids, text
    # transformers 5 writes the same as a Metaspace pre-tokenizer, which looks at the beginning of the text only.
    reference.normalizer = None
    reference.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenize = native(tmp_path, 420, heard)
    assert "before every text" in heard.warnings[0]
    for text in (tiny_models.AWKWARD, tiny_models.TEXT):
        assert tokenize(text, special=False) == reference.encode(text, add_special_tokens=False).ids, text
    assert sentencepiece.merges_are_all_splits(vocab, merges)
    assert not sentencepiece.merges_are_all_splits(vocab, merges[:-1])


def test_unigram_is_refused(tmp_path: pathlib.Path) -> None:
    model = bytearray()
    for text, kind in (("<unk>", 2), ("a", 1), ("<0x00>", 6)):
        piece = b"\x0a" + bytes([len(text)]) + text.encode() + b"\x18" + bytes([kind])
        model += b"\x0a" + bytes([len(piece)]) + piece
    (tmp_path / "tokenizer.model").write_bytes(bytes(model))
    with pytest.raises(BitladderError, match="not of SentencePiece's BPE kind"):
        read_vocabulary(tmp_path, 3)
    (tmp_path / "tokenizer.model").write_bytes(b"bG9s 0\n")
    with pytest.raises(BitladderError, match="not a SentencePiece model"):
        read_vocabulary(tmp_path, 3)


def test_unknown_pre_tokenizer_shows_the_regex(tmp_path: pathlib.Path) -> None:
    tiny_models.train_byte_level(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BitladderError) as caught:
        read_vocabulary(tmp_path, 400)
    assert r"\w+|\W" in str(caught.value)
    assert "--converter" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_normalizers(tmp_path: pathlib.Path) -> None:
    tiny_models.train_byte_level(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    heard = Heard()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "NFC"}}))
    read_vocabulary(tmp_path, 400, heard)
    assert "NFC" in heard.warnings[0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(BitladderError, match="Lowercase"):
        read_vocabulary(tmp_path, 400)


def test_wordpiece_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))
    with pytest.raises(BitladderError, match=r"WordPiece.*--converter"):
        read_vocabulary(tmp_path, 3)


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data/tokenizers is not there")
@pytest.mark.parametrize(
    ("file", "size", "pre"),
    [
        ("olmo2/allenai_dolma2.json", 100352, "dbrx"),
        ("gpt-neox/allenai_gpt-neox-olmo-dolma-v1_5.json", 50304, "gpt-2"),
        ("llama3/tokenizer.json.xz", 128256, "llama-bpe"),
    ],
)
def test_real_tokenizers(file: str, size: int, pre: str, tmp_path: pathlib.Path, native: Any) -> None:
    data = (REAL / file).read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(lzma.decompress(data) if file.endswith(".xz") else data)
    config = REAL / file.partition("/")[0] / "tokenizer_config.json"
    if config.is_file():
        (tmp_path / "tokenizer_config.json").write_bytes(config.read_bytes())
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert read_vocabulary(tmp_path, size).pre == pre
    tokenize = native(tmp_path, size)
    # OLMo 1's normalizer is NFC, which llama.cpp leaves out (there is a warning).
    nfc = reference.normalizer is not None
    for text in [*pieces(), "a<|endoftext|>b <|im_start|>user", "|||PHONE_NUMBER||| <|eot_id|>\n\n<|begin_of_text|>"]:
        given = reference.normalizer.normalize_str(text) if nfc else text
        assert tokenize(given, special=False) == reference.encode(text, add_special_tokens=False).ids, text
        assert tokenize(given) == reference.encode(text).ids, text


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data/tokenizers is not there")
def test_real_qwen2(tmp_path: pathlib.Path, native: Any) -> None:
    reference = Qwen2Tokenizer.from_pretrained(REAL / "qwen2.5")
    reference.save_pretrained(tmp_path)
    heard = Heard()
    tokenize = native(tmp_path, 151936, heard)
    assert "NFC" in heard.warnings[0]
    assert read_vocabulary(tmp_path, 151936).pre == "qwen2"
    texts = [tiny_models.AWKWARD, tiny_models.TEXT, "<|im_start|>user\nHi<|im_end|>"]
    same(tokenize, reference, [reference.backend_tokenizer.normalizer.normalize_str(text) for text in texts])

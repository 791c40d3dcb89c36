"""End tokens against llama_vocab_is_eog; begin tokens and chat templates against transformers' tokenizer."""

import ctypes
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import gguf
import pytest
import tiny_models
from heard import Heard

from bitladder.convert.special_tokens import KNOWN_ENDS
from bitladder.convert.tokenizer import read_chat_templates, read_vocabulary, write_vocabulary
from bitladder.convert.vocabulary import Kind
from bitladder.errors import BitladderError

llama_cpp: Any = pytest.importorskip("llama_cpp")
transformers: Any = pytest.importorskip("transformers")

# <s> is 0, </s> is 1, <extra> is 384. These letters are made end tokens.
A, B, C, D, E, F, G = range(34, 41)


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    pass


class Native:
    """llama.cpp's view of a vocabulary."""

    def __init__(self, path: pathlib.Path) -> None:
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model, "llama.cpp does not load the vocabulary"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def ends(self) -> set[int]:
        """The tokens at which an answer ends."""
        count = llama_cpp.llama_vocab_n_tokens(self.vocab)
        return {i for i in range(count) if llama_cpp.llama_vocab_is_eog(self.vocab, i)}

    def tokenize(self, text: str) -> list[int]:
        """Tokens with those that are added."""
        out = (llama_cpp.llama_token * 100)()
        count = llama_cpp.llama_tokenize(self.vocab, text.encode(), len(text.encode()), out, len(out), True, True)
        return list(out[:count])


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "tokenizer"
    tiny_models.train_byte_level(folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def native(folder: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Any]:
    """A function that writes the vocabulary of `folder` and loads it into llama.cpp."""
    loaded = []

    def load(heard: Heard | None = None) -> Native:
        heard = heard or Heard()
        path = tmp_path / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        write_vocabulary(read_vocabulary(folder, 400, heard), folder, writer, heard)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        loaded.append(Native(path))
        return loaded[-1]

    yield load
    for vocabulary in loaded:
        llama_cpp.llama_model_free(vocabulary.model)


def write(folder: pathlib.Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def add(folder: pathlib.Path, name: str, **values: Any) -> None:
    """Changes some values of a file."""
    old = json.loads((folder / name).read_text())
    write(folder, name, old | values)


# tokenizer_config's eos, config.json's, generation_config.json's; the end tokens; a word of the warning.
# "</s>", which is token 1, ends an answer in llama.cpp by its name.
ENDS: dict[str, tuple[Any, Any, Any, set[int], str]] = {
    "tokenizer alone": ("A", None, None, {A}, ""),
    "config alone": (None, A, None, {A}, ""),
    "list in config": (None, [A, B, C], None, {A, B, C}, ""),
    "generation alone": (None, None, [B, A], {A, B}, ""),
    "generation, one": (None, None, A, {A}, ""),
    "all the same": ("A", A, [A, B], {A, B}, ""),
    "they differ": ("A", B, [C], {A, B, C}, "names the end token"),
    "six of them": (None, None, [A, B, C, D, E, F], {A, B, C, D, E, F}, ""),
    "known by name too": (None, [A, 1, B], None, {A, B}, ""),
    "seven are too many": (None, None, [A, B, C, D, E, F, G], {A, B, C, D, E, F}, "cannot hold another end token"),
    "none": (None, None, None, {11}, "no end token is named"),
    "strings and floats": (None, str(A), [float(B), f"{A}"], {A, B}, ""),
    "some are no tokens": (None, None, [A, -1, 400, 1 << 40, True, None, "x", [B], {}, 1.5], {A}, "left out"),
    "a list of texts": (["A", "B"], None, None, {A, B}, ""),
    "not in the vocabulary": ("<nowhere>", A, None, {A}, "'<nowhere>' is not in the vocabulary"),
    "no text": (7, A, None, {A}, "is no text of a token"),
}


@pytest.mark.parametrize("case", ENDS)
def test_end_tokens(case: str, folder: pathlib.Path, native: Any) -> None:
    named, config, generation, expected, word = ENDS[case]
    add(folder, "tokenizer_config.json", eos_token=named, bos_token=None)
    write(folder, "config.json", {"eos_token_id": config})
    write(folder, "generation_config.json", {"eos_token_id": generation})
    heard = Heard()
    assert native(heard).ends() == expected | {1}
    by_name = 1 not in (config if isinstance(config, list) else [])
    assert any("also ends answers at 1 '</s>'" in line for line in heard.lines) == by_name
    warnings = [warning for warning in heard.warnings if "end token" in warning or "eos" in warning]
    assert bool(warnings) == bool(word), warnings
    assert all(warning.isprintable() for warning in warnings)
    assert not word or any(word in warning for warning in warnings)


@pytest.mark.parametrize("text", sorted(KNOWN_ENDS))
def test_texts_that_llama_cpp_knows(text: str, folder: pathlib.Path, native: Any) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 385, "content": text, "special": True})
    write(folder, "tokenizer.json", tokenizer)
    add(folder, "tokenizer_config.json", eos_token="<s>", bos_token=None)
    token = 1 if text == "</s>" else 385
    assert token in native().ends()


def test_every_end_token_beside_those_with_known_texts(folder: pathlib.Path, native: Any) -> None:
    """Llama 3 has three of them; here are two more."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    texts = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<stop>"]
    tokenizer["added_tokens"] += [{"id": 385 + i, "content": text, "special": True} for i, text in enumerate(texts)]
    write(folder, "tokenizer.json", tokenizer)
    add(folder, "tokenizer_config.json", eos_token="<|eot_id|>")
    write(folder, "generation_config.json", {"eos_token_id": [385, 386, 387, 388, A]})
    vocabulary = native()
    assert vocabulary.ends() == {1, 385, 386, 387, 388, A}
    assert llama_cpp.llama_vocab_eos(vocabulary.vocab) == 387
    assert llama_cpp.llama_vocab_eot(vocabulary.vocab) == 385


@pytest.mark.parametrize("decoder", [False, True])
def test_special_tokens_map(decoder: bool, folder: pathlib.Path, native: Any) -> None:
    """transformers reads special_tokens_map.json unless tokenizer_config.json has `added_tokens_decoder`."""
    write(folder, "special_tokens_map.json", {"eos_token": {"content": "<extra>"}})
    if decoder:
        add(folder, "tokenizer_config.json", added_tokens_decoder={"0": {"content": "<s>", "special": True}})
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert llama_cpp.llama_vocab_eos(native().vocab) == reference.eos_token_id == (1 if decoder else 384)


def template(*tokens: tuple[str, int], after: tuple[tuple[str, int], ...] = ()) -> dict[str, Any]:
    def piece(token: tuple[str, int]) -> dict[str, Any]:
        return {"SpecialToken": {"id": token[0], "type_id": 0}}

    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*map(piece, tokens), sequence, *map(piece, after)],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in (*tokens, *after)},
    }


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
BOS, EOS, EXTRA = ("<s>", 0), ("</s>", 1), ("<extra>", 384)
ADDED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "none": (None, {}, ""),
    "bos": (template(BOS), {}, ""),
    "bos and eos": (template(BOS, after=(EOS,)), {}, ""),
    "another bos": (template(EXTRA), {}, "bos token is 384 '<extra>'"),
    "another eos": (template(BOS, after=(EXTRA,)), {}, ""),
    "in a sequence": ({"type": "Sequence", "processors": [BYTES, template(BOS)]}, {}, ""),
    "as BERT": ({"type": "BertProcessing", "cls": ["<s>", 0], "sep": ["</s>", 1]}, {}, ""),
    "flag without": (None, {"add_bos_token": True}, "add_bos_token = true"),
    "flag against": (template(BOS), {"add_bos_token": False}, "add_bos_token = false"),
    "flag that is a text": (template(BOS), {"add_bos_token": "no"}, "should be true or false"),
}


@pytest.mark.parametrize("case", ADDED)
def test_what_is_added_to_a_text(case: str, folder: pathlib.Path, native: Any) -> None:
    processor, values, word = ADDED[case]
    add(folder, "tokenizer.json", post_processor=processor)
    add(folder, "tokenizer_config.json", **values)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    heard = Heard()
    vocabulary = native(heard)
    for text in ("", "Hello <extra> world"):
        assert vocabulary.tokenize(text) == reference(text).input_ids
    assert bool(heard.warnings) == bool(word)
    assert not word or word in heard.warnings[0]


def test_several_tokens_are_added(folder: pathlib.Path, native: Any) -> None:
    add(folder, "tokenizer.json", post_processor=template(BOS, EXTRA))
    heard = Heard()
    assert native(heard).tokenize("a")[0] == 0
    assert "adds only the first" in heard.warnings[0]


@pytest.mark.parametrize("processor", [template(("<x>", 400)), template(("<x>", -1)), template(("<x>", True))])
def test_added_token_that_is_none(processor: Any, folder: pathlib.Path) -> None:
    add(folder, "tokenizer.json", post_processor=processor)
    with pytest.raises(BitladderError, match="not in the vocabulary"):
        read_vocabulary(folder, 400)


def test_bos_in_two_places(folder: pathlib.Path, native: Any) -> None:
    write(folder, "config.json", {"bos_token_id": A})
    heard = Heard()
    assert llama_cpp.llama_vocab_bos(native(heard).vocab) == 0
    assert "bos token is 0 '<s>'" in heard.warnings[0]
    assert "config.json" in heard.warnings[0]


def test_named_tokens_are_control_tokens(folder: pathlib.Path, native: Any) -> None:
    """So transformers leaves them out of a text that it decodes."""
    add(folder, "tokenizer_config.json", pad_token="<extra>")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert reference.decode([384], skip_special_tokens=True) == ""
    vocabulary = native()
    assert llama_cpp.llama_vocab_pad(vocabulary.vocab) == 384
    assert llama_cpp.llama_vocab_is_control(vocabulary.vocab, 384)


def test_added_tokens_in_two_places(folder: pathlib.Path) -> None:
    decoder = {"0": {"content": "<s>", "special": True}, "384": {"content": "<extra>", "special": True}}
    decoder["385"] = {"content": "<new>", "special": False}
    add(folder, "tokenizer_config.json", added_tokens_decoder=decoder)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    vocabulary = read_vocabulary(folder, 400)
    for token in (384, 385):
        special = reference.added_tokens_decoder[token].special
        assert vocabulary.tokens[token] == str(reference.added_tokens_decoder[token])
        assert vocabulary.types[token] == (Kind.CONTROL if special else Kind.USER_DEFINED)


def test_added_token_that_is_in_the_vocabulary_already(folder: pathlib.Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 385, "content": "A", "special": False})
    for key in ("lstrip", "rstrip", "single_word", "normalized"):
        tokenizer["added_tokens"][-1][key] = False
    write(folder, "tokenizer.json", tokenizer)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    heard = Heard()
    vocabulary = read_vocabulary(folder, 400, heard)
    assert reference("A", add_special_tokens=False).input_ids == [vocabulary.tokens.index("A")]
    assert (vocabulary.tokens[385], vocabulary.types[385]) == ("[PAD385]", Kind.UNUSED)
    assert "has the ids" in heard.warnings[0]


NAMED = [{"name": "default", "template": "d"}, {"name": "tool use", "template": "t"}]
# Files, and a word of the warning. "config" is `chat_template` of tokenizer_config.json.
TEMPLATES: dict[str, tuple[dict[str, Any], str]] = {
    "config": ({"config": "OLD"}, ""),
    "file": ({"chat_template.jinja": "NEW"}, ""),
    "both": ({"config": "OLD", "chat_template.jinja": "NEW"}, "differs"),
    "both the same": ({"config": "NEW", "chat_template.jinja": "NEW"}, ""),
    "more files": ({"chat_template.jinja": "NEW", "additional_chat_templates/tool.jinja": "TOOL"}, ""),
    "list": ({"config": NAMED}, ""),
    "object": ({"config": {"default": "x", "rag": "y"}}, ""),
    "nothing": ({}, ""),
}


def put_templates(folder: pathlib.Path, files: dict[str, Any]) -> None:
    for name, value in files.items():
        if name == "config":
            add(folder, "tokenizer_config.json", chat_template=value)
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(value)


@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_templates(case: str, folder: pathlib.Path) -> None:
    files, word = TEMPLATES[case]
    put_templates(folder, files)
    reference = transformers.AutoTokenizer.from_pretrained(folder).chat_template
    heard = Heard()
    templates = read_chat_templates(folder, heard)
    assert templates == (reference if isinstance(reference, dict) else {"default": reference} if reference else {})
    assert bool(heard.warnings) == bool(word)
    assert not word or word in heard.warnings[0]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": ""}, {}),
        ({"config": 5}, {}),
        ({"config": "half \ud800"}, {}),
        ({"config": [{"name": "default"}, {"template": "x"}, 7, {"name": "rag", "template": "r"}]}, {"rag": "r"}),
        ({"chat_template.json": "[1]"}, {}),
        ({"config": "OLD", "additional_chat_templates/tool.jinja": "T"}, {"default": "OLD", "tool": "T"}),
    ],
)
def test_chat_templates_that_cannot_be_used(files: dict[str, Any], expected: Any, folder: pathlib.Path) -> None:
    put_templates(folder, files)
    heard = Heard()
    assert read_chat_templates(folder, heard) == expected
    assert heard.warnings


def test_chat_template_of_a_processor(folder: pathlib.Path) -> None:
    write(folder, "chat_template.json", {"chat_template": "P"})
    assert read_chat_templates(folder, Heard()) == {"default": "P"}
    (folder / "chat_template.jinja").write_bytes(b"caf\xe9")
    heard = Heard()
    assert read_chat_templates(folder, heard) == {"default": "P"}
    assert "not text in UTF-8" in heard.warnings[0]


def test_names_of_chat_templates_do_not_clash(folder: pathlib.Path, native: Any, tmp_path: pathlib.Path) -> None:
    add(folder, "tokenizer_config.json", chat_template={"default": "d", "a b": "1", "a_b": "2", "ü": "3"})
    native()
    reader = gguf.GGUFReader(tmp_path / "vocabulary.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if "chat_template" in key}
    assert fields == {
        "tokenizer.chat_template": "d",
        "tokenizer.chat_templates": ["_", "a_b", "a_b_"],
        "tokenizer.chat_template.a_b": "1",
        "tokenizer.chat_template.a_b_": "2",
        "tokenizer.chat_template._": "3",
    }

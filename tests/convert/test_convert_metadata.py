"""What strangers wrote never stops a conversion, and never names a file outside the working directory."""

import json
import pathlib
from typing import Any

import gguf
import pytest
from click.testing import CliRunner
from heard import Heard

from bitladder.cli.inputs import convert_command
from bitladder.convert import convert, default_name
from bitladder.files import LONGEST_NAME, file_name


def metadata(folder: pathlib.Path, heard: Heard | None = None) -> dict[str, Any]:
    """Converts, and returns the general.* values by their last names."""
    path = convert(folder, folder.parent / "out.gguf", progress=heard or Heard()).path
    fields = gguf.GGUFReader(path).fields
    return {
        key.removeprefix("general."): field.contents() for key, field in fields.items() if key.startswith("general.")
    }


# Thirty lists or objects, each twice in the next one.
LAUGHS = "- &a0 [x]\n" + "".join(f"- &a{i + 1} [*a{i}, *a{i}]\n" for i in range(30))
MERGES = "- &a0 {x: y}\n" + "".join(f"- &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(30))

# Front matters as people write them: what must be in the GGUF (None: nothing), and whether there is a warning.
CARDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "Norwegian in a list": ("language: [en, no, da]", {"languages": ["en", "no", "da"]}, False),
    "Norwegian alone": ("language: no", {"languages": ["no"]}, False),
    "Norwegian with a comment": ("language:\n- en\n- no  # bokmål", {"languages": ["en", "no"]}, False),
    "other booleans": ("tags: [yes, on, off, true, y]", {"tags": ["yes", "on", "off", "true", "y"]}, False),
    "numbers and dates": (
        "tags: [7, 1.50, 2024-01-01, 0x1F, 1e3]",
        {"tags": ["7", "1.50", "2024-01-01", "0x1F", "1e3"]},
        False,
    ),
    "nothing": ("tags:\nlicense: mit", {"tags": None, "license": "mit"}, False),
    "empty items": ("language:\n- \ntags: [~, null, a]", {"languages": None, "tags": ["a"]}, False),
    "nested": ("tags:\n- moe\n- [a, b]\n- {c: d}", {"tags": ["moe"]}, True),
    "version": ("version: 1.0", {"version": "1.0"}, False),
    "a number as name": ("model_name: 42", {"name": "42"}, False),
    "a list as name": ("model_name: [a]", {"name": "Tiny"}, True),
    "an object as licence": ("license: {a: b}", {"license": None}, True),
    "licences": ("license:\n- mit\n- apache-2.0", {"license": "mit,apache-2.0"}, False),
    "several lines": ("license_name: |\n  two\n  lines", {"license.name": "two lines"}, False),
    "control characters": ('author: "x\\e[2J\\ty\\0z"', {"author": "x [2J y z"}, False),
    "surrogates": ('author: "a\\ud800b"', {"author": "a b"}, False),
    "base model": (
        "base_model: some-org/Base-7B",
        {"base_model.count": 1, "base_model.0.organization": "Some Org"},
        False,
    ),
    "base model as object": ("base_model:\n- name: B\n  version: 2\n  rank: 7", {"base_model.0.version": "2"}, False),
    "base model of another kind": ("base_model:\n- model: some-org/B", {"base_model.count": None}, True),
    "base model that is a folder": ("base_model: outputs/checkpoint-1000", {"base_model.count": None}, True),
    "base model that is a path": ("base_model: [/home/me/secret]", {"base_model.count": None}, True),
    "no base model": ("base_model: [null]", {"base_model.count": None}, False),
    "data sets": ("datasets:\n- name: x\n- 12\n- {}", {"dataset.count": 2}, True),
    "a list, no object": ("- a\n- b", {"name": "Tiny"}, True),
    "a text": ("hello", {"name": "Tiny"}, True),
    "not YAML": ("tags: [", {"name": "Tiny"}, True),
    "a bad date": ("tags: !!timestamp 2024-99-99", {"name": "Tiny"}, True),
    "an object of Python": ("tags: !!python/object/apply:os.getcwd []", {"name": "Tiny"}, True),
    "a bad number": ("tags: !!int x", {"name": "Tiny"}, True),
    "a list as key": ("? [a]\n: b", {"name": "Tiny"}, True),
    "itself": ("tags: &a [*a, b]", {"tags": ["b"]}, True),
    "deep": ("tags: " + "[" * 3000, {"name": "Tiny"}, True),
    "deep and closed": ("tags: " + "[" * 3000 + "]" * 3000, {"name": "Tiny"}, True),
    "laughs": ("license: mit\ntags:\n" + LAUGHS, {"license": "mit", "tags": None}, True),
    "merges": ("license: mit\ntags:\n" + MERGES, {"license": "mit", "tags": None}, True),
    "results of benchmarks": (
        "model-index:\n" + "- name: x\n  results: [{a: 1}]\n" * 20000 + "license: mit",
        {"license": "mit"},
        False,
    ),
    "too long": ("tags: [" + "a," * 20000 + "]", {"tags": None}, True),
    "tabs": ("license:\tmit", {"license": "mit"}, False),
}


@pytest.mark.parametrize("case", CARDS)
def test_cards(case: str, folder: pathlib.Path) -> None:
    text, expected, warned = CARDS[case]
    (folder / "README.md").write_text(f"---\n{text}\n---\n# Card\n", encoding="utf-8")
    heard = Heard()
    values = metadata(folder, heard)
    assert {key: values.get(key) for key in expected} == expected
    assert bool(heard.warnings) == warned
    assert all("README.md" in warning and warning.isprintable() and len(warning) < 500 for warning in heard.warnings)


@pytest.mark.parametrize(
    ("data", "licence"),
    [
        (b"---\nlicense: mit\nauthor: M\xfcller\n---\n# M\xfcller\n", "mit"),
        (b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n", "mit"),
        (b"---\nlicense: mit\n# no end", "mit"),
        (b"---\nlicense: mit\n...\n- not: this\n", "mit"),
        (b"", None),
        (b"---", None),
        (b"\xff\xfe-\x00-\x00-\x00", None),
        (b"---\nlicense: mit\na: " + b"x" * (1 << 20) + b"\n---\n", "mit"),
    ],
)
def test_cards_as_files(data: bytes, licence: str | None, folder: pathlib.Path) -> None:
    (folder / "README.md").write_bytes(data)
    assert metadata(folder).get("license") == licence


SAMPLING: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "usual": ({"temperature": 0.5, "top_k": 40, "top_p": 0.75}, {"temp": 0.5, "top_k": 40, "top_p": 0.75}, False),
    "texts": ({"temperature": "0.5", "top_k": "40"}, {"temp": 0.5, "top_k": 40}, False),
    "nothing": ({"temperature": None, "top_k": None}, {"temp": None, "top_k": None}, False),
    "other numbers": ({"top_k": 40.0, "top_p": 1, "temperature": 1}, {"top_k": 40, "top_p": 1.0, "temp": 1.0}, False),
    "negative": ({"top_k": -1}, {"top_k": -1}, False),
    "not whole": ({"top_k": 1.5}, {"top_k": None}, True),
    "booleans": ({"top_k": True, "temperature": False}, {"top_k": None, "temp": None}, True),
    "huge": ({"top_k": 1 << 31, "temperature": 10**400}, {"top_k": None, "temp": None}, True),
    "no number": ({"top_p": float("nan"), "min_p": float("inf"), "top_k": "x"}, {"top_p": None}, True),
    "objects": ({"temperature": [1], "top_k": {"a": 1}, "mirostat": []}, {"temp": None, "mirostat": None}, True),
    "a list": ([1, 2], {"temp": None}, True),
    "a number": (7, {"temp": None}, True),
}


@pytest.mark.parametrize("case", SAMPLING)
def test_sampling(case: str, folder: pathlib.Path) -> None:
    content, expected, warned = SAMPLING[case]
    (folder / "generation_config.json").write_text(json.dumps(content))
    heard = Heard()
    values = metadata(folder, heard)
    assert {key: values.get(f"sampling.{key}") for key in expected} == expected
    assert bool(heard.warnings) == warned
    assert all("generation_config.json" in warning for warning in heard.warnings)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 5000, b'{"top_k": ' + b"9" * 5000 + b"}", b"[1]"])
def test_sampling_that_cannot_be_read(data: bytes, folder: pathlib.Path) -> None:
    (folder / "generation_config.json").write_bytes(data)
    heard = Heard()
    assert "sampling.temp" not in metadata(folder, heard)
    assert len(heard.warnings) == 1
    assert len(heard.warnings[0]) < 400


@pytest.mark.parametrize(
    "value", [7, "/home/me/secret", "..", "a/b/c", "\x1b[31m", "", None, [], "x" * 5000, "a\ud800"]
)
def test_name_or_path(value: Any, folder: pathlib.Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": value}))
    values = metadata(folder)
    assert isinstance(values["name"], str)
    assert values["name"].isprintable()
    assert "secret" not in values["name"]


NAMES = [
    "finetune: x/../../../NAME",
    "basename: ../../NAME\nsize_label: ../1B\nversion: ../2",
    'model_name: "../../NAME"',
    'model_name: "a\\e[31mb\\nc\\0d"',
    "model_name: " + "x" * 4000,
    "model_name: " + "ü" * 4000,
    "model_name: '...'",
    'model_name: "C:\\\\NAME"',
    'model_name: "|;&$(x)`*?<>"',
    "model_name: -rf",
    "model_name: 🙂",
]


@pytest.mark.parametrize("card", NAMES)
def test_default_name_is_a_file_here(card: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "README.md").write_text(f"---\n{card}\n---\n", encoding="utf-8")
    work = folder.parent / "a" / "b" / "c"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    done = CliRunner().invoke(convert_command, [str(folder), "--outtype", "f32"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    name = default_name(folder, "f32")
    assert [path.name for path in work.iterdir()] == [name]
    assert len(name.encode()) <= LONGEST_NAME
    assert name.endswith("-F32.gguf")
    assert name[0] not in "-."
    assert name.isprintable()
    assert list(folder.parent.rglob("*.gguf")) == [work / name]


def test_file_names() -> None:
    assert file_name("Tiny-15M", ".gguf") == "Tiny-15M.gguf"
    assert file_name("../../etc/passwd") == "etc-passwd"
    assert file_name("a b\x1b\n\\c") == "a-b-c"
    assert file_name("Base-x/../../NAME-v1.5") == "Base-x-NAME-v1.5"
    assert file_name("..", ".gguf") == "model.gguf"
    assert file_name("ü" * 200, ".gguf") == "ü" * ((LONGEST_NAME - 5) // 2) + ".gguf"

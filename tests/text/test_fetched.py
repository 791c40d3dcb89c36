"""`bitladder texts fetch` against a hub of our own on loopback."""

import hashlib
import io
import os
import subprocess
import sys
import zipfile

import fake_hub
import pytest

from bitladder.cli import invoke
from bitladder.errors import BitladderError, UsageError
from bitladder.hub import TEXTS, texts
from bitladder.hub.texts import TextArchive
from bitladder.ladder.options import RunOptions, command_line
from bitladder.text import load_text
from bitladder.text import texts as loading

PARTS = {"a-raw/a.test.raw": b" = Title = \n", "a-raw/a.train.raw": b"words " * 100}


def archive(parts):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data)
    return stream.getvalue()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in PARTS.items()}
    monkeypatch.setitem(TEXTS, "a-2", TextArchive("org/texts", "a-2.zip", "texts", hashes))
    with fake_hub.instead_of_the_hub(monkeypatch, tmp_path / "cache") as server:
        yield server


def test_texts_are_those_that_were_published(hub, tmp_path, capsys):
    hub.add("org/texts", {"a-2.zip": archive(PARTS)})
    folder = tmp_path / "new" / "texts"
    assert invoke(["texts", "fetch", "a-2", "-o", str(folder), "-q"]) == 0
    paths = [folder / "a.test.raw", folder / "a.train.raw"]
    assert capsys.readouterr().out.split() == list(map(str, paths))
    assert [path.read_bytes() for path in paths] == list(PARTS.values())
    before, sent = [path.stat().st_mtime_ns for path in paths], len(hub.downloads)
    paths[1].unlink()
    assert invoke(["texts", "fetch", "a-2", "-o", str(folder), "-q"]) == 0
    assert paths[0].stat().st_mtime_ns == before[0] and paths[1].read_bytes() == PARTS["a-raw/a.train.raw"]
    assert len(hub.downloads) == sent  # from the cache


def test_another_text_is_neither_taken_nor_overwritten(hub, tmp_path, capsys):
    hub.add("org/texts", {"a-2.zip": archive(PARTS | {"a-raw/a.test.raw": b"other"})})
    assert invoke(["texts", "fetch", "a-2", "-o", str(tmp_path / "x"), "-q"]) == 1
    assert "a.test.raw of org/texts is not the published text" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    (tmp_path / "a.test.raw").write_text("mine")
    assert invoke(["texts", "fetch", "a-2", "-o", str(tmp_path), "-q"]) == 1
    assert "is another text" in capsys.readouterr().err and (tmp_path / "a.test.raw").read_text() == "mine"
    assert invoke(["texts", "fetch", "a2"]) == 2
    assert capsys.readouterr().err == "bitladder: no texts are called a2; did you mean a-2?\n"


def test_without_a_network_there_is_one_line(tmp_path):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "bitladder", "texts", "fetch", "wikitext-2", "-q", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | nowhere, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("bitladder: wikitext-2-raw-v1.zip: the hub ")
    assert "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip" in done.stderr
    assert not (tmp_path / "out").exists()


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def table(rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


@pytest.fixture
def data(hub):
    prose = [{"text": "One.", "id": 1}, {"text": "", "id": 2}, {"text": " = Two = \n", "id": 3}]
    shards = {f"data/train-0000{n}-of-00002.parquet": table([{"text": f"Shard {n}.", "id": n}]) for n in (0, 1)}
    hub.add("org/prose", {**shards, "data/test-00000-of-00001.parquet": table(prose), "README.md": b"# Prose"})
    hub.add("org/chat", {"train.parquet": table([{"messages": CHAT, "prompt_id": "x"}]), "plain.txt": b"Plain text.\n"})
    return hub


def test_rows_of_a_data_set(data):
    train = load_text("hf://datasets/org/prose/data/train-*")
    assert train.text == "Shard 0.\n\nShard 1." and train.name == f"org/prose@{data.repositories['org/prose'].sha[:8]}"
    assert load_text("hf://datasets/org/prose/data/test-00000-of-00001.parquet").text == "One.\n\n = Two = "
    assert sorted(set(data.downloads)) == [
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]
    chat = load_text("hf://datasets/org/chat")
    assert [message["content"] for message in chat.conversations[0].messages] == ["Hi", "Hello."]
    assert load_text("hf://datasets/org/chat/train.parquet#messages").sha256 == chat.sha256
    sha = data.repositories["org/chat"].sha
    assert load_text(f"hf://datasets/org/chat@{sha}/plain.txt").text == "Plain text."


def test_only_as_much_as_a_text_may_hold_is_fetched(data, monkeypatch):
    monkeypatch.setattr(loading, "MOST", 8)
    assert load_text("hf://datasets/org/prose/data/train-*").text == "Shard 0."
    assert data.downloads == ["data/train-00000-of-00002.parquet"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/prose", ["several splits: data/test, data/train", "such as hf://datasets/org/prose/data/test*"]),
        ("org/prose/data/valid*", ["has no data/valid*", "data/test-00000-of-00001.parquet", "OWNER/NAME[@REVISION]"]),
        ("org/prose/data/test*#body", ["has no column body; it has text, id"]),
        ("org/prose/data/test*#id", ["row 1: no conversation"]),
        ("org/absent", ["the data set org/absent", "there is no such repository"]),
        ("org/chat/plain.txt#text", ["plain.txt of org/chat is not parquet"]),
        ("nobody", ["name it as hf://datasets/OWNER/NAME"]),
    ],
)
def test_what_is_not_clear_is_one_line(data, name, words):
    with pytest.raises((BitladderError, UsageError)) as raised:
        load_text(f"hf://datasets/{name}")
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)


def test_large_files_and_damage_are_refused(data, monkeypatch):
    data.add("org/bad", {"x.parquet": b"PAR1 no parquet PAR1"})
    with pytest.raises(BitladderError, match=r"org/bad@\w{8}: not a parquet file"):
        load_text("hf://datasets/org/bad")
    monkeypatch.setattr(texts, "MOST_FILE", 100)
    with pytest.raises(BitladderError, match="name a smaller file"):
        load_text("hf://datasets/org/prose/data/train*")
    assert not any("train" in path for path in data.downloads)


def test_without_a_network_the_cache_is_read(data, monkeypatch):
    from huggingface_hub import constants

    before = load_text("hf://datasets/org/chat")
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(constants, name, getattr(constants, name).replace(data.address, "http://127.0.0.1:9"))
    assert load_text("hf://datasets/org/chat") == before
    with pytest.raises(BitladderError, match=r"^the data set org/prose: the hub cannot be reached; a file of this"):
        load_text("hf://datasets/org/prose/data/test*")


def test_the_command_of_a_run_keeps_the_name(tmp_path):
    options = RunOptions("m.gguf", tmp_path, calibration=("hf://datasets/org/chat",), texts=("/a/b.txt",))
    assert "--calibration hf://datasets/org/chat --text b.txt" in command_line(options, "m.gguf")

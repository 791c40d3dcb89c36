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
from bitladder.hub import TEXTS
from bitladder.hub.transfer import TextArchive

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
    assert "did you mean a-2?" in capsys.readouterr().err


def test_without_a_network_there_is_one_line(tmp_path):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "bitladder", "texts", "fetch", "wikitext-2", "-q", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | nowhere, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("bitladder: wikitext-2-raw-v1.zip: the hub ")
    assert "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip" in done.stderr
    assert not (tmp_path / "out").exists()

"""Files that machines exchange through a URL: two folders and what they see of each other."""

import os
import pathlib

import pytest

from bitladder import exchange
from bitladder.errors import BitladderError, UsageError
from bitladder.exchange import SharedFolder


@pytest.fixture(params=["file", "memory"])
def pair(request, tmp_path):
    """Two machines."""
    url = {"file": f"file://{tmp_path}/objects", "memory": f"memory://{tmp_path.name}/objects"}[request.param]
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    yield SharedFolder(url, tmp_path / "here"), SharedFolder(url, tmp_path / "there")
    exchange.remove_objects(url)
    assert not exchange.reaches(url)


def write(machine, name, data):
    path = machine.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_what_one_puts_another_gets_and_only_once(pair):
    here, there = pair
    listing = here.put([write(here, "a/model.gguf", b"weights"), write(here, "plan.json", b"{}")])
    there.hold(listing)
    assert (there.folder / "a/model.gguf").read_bytes() == b"weights"
    before = (there.folder / "plan.json").stat().st_ino
    there.hold(listing)
    assert (there.folder / "plan.json").stat().st_ino == before and there.changed() == []
    assert here.put([here.folder / "plan.json"]).items() <= listing.items()


def test_what_changes_there_comes_back(pair):
    here, there = pair
    there.hold(here.put([write(here, "plan.json", b"old")]))
    write(there, "plan.json", b"new!")
    write(there, "blocks/1.blocks", b"blocks")
    write(there, ".half.tmp", b"ha")
    here.get(there.put(there.changed()))
    assert (here.folder / "plan.json").read_bytes() == b"new!"
    assert (here.folder / "blocks/1.blocks").read_bytes() == b"blocks"
    assert not list(here.folder.rglob("*.tmp"))


def test_a_machine_holds_what_is_listed_and_nothing_else(pair):
    here, there = pair
    listing = here.put([write(here, name, name.encode()) for name in ("one", "two")])
    there.hold(listing)
    there.hold({"two": listing["two"]})
    assert [path.name for path in there.folder.iterdir()] == ["two"]
    there.hold(listing)
    assert (there.folder / "one").read_bytes() == b"one"


def test_lines_of_a_journal_are_put_together(pair):
    here, there = pair
    there.hold(here.put([write(here, "measured.jsonl", b"1\n2\n")]))
    with (there.folder / "measured.jsonl").open("ab") as stream:
        stream.write(b"3\nhalf a li")
    with (here.folder / "measured.jsonl").open("ab") as stream:
        stream.write(b"4\nof a dead process")
    here.get(there.put(there.changed()))
    assert (here.folder / "measured.jsonl").read_bytes() == b"1\n2\n4\nof a dead process\n3\n"


def test_files_from_elsewhere_have_the_name_that_they_are_given(pair, tmp_path):
    here, there = pair
    outside = tmp_path / "model.gguf"
    outside.write_bytes(b"weights")
    there.hold(here.put([], {".inputs/0/model.gguf": outside}))
    assert (there.folder / ".inputs/0/model.gguf").read_bytes() == b"weights"


def test_damage_and_loss_are_one_line_and_leave_no_file(tmp_path):
    here, there = (SharedFolder(f"file://{tmp_path}/objects", tmp_path / name) for name in ("here", "there"))
    listing = here.put([write(here, "plan.json", b"good")])
    thing = tmp_path / "objects" / listing["plan.json"]
    thing.write_bytes(b"evil")
    with pytest.raises(BitladderError, match=r"--share file:.*is damaged"):
        there.get(listing)
    thing.unlink()
    with pytest.raises(BitladderError, match=r"--share file:.*cannot read .* for plan\.json"):
        there.get(listing)
    assert not any(path.is_file() for path in there.folder.rglob("*"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/shared/ladder", "is no URL"),
        ("nosuch://bucket/x", "nosuch"),
        ("file:///proc/none/x", "cannot be written to"),
    ],
)
def test_a_url_that_cannot_be_used_is_named(url, words):
    with pytest.raises(UsageError, match=f"--share .*{words}"):
        exchange.write_object(f"{url}/mark", "x")
    assert not exchange.reaches(f"{url}/mark")


def test_folders_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange.tempfile, "gettempdir", lambda: str(tmp_path))
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    left, living = tmp_path / f"bitladder-share-{child}-x", tmp_path / f"bitladder-share-{os.getppid()}-x"
    left.mkdir()
    living.mkdir()
    folder = exchange.own_folder()
    assert not left.exists() and living.exists() and folder.parent == pathlib.Path(tmp_path)

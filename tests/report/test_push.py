"""`bitladder push` against a hub of our own on loopback; what llama.cpp then finds there is asked of llama.cpp."""

import json
import os
import shutil
import subprocess
import sys

import fake_hub
import pytest

from bitladder.cli import invoke
from bitladder.errors import BitladderError, UsageError
from bitladder.hub import fetch, pick, shards
from bitladder.report.card import render_card
from bitladder.report.publish import check_private, published_files

REPO = "someone/Tiny-GGUF"
TOKEN = "hf_" + "x" * 34
MODELS = ["Tiny-Olmo2-8.9M-BF16.gguf", "Tiny-Olmo2-8.9M-Q4_K_M.gguf", "Tiny-Olmo2-8.9M-Q8_0.gguf"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that this process talks to instead of huggingface.co."""
    from huggingface_hub import constants

    with fake_hub.instead_of_the_hub(monkeypatch, tmp_path / "cache") as server:
        # The protocol of chunks needs a server of its own; without it files go by LFS.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def folder(small_run, tmp_path):
    """A copy of the run, to be spoilt."""
    return shutil.copytree(small_run, tmp_path / "run")


def environment(hub, tmp_path):
    return os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
    }


def test_push_and_fetch(small_run, hub, capsys):
    assert invoke(["push", str(small_run), REPO]) == 0
    assert capsys.readouterr().out.strip() == f"{hub.address}/{REPO}"
    there = hub.repositories[REPO]
    # Byte for byte what lies in the run directory, and nothing that only a later run needs.
    assert sorted(there.files) == sorted(
        [*MODELS, "README.md", "imatrix.gguf", *(["report.html"] if (small_run / "report.html").exists() else []),
         *(f"recipes/{rung}.toml" for rung in ("Q4_K_M", "Q8_0")),
         *(f"scores/{name}.json" for name in ("base", "Q4_K_M", "Q8_0"))]
    )  # fmt: skip
    for name, data in there.files.items():
        assert data == (small_run / name).read_bytes(), name
    # The page that promises the quants comes after them.
    assert there.commits[0]["files"] == MODELS
    assert "README.md" in there.commits[-1]["files"]
    sent = len(hub.uploads)
    assert invoke(["push", str(small_run), REPO]) == 0
    assert (len(hub.uploads), len(there.commits)) == (sent, 2)

    found = fetch(f"{REPO}:q4_k_m")
    assert found.path.name == MODELS[1] and found.path.read_bytes() == there.files[MODELS[1]]
    assert (found.source, found.revision) == (REPO, there.sha)
    assert fetch(f"{REPO}/{MODELS[2]}").path.name == MODELS[2]
    assert hub.downloads == MODELS[1:]  # one file each, and the first one only once
    assert fetch(REPO).path == found.path
    assert hub.downloads == MODELS[1:]


def test_killed_in_mid_transfer_it_goes_on(small_run, hub, tmp_path):
    hub.stall = (small_run / MODELS[1]).stat().st_size  # the smallest quant goes through, the others hang half-way
    command = [sys.executable, "-m", "bitladder", "push", str(small_run), REPO]
    first = subprocess.Popen(command, env=environment(hub, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert hub.stalled.wait(60)
        quant = fake_hub.oid((small_run / MODELS[1]).read_bytes())
        for _ in range(600):
            if quant in hub.stored:
                break
            first.poll()
            hub.release.wait(0.05)
    finally:
        first.kill()
        first.communicate()
    hub.stall = None
    hub.release.set()
    assert set(hub.stored) == {quant}
    assert not hub.repositories[REPO].files  # nothing half-way is on the page
    done = subprocess.run(command, env=environment(hub, tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.uploads.count(quant) == 1  # what had arrived was not sent again
    assert hub.repositories[REPO].files[MODELS[0]] == (small_run / MODELS[0]).read_bytes()


def test_llama_cpp_finds_each_rung_and_skips_the_imatrix(small_run, hub, tools, tmp_path, capsys):
    assert invoke(["push", str(small_run), REPO, "-q"]) == 0
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    variables = {"MODEL_ENDPOINT": hub.address, "LLAMA_CACHE": str(tmp_path / "llama"),
                 "LD_LIBRARY_PATH": str(tools.folder)}  # fmt: skip
    expected = {"": MODELS[1], ":q8_0": MODELS[2]}
    assert {tag: pick(sorted(hub.repositories[REPO].files), tag[1:] or None) for tag in expected} == expected
    for tag, name in expected.items():
        hub.downloads.clear()
        for _ in range(20):  # the last lines of its log can be lost (see `Tools.run`)
            done = subprocess.run(
                [tools.folder / "llama-perplexity", "-hf", f"{REPO}{tag}", "--no-repack", "-f", tmp_path / "text.txt",
                 "-c", "64", "--chunks", "1"],
                env=os.environ | variables, capture_output=True, text=True, check=False, timeout=120,
            )  # fmt: skip
            if "Final estimate" in done.stdout + done.stderr:
                break
        else:
            pytest.fail(done.stderr[-2000:])
        assert set(hub.downloads) <= {name}, tag
    for tag in (":imatrix",):  # the rule in our words gives nothing, and so does the tool
        assert pick(sorted(hub.repositories[REPO].files), tag[1:]) is None
        done = subprocess.run(
            [tools.folder / "llama-perplexity", "-hf", f"{REPO}{tag}", "-f", tmp_path / "text.txt"],
            env=os.environ | variables, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode != 0


def test_dry_run_sends_nothing(small_run, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert invoke(["push", str(small_run), REPO, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "nothing was sent" in shown.out
    assert f"llama-server -hf {REPO}:Q4_K_M   (and -hf {REPO})" in shown.out
    assert "no base_model" in shown.err
    assert invoke(["push", str(small_run), REPO, "--dry-run", "--json", "--exclude", "*-BF16.gguf"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["bytes"] == sum((small_run / file["name"]).stat().st_size for file in data["files"])
    assert {file["rung"] for file in data["files"]} == {None, "Q4_K_M", "Q8_0"}


def test_a_projector_goes_too_and_is_in_the_card(folder):
    path = folder / "mmproj-Tiny-Olmo2-8.9M-BF16.gguf"
    path.write_bytes(b"GGUF")
    manifest = json.loads((folder / "ladder.json").read_text())
    convert = manifest["steps"]["convert"]
    assert len(convert["outputs"]) == 1
    convert["outputs"].append({**convert["outputs"][0], "path": path.name, "bytes": 4})
    convert["facts"]["projector"] = {"file": path.name, "bytes": 4}
    convert["facts"]["prediction_weights"] = 1234
    (folder / "ladder.json").write_text(json.dumps(manifest))
    entry = next(entry for entry in published_files(folder) if entry.name == path.name)
    assert (entry.bytes, entry.rung) == (4, None)
    card = render_card(folder)
    address = f"https://huggingface.co/{REPO}/resolve/main/{path.name}?download=true"
    assert f"[{path.name}]({address})" in card and f"--mmproj {path.name}" in card
    assert "1,234 weights" in card and "Q8_0, because no calibration text reaches them" in card


def test_only_a_finished_run_goes(folder):
    manifest = json.loads((folder / "ladder.json").read_text())
    manifest["run"]["complete"] = False
    (folder / "ladder.json").write_text(json.dumps(manifest))
    with pytest.raises(BitladderError, match="not finished"):
        published_files(folder)
    manifest["run"]["complete"] = True
    (folder / "ladder.json").write_text(json.dumps(manifest))
    names = [entry.name for entry in published_files(folder)]
    assert names[-1] == "README.md"
    with pytest.raises(UsageError, match="matches none"):
        published_files(folder, ["*-Q2_K.gguf"])
    with pytest.raises(UsageError, match="card"):
        published_files(folder, ["*.md"])
    with (folder / MODELS[1]).open("ab") as stream:
        stream.write(b"0")
    with pytest.raises(BitladderError, match=r"Q4_K_M\.gguf was changed after the run"):
        published_files(folder)
    (folder / MODELS[1]).unlink()
    with pytest.raises(BitladderError, match=r"Q4_K_M\.gguf is missing"):
        published_files(folder)


@pytest.mark.parametrize("path", ["/srv/models/olmo", "~/models/olmo", "../olmo", r"C:\models\olmo", "file:///olmo"])
def test_local_paths_are_refused(folder, path):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("---\n", f"---\nbase_model:\n- {path}\n", 1))
    with pytest.raises(BitladderError, match="base_model is a path of this machine"):
        check_private(folder, published_files(folder))


def test_the_run_directorys_own_path_is_refused(folder):
    recipe = folder / "recipes" / "Q8_0.toml"
    entries = published_files(folder)
    recipe.write_text(recipe.read_text() + f"# {folder.resolve()}\n")
    with pytest.raises(BitladderError, match=r"Q8_0\.toml contains the path"):
        check_private(folder, entries)


def test_warnings(folder, capsys):
    card = folder / "README.md"
    text = card.read_text()
    assert invoke(["push", str(folder), REPO, "--dry-run"]) == 0
    assert "base_model" in capsys.readouterr().err
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("license")]
    card.write_text("".join(lines).replace("---\n", "---\nbase_model: someone/tiny\n", 1))
    assert invoke(["push", str(folder), REPO, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "no license" in said and "base_model" not in said


def test_refusals_in_one_line(folder, hub, capsys):
    for name in ("Tiny", "a/b/c", "a/b:Q4_K_M", "./x/y"):
        assert invoke(["push", str(folder), name, "--dry-run"]) == 2
        assert "OWNER/NAME" in capsys.readouterr().err
    hub.add(REPO, {})
    assert invoke(["push", str(folder), REPO, "--private"]) == 1
    assert "public already" in capsys.readouterr().err
    hub.refuse = 403, "you may not write here"
    assert invoke(["push", str(folder), "other/Tiny"]) == 1
    said = capsys.readouterr().err
    assert "you may not write here" in said and "Traceback" not in said


def test_the_token_is_nowhere(folder, hub, tmp_path, capfd):
    """Not in what is printed, not in the run directory, not in the cache; even where the server repeats it."""
    assert invoke(["push", str(folder), REPO, "-v"]) == 0
    assert hub.authorized, "the token was not used at all"
    hub.refuse = 403, f"the token {TOKEN} may not write here"
    assert invoke(["push", str(folder), "other/Tiny", "-v"]) == 1
    assert invoke(["eval", "-m", "someone/absent:Q4_K_M", "--no-cache", "-v"]) != 0
    assert invoke(["compare", "someone/absent:Q4_K_M", "--base", "absent.gguf", "--no-cache", "-v"]) != 0
    assert invoke(["card", str(folder)]) == 0
    printed = "".join(capfd.readouterr())
    assert "(the token) may not write here" in printed
    assert TOKEN not in printed
    files = [path for place in (folder, tmp_path / "cache") for path in place.rglob("*") if path.is_file()]
    assert files and not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_what_the_hub_does_not_give(hub, tmp_path, monkeypatch):
    hub.add(REPO, {"a-Q8_0.gguf": b"GGUF", "notes.txt": b"", "a-imatrix.gguf": b"GGUF"})
    with pytest.raises(BitladderError, match=r"no such GGUF in .*; it has a-Q8_0\.gguf"):
        fetch(f"{REPO}:Q4_K_M")
    with pytest.raises(BitladderError, match="no such repository"):
        fetch("someone/absent:Q4_K_M")
    for spec in (str(tmp_path), "absent.gguf", "folder/absent.gguf"):
        with pytest.raises(UsageError, match="OWNER/REPO"):
            fetch(spec)
    kept = fetch(f"{REPO}:Q8_0")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch(f"{REPO}:Q8_0").path == kept.path  # away from the net, what is in the cache serves


def test_shards_come_together(hub):
    names = [f"Q4_K_M/m-Q4_K_M-0000{number}-of-00002.gguf" for number in (1, 2)]
    hub.add(REPO, {name: b"GGUF" + name.encode() for name in names} | {"m-Q4_K_M-00001-of-00003.gguf.txt": b""})
    found = fetch(f"{REPO}:Q4_K_M")
    assert found.path.name == "m-Q4_K_M-00001-of-00002.gguf"
    assert found.path.with_name("m-Q4_K_M-00002-of-00002.gguf").is_file()
    assert found.source == f"{REPO}/Q4_K_M"
    assert shards(names, names[0]) == names


@pytest.mark.parametrize(
    ("names", "quant", "taken"),
    [
        (["m-mmproj-Q8_0.gguf", "m-Q8_0.gguf"], "Q8_0", "m-Q8_0.gguf"),
        (["imatrix-Q4_K_M.gguf", "m-Q5_K_M.gguf"], None, "m-Q5_K_M.gguf"),
        (["m-Q8_0.gguf", "m-q4_k_m.gguf"], None, "m-q4_k_m.gguf"),
        (["m-Q4_K_M-00002-of-00002.gguf"], "Q4_K_M", None),
        (["m-Q4_K_M.gguf"], "Q4_K", None),
        (["m-BF16.gguf", "m-F16.gguf"], "F16", "m-BF16.gguf"),  # as llama.cpp: F16 is in BF16
    ],
)
def test_the_file_that_is_taken(names, quant, taken):
    assert pick(names, quant) == taken


@pytest.mark.parametrize("way", ["above", "absolute", "link", "scores"])
def test_nothing_outside_the_run_is_sent(way, folder, tmp_path, capsys):
    secret = tmp_path / "secret.gguf"
    secret.write_bytes(b"GGUF secret")
    manifest = json.loads((folder / "ladder.json").read_text())
    if way == "scores":
        path = folder / "scores" / "Q8_0.json"
        scores = json.loads(path.read_text()) | {"model": "../secret.gguf"}
        path.write_text(json.dumps(scores))
        for step in manifest["steps"].values():
            step["outputs"] = [one for one in step["outputs"] if one["path"] != "scores/Q8_0.json"]
    elif way == "link":
        (folder / "imatrix.gguf").unlink()
        (folder / "imatrix.gguf").symlink_to(secret)
    else:
        output = manifest["steps"]["convert"]["outputs"][0]
        output |= {"path": str(secret) if way == "absolute" else "../secret.gguf", "bytes": secret.stat().st_size}
    (folder / "ladder.json").write_text(json.dumps(manifest))
    assert invoke(["push", str(folder), REPO, "--dry-run"]) == 1
    shown = capsys.readouterr()
    assert not shown.out and len(shown.err.splitlines()) == 1, shown
    assert "outside" in shown.err or "damaged" in shown.err


@pytest.mark.parametrize("verb", ["push", "show", "card"])
@pytest.mark.parametrize("damage", ["steps", "facts", "type", "utf8"])
def test_a_damaged_run_is_named(verb, damage, folder, capsys):
    path = folder / "ladder.json"
    manifest = json.loads(path.read_text())
    if damage == "steps":
        manifest["steps"] = {}
    elif damage == "facts":
        del manifest["steps"]["convert"]["facts"]["general"]
    elif damage == "type":
        manifest["steps"]["convert"]["facts"]["bytes"] = "many"
    path.write_bytes(b'{"run": "\xff"}' if damage == "utf8" else json.dumps(manifest).encode())
    arguments = [verb, str(folder), *([REPO, "--dry-run"] if verb == "push" else [])]
    assert invoke(arguments) == 1
    error = capsys.readouterr().err
    assert "ladder.json" in error and len(error.splitlines()) == 1


def test_a_card_that_is_not_utf8(folder, capsys):
    (folder / "README.md").write_bytes(b"---\nlicense: mit\n---\ncaf\xe9\n")
    assert invoke(["push", str(folder), REPO, "--dry-run"]) == 1
    assert "README.md is not UTF-8" in capsys.readouterr().err


def test_the_card_names_the_repository_unless_somebody_edited_it(folder, hub, capsys):
    card, other, third = folder / "README.md", "someone/Other-GGUF", "someone/Third-GGUF"
    assert invoke(["push", str(folder), other, "--dry-run"]) == 0
    assert f"llama-server -hf {REPO}:" in card.read_text() and other not in card.read_text()
    assert invoke(["push", str(folder), other, "-q"]) == 0
    assert f"llama-server -hf {other}:" in card.read_text()
    assert hub.repositories[other].files["README.md"] == card.read_bytes()
    card.write_text(card.read_text() + "\nMine.\n")
    assert invoke(["push", str(folder), third]) == 0
    assert "README.md was edited" in capsys.readouterr().err and third not in card.read_text()
    assert invoke(["card", str(folder), "--repo", REPO]) == 0
    assert REPO in card.read_text() and "Mine." not in card.read_text()
    assert invoke(["card", str(folder), "--repo", "a/b/c"]) == 2

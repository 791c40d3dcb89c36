"""The same inputs give the same bytes, whatever the number of threads; and a run's quants can be derived again."""

import json
import re
import shutil

import kills
import pytest

from bitladder.cli import invoke
from bitladder.errors import BitladderError
from bitladder.ladder import run, verify_run
from bitladder.report import write_card, write_report
from bitladder.rundir import load_manifest


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A planned, smoothed and rounded run by one thread, and the same by two. Tuning does not repeat byte by byte."""
    folder = tmp_path_factory.mktemp("threads")
    outs = []
    for threads in (1, 2):
        options = kills.tiny_run(folder, folder / str(threads) / "ladder")
        run(options.replace(tune_chunks=0, threads=threads))
        write_card(options.out)
        write_report(options.out)
        outs.append(options.out)
    return outs


def without_threads(folder):
    """The files of a run. The command that repeats the run names the threads."""
    return {name: re.sub(rb" --threads \d", b"", data) for name, data in kills.contents(folder).items()}


def test_threads_change_no_byte(runs):
    first, second = runs
    assert load_manifest(first).steps.keys() >= {"imatrix", "moments", "smooth", "plan Q4_K_S", "quantize Q4_K_S"}
    assert load_manifest(first).steps["quantize Q4_K_S"].facts["reproducible"] is True
    ours, theirs = without_threads(first), without_threads(second)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_a_run_is_verified_from_its_directory(runs, capsys):
    (verified,) = verify_run(runs[0], threads=1).values()
    assert not verified.differing and "rounded" in verified.origins.values()
    assert invoke(["verify", str(runs[0]), "--sample", "3", "--json", "-q", "-t", "1"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rungs"]["Q4_K_S"]["tensors"]) == 3


def test_what_does_not_fit_is_named(runs, tmp_path, capsys):
    folder = shutil.copytree(runs[0], tmp_path / "ladder")
    quant = next(folder.glob("*-Q4_K_S.gguf"))
    data = bytearray(quant.read_bytes())
    data[-1000] ^= 1
    quant.write_bytes(data)
    with pytest.raises(BitladderError, match=r"Q4_K_S\.gguf was changed after the run"):
        verify_run(folder)
    # Whoever changes the manifest too is found by what is derived.
    manifest = load_manifest(folder)
    from bitladder.files import sha256_file

    manifest.steps["quantize Q4_K_S"].outputs[0].sha256 = sha256_file(quant)
    manifest.save(folder)
    assert invoke(["verify", str(folder), "-q", "-t", "1"]) == 1
    assert "1 tensor of the rungs of" in capsys.readouterr().err
    quant.unlink()
    with pytest.raises(BitladderError, match=r"is missing, and nothing can be derived without it"):
        verify_run(folder)
    assert invoke(["verify", str(folder), "--imatrix", str(quant)]) == 2
    assert invoke(["verify", str(quant)]) == 2

"""Runs are killed and disturbed at random moments, continued, and compared with an undisturbed one, byte for byte."""

import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1]


def ends_well(script, words, folder):
    """Runs a script in a process of its own: it forks, which is safe as long as it has one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    command = [sys.executable, str(FOLDER / script), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Ten kills within about one run; a hundred anywhere, most of them in a run of its own.
@pytest.mark.parametrize(
    ("kills", "share", "rounding"),
    [(10, 0.2, "feedback"), pytest.param(100, 1.0, "best", marks=pytest.mark.slow)],
)
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(kills, share, rounding, tmp_path):
    words = ["--kills", kills, "--share", share, "--rounding", rounding]
    assert f"\n{kills} kills, " in ends_well("kills.py", words, tmp_path)


# Each kind of fault once in a run of a second; or often, in a run with every kind of step.
@pytest.mark.parametrize("words", [["--quick"], pytest.param(["--times", 20], marks=pytest.mark.slow)])
def test_each_fault_is_one_line_and_the_next_run_finishes(words, tmp_path):
    assert ", 0 not met" in ends_well("faults.py", words, tmp_path)

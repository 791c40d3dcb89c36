"""Runs are killed at random moments, continued, and compared byte for byte with an undisturbed one (`kills.py`)."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "kills.py"


# Ten kills within about one run; a hundred anywhere, most of them in a run of its own.
@pytest.mark.parametrize(
    ("kills", "share", "rounding"),
    [(10, 0.2, "feedback"), pytest.param(100, 1.0, "best", marks=pytest.mark.slow)],
)
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(kills, share, rounding, tmp_path):
    # A process of its own: it forks, which is safe as long as it has one thread.
    words = [SCRIPT, "--kills", kills, "--share", share, "--rounding", rounding]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and f"{kills} kills, " in done.stdout, done.stdout + done.stderr

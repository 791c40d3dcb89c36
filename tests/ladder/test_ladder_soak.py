"""Fifty runs in one process take no more memory and no more open files than the first ones (`soak.py`)."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "soak.py"


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--naive"], []])
def test_many_runs_take_no_more_than_a_few(words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--runs", "50", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "50 runs: memory" in done.stdout, done.stdout + done.stderr

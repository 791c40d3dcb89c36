"""Tokens per second of everything in a run, in turns."""

import pathlib
from collections.abc import Mapping
from typing import Any

from bitladder import evaluate
from bitladder.ladder.plan import BENCH_REPETITIONS, RunOptions
from bitladder.progress import Progress


def speeds(options: RunOptions, paths: Mapping[str, pathlib.Path], progress: Progress) -> dict[str, list[Any]]:
    """The rows of Scores.bench of each model, by its label."""
    tests = [evaluate.SpeedTest(*test) for test in options.bench_tests]
    how = evaluate.SpeedOptions(BENCH_REPETITIONS, threads=options.threads, gpu_layers=options.gpu_layers)
    rows = evaluate.bench(list(paths.values()), tests, how, progress)
    # A file of somebody else may be called as one of ours is, so rows are told apart by their place.
    return {
        label: [row.bench_row().model_dump() for row in rows[place * len(tests) : (place + 1) * len(tests)]]
        for place, label in enumerate(paths)
    }

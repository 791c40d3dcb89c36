"""Measuring a model file: perplexity, and divergence from the full-precision model."""

from bitladder.evaluate.base.cache import cache_path, load_or_compute_base, open_base
from bitladder.evaluate.base.hidden import HiddenBase
from bitladder.evaluate.base.logits_file import LogitsFile
from bitladder.evaluate.divergence import TokenScores
from bitladder.evaluate.identity import Identity, identify
from bitladder.evaluate.measure import (
    Measured,
    base_scores,
    evaluate,
    make_base,
    measure,
    measure_and_keep,
    open_or_compute,
)
from bitladder.evaluate.paired import paired_mean
from bitladder.evaluate.results_cache import NoResults, ResultFolder
from bitladder.evaluate.scores import Figure, Scores
from bitladder.evaluate.settings import Settings
from bitladder.evaluate.several import Wanted, add_tasks, compare_pair, evaluate_several, measure_several
from bitladder.evaluate.speed import bench
from bitladder.evaluate.speed_rows import SpeedRow, SpeedSettings
from bitladder.evaluate.speed_tests import SpeedTest
from bitladder.evaluate.tasks import Task, load_task, parse_specs

__all__ = [
    "Figure",
    "HiddenBase",
    "Identity",
    "LogitsFile",
    "Measured",
    "NoResults",
    "ResultFolder",
    "Scores",
    "Settings",
    "SpeedRow",
    "SpeedSettings",
    "SpeedTest",
    "Task",
    "TokenScores",
    "Wanted",
    "add_tasks",
    "base_scores",
    "bench",
    "cache_path",
    "compare_pair",
    "evaluate",
    "evaluate_several",
    "identify",
    "load_or_compute_base",
    "load_task",
    "make_base",
    "measure",
    "measure_and_keep",
    "measure_several",
    "open_base",
    "open_or_compute",
    "paired_mean",
    "parse_specs",
]

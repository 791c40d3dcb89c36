"""Measuring a model file: perplexity, divergence from the full-precision model, tasks and speed."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.evaluate.base.basefile import BASE_FORMAT, is_base_file
    from bitladder.evaluate.base.cache import cache_path, load_or_compute_base, open_base
    from bitladder.evaluate.base.hidden import BASE, HiddenBase
    from bitladder.evaluate.base.logits_file import LogitsFile, is_logits_file
    from bitladder.evaluate.identity import (
        UNSCORED,
        Identity,
        MeasureOptions,
        NoResults,
        ResultFolder,
        Results,
        decision_chunk,
        decision_settings,
        identify,
        nearly_all_scored,
    )
    from bitladder.evaluate.measure import (
        MEASURE,
        Measurement,
        Reference,
        evaluate,
        make_base,
        measure,
        measure_and_keep,
        measure_base,
        opened_bases,
        over_texts,
    )
    from bitladder.evaluate.noise import NOISE, noise_floor
    from bitladder.evaluate.paired import (
        SURE,
        MixedPair,
        compare_pair,
        mixed_pairs,
        paired_mean,
        paired_task,
        with_pair,
    )
    from bitladder.evaluate.scores import (
        SCORES,
        Divergence,
        Figure,
        NamedFile,
        Noise,
        Paired,
        Role,
        RunScores,
        Scores,
        TextScores,
        read_document,
        read_scores,
    )
    from bitladder.evaluate.several import (
        EvalOptions,
        EvalRequest,
        add_tasks,
        evaluate_files,
        evaluate_several,
        measure_several,
    )
    from bitladder.evaluate.speed import BENCH, SpeedError, bench
    from bitladder.evaluate.speed_tests import GENERATED, SpeedChoice, SpeedOptions, SpeedRow, SpeedTest
    from bitladder.evaluate.tasks.answer import TASKS, summarize
    from bitladder.evaluate.tasks.load import command_line as task_command
    from bitladder.evaluate.tasks.load import export_task, is_task_file, load_task, parse_specs, task_meanings
    from bitladder.evaluate.tasks.task import FIVE, QuestionSet, average_of_five
    from bitladder.evaluate.token_scores import TokenScores, average, compare_chunk, compare_with_base, mean

__all__ = [
    "BASE",
    "BASE_FORMAT",
    "BENCH",
    "FIVE",
    "GENERATED",
    "MEASURE",
    "NOISE",
    "SCORES",
    "SURE",
    "TASKS",
    "UNSCORED",
    "Divergence",
    "EvalOptions",
    "EvalRequest",
    "Figure",
    "HiddenBase",
    "Identity",
    "LogitsFile",
    "MeasureOptions",
    "Measurement",
    "MixedPair",
    "NamedFile",
    "NoResults",
    "Noise",
    "Paired",
    "QuestionSet",
    "Reference",
    "ResultFolder",
    "Results",
    "Role",
    "RunScores",
    "Scores",
    "SpeedChoice",
    "SpeedError",
    "SpeedOptions",
    "SpeedRow",
    "SpeedTest",
    "TextScores",
    "TokenScores",
    "add_tasks",
    "average",
    "average_of_five",
    "bench",
    "cache_path",
    "compare_chunk",
    "compare_pair",
    "compare_with_base",
    "decision_chunk",
    "decision_settings",
    "evaluate",
    "evaluate_files",
    "evaluate_several",
    "export_task",
    "identify",
    "is_base_file",
    "is_logits_file",
    "is_task_file",
    "load_or_compute_base",
    "load_task",
    "make_base",
    "mean",
    "measure",
    "measure_and_keep",
    "measure_base",
    "measure_several",
    "mixed_pairs",
    "nearly_all_scored",
    "noise_floor",
    "open_base",
    "opened_bases",
    "over_texts",
    "paired_mean",
    "paired_task",
    "parse_specs",
    "read_document",
    "read_scores",
    "summarize",
    "task_command",
    "task_meanings",
    "with_pair",
]
open_door(__name__)

"""Benchmarks: questions with choices, drawn and scored as in llama-perplexity."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.evaluate.tasks.answer import TASKS, QuestionSummary, score_task, summarize
    from bitladder.evaluate.tasks.load import (
        BENCHMARKS,
        TaskSpec,
        command_line,
        export_task,
        load_task,
        parse_specs,
        task_meanings,
        task_names,
    )
    from bitladder.evaluate.tasks.task import (
        FIVE,
        Answer,
        Benchmark,
        Question,
        QuestionSet,
        Skipped,
        TaskKind,
        TaskResult,
        average_of_five,
    )

__all__ = [
    "BENCHMARKS",
    "FIVE",
    "TASKS",
    "Answer",
    "Benchmark",
    "Question",
    "QuestionSet",
    "QuestionSummary",
    "Skipped",
    "TaskKind",
    "TaskResult",
    "TaskSpec",
    "average_of_five",
    "command_line",
    "export_task",
    "load_task",
    "parse_specs",
    "score_task",
    "summarize",
    "task_meanings",
    "task_names",
]
open_door(__name__)

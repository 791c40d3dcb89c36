"""Benchmarks: questions with choices, drawn and scored as llama-perplexity does."""

from bitladder.evaluate.tasks.answer import score_task
from bitladder.evaluate.tasks.export import command_line, export_task
from bitladder.evaluate.tasks.load import FIVE, TASKS, TaskSpec, load_task, parse_specs
from bitladder.evaluate.tasks.summary import Summary, summarize
from bitladder.evaluate.tasks.task import Answer, Kind, Question, Skipped, Task, TaskResult

__all__ = [
    "FIVE",
    "TASKS",
    "Answer",
    "Kind",
    "Question",
    "Skipped",
    "Summary",
    "Task",
    "TaskResult",
    "TaskSpec",
    "command_line",
    "export_task",
    "load_task",
    "parse_specs",
    "score_task",
    "summarize",
]

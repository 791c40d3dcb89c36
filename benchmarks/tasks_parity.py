#!/usr/bin/env python3
"""The five benchmarks answered by bitladder and by llama-perplexity: the same questions, the same answers?

    LLAMA_CPP_TOOLS=DIR python benchmarks/tasks_parity.py --data DIR --model A.gguf [--model B.gguf …]

DIR has the data sets' public files in folders named arc, hellaswag, mmlu, truthfulqa and winogrande. Each is written
once in llama-perplexity's format (`bitladder tasks`), and both sides read that file. llama-perplexity prints its
accuracy so far after every question; from that follows which questions it answered right, in which order, and these
are compared one by one with ours.
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
from typing import Any

from bitladder.engine import versions
from bitladder.engine.cpu_kernels import extras_work

ROOT = pathlib.Path(__file__).parents[1]
# Option of llama-perplexity, option of its file, ending.
TASKS = {
    "arc": ("multiple-choice", "-bf", "bin"),
    "hellaswag": ("hellaswag", "-f", "txt"),
    "mmlu": ("multiple-choice", "-bf", "bin"),
    "truthfulqa": ("multiple-choice", "-bf", "bin"),
    "winogrande": ("winogrande", "-f", "csv"),
}
_LINE = re.compile(r"^(\d+)\t\s*([\d.]+)", re.MULTILINE)
_ATTEMPTS = 3  # the tool's log has a thread of its own, and its last lines are lost if the tool ends first


def output(command: list[str], environment: dict[str, str]) -> str:
    """What a command prints; ends the script if it fails."""
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{(done.stderr + done.stdout)[-2000:]}")
    return done.stdout + done.stderr if "llama-" in command[0] else done.stdout


def theirs(command: list[str], environment: dict[str, str], count: int) -> list[bool]:
    """Whether llama-perplexity answered each question right, in its order."""
    right: list[bool] = []
    for _ in range(_ATTEMPTS):
        found = [(int(number), float(percent)) for number, percent in _LINE.findall(output(command, environment))]
        totals = [round(number * percent / 100) for number, percent in found]
        if [number for number, _ in found] != list(range(1, len(found) + 1)):
            sys.exit(f"{shlex.join(command)}: lines are missing")
        right = [after > before for before, after in zip([0, *totals], totals, strict=False)]
        if len(right) == count:
            break
    return right


def compare(task: str, file: pathlib.Path, model: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides on one file."""
    tool = pathlib.Path(os.environ["LLAMA_CPP_TOOLS"])
    flag, file_flag, _ = TASKS[task]
    common = ["-m", str(model), "-c", str(options.ctx), "-t", str(options.threads)]
    bitladder = str(pathlib.Path(sys.executable).with_name("bitladder"))
    ours_command = [bitladder, "eval", *common, "--tasks", f"{task}:{file}", "--task-count", str(options.count)]
    (score,) = json.loads(output([*ours_command, "--json", "--no-cache", "-q"], dict(os.environ)))["tasks"].values()
    answers = [answer.split(":") for answer in score["answers"].split()]
    ours = [chosen == correct for _, chosen, correct in answers]
    environment = os.environ | {"LD_LIBRARY_PATH": str(tool)}
    if not extras_work():  # the tool would die of what this library cannot do either
        environment |= {"LLAMA_ARG_REPACK": "0"}
    theirs_command = [str(tool / "llama-perplexity"), *common, f"--{flag}", f"--{flag}-tasks", str(options.count)]
    theirs_command += [file_flag, str(file), "-np", str(options.sequences[task]), "--no-escape"]
    other = theirs(theirs_command, environment, len(ours))
    compared = min(len(ours), len(other))
    return {
        "task": task,
        "accuracy": score["accuracy"],
        "chance": score["chance"],
        "count": len(ours),
        "skipped": score.get("skipped", 0),
        "compared": compared,
        "accuracy_ours": sum(ours[:compared]) / max(compared, 1),
        "accuracy_theirs": sum(other[:compared]) / max(compared, 1),
        "same_outcome": sum(a == b for a, b in zip(ours, other, strict=False)),
        "commands": [_shown(ours_command), _shown(theirs_command)],
    }


def _shown(command: list[str]) -> str:
    """A command without the folders of its files."""
    return " ".join(re.sub(r"(^|:)/[^:]*/", r"\1", word) for word in command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of the five data sets' folders")
    parser.add_argument("--model", type=pathlib.Path, action="append", required=True, help="GGUF file; may be repeated")
    parser.add_argument("--count", type=int, default=150, help="questions of each task")
    parser.add_argument("--ctx", type=int, default=768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="comma-separated tasks")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks/results/tasks-parity.json")
    options = parser.parse_args()
    if not os.environ.get("LLAMA_CPP_TOOLS"):
        sys.exit("set LLAMA_CPP_TOOLS to the folder with llama-perplexity")
    wanted = options.only.split(",") if options.only else list(TASKS)
    options.sequences = {}
    result: dict[str, Any] = {"count": options.count, "n_ctx": options.ctx, "versions": versions(), "models": {}}
    print(f"{'model':28} {'task':11} {'ours':>9} {'theirs':>9} {'chance':>8}   same outcome, question by question")
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for task in wanted:
            files[task] = pathlib.Path(folder) / f"{task}.{TASKS[task][2]}"
            command = [sys.executable, "-m", "bitladder", "tasks", f"{task}:{options.data / task}", "--json", "-q"]
            output([*command, "-o", str(files[task])], dict(os.environ))
            drawn = json.loads(output([*command, "--task-count", str(options.count)], dict(os.environ)))
            # As many sequences as the question with most choices needs: the tool refuses it with fewer.
            options.sequences[task] = max(4, *map(int, drawn["choices"]))
        for model in options.model:
            rows = result["models"][model.name] = []
            for task in wanted:
                row = compare(task, files[task], model, options)
                rows.append(row)
                print(
                    f"{model.name[:28]:28} {task:11} {100 * row['accuracy_ours']:8.4f}% "
                    f"{100 * row['accuracy_theirs']:8.4f}% {100 * row['chance']:7.2f}%   "
                    f"{row['same_outcome']} of {row['compared']}",
                    flush=True,
                )
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

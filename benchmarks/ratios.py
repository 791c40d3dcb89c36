#!/usr/bin/env python3
"""Wall time and peak memory of bitladder against llama.cpp's own tools, doing the same work on the same files.

    LLAMA_CPP_TOOLS=DIR python benchmarks/ratios.py --model F16.gguf --text wiki.test.raw --calibration TEXT
        --hellaswag FILE --mmlu FOLDER

Runs are interleaved (ours, theirs, ours, theirs, …), so that whatever else the machine does hits both alike; the
figures are ratios of medians. Nothing is skipped on either side: each command is what a user would type, without kept
results (`--no-cache`), and without the noise floor, which the tools do not have. Where a ratio is above its target, our
command runs once more under `profile_parts.py`, and where its time goes is printed and kept.

    imatrix      without perplexity on their side
    base         the predictions of full precision, as a run keeps them, against --kl-divergence-base
    kld          a quant, the base is kept beforehand on both sides
    base + kld   both: one command here, two there
    quantize     Q4_K_M
    rungs        the twelve usual rungs one after the other, one process here, twelve there
    hellaswag, mmlu   `--task-count` questions of a file in llama-perplexity's format

Where this processor's special layouts of weights do not work, both sides do without them, as in `tasks_parity.py`.
Jobs that were measured before with the same model, texts and numbers stay in the file; `--only` names those to measure.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from profile_parts import line

from bitladder.engine import versions
from bitladder.engine.cpu_kernels import extras_work

ROOT = pathlib.Path(__file__).parents[1]
HERE = pathlib.Path(__file__).parent
# The largest ratio that is wanted; of --help the most seconds.
TARGETS = {
    "imatrix": 0.9,
    "perplexity": 0.95,
    "base": 0.85,
    "kld": 0.85,
    "base + kld": 0.85,
    "quantize": 1.0,
    "rungs": 0.5,
    "hellaswag": 0.7,
    "mmlu": 0.7,
}
HELP = 0.15
SEQUENCES, TASK_CTX = 4, 768
TASKS = {"hellaswag": ("hellaswag", "-f", "txt"), "mmlu": ("multiple-choice", "-bf", "bin")}

Command = list[str]


class Side:
    """Runs jobs and remembers seconds and peak resident megabytes of each."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.seconds: list[float] = []
        self.megabytes: list[float] = []

    def run(self, *commands: Command) -> None:
        """Runs the commands of a job one after the other."""
        started, largest = time.perf_counter(), 0.0
        for command in commands:
            with tempfile.TemporaryFile() as log:
                process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                if process.returncode:
                    log.seek(0)
                    sys.exit(f"{' '.join(command)} failed:\n{log.read().decode()[-2000:]}")
            largest = max(largest, usage.ru_maxrss / 1024)
        self.seconds.append(time.perf_counter() - started)
        self.megabytes.append(largest)


class Jobs:
    """The commands of both sides, and the files that they need.

    Parameters:
        options: of the command line.
        work: folder for what is written.
        tools: folder of llama.cpp's tools.
    """

    def __init__(self, options: argparse.Namespace, work: pathlib.Path, tools: pathlib.Path) -> None:
        self._options, self._work, self._tools = options, work, tools
        self._bitladder = str(pathlib.Path(sys.executable).with_name("bitladder"))
        self.environment = os.environ | {"LD_LIBRARY_PATH": str(tools)}
        if not extras_work():  # the tool would die of what this library cannot do either
            self.environment |= {"LLAMA_ARG_REPACK": "0"}
        self._model, self._text = str(options.model), ["-f", str(options.text), "--chunks", str(options.chunks)]
        self._imatrix, self._quant = self._path("imatrix.gguf"), self._path("quant.gguf")
        self._base, self._logits = self._path("kept.base"), self._path("kept.logits")
        calibration = str(options.calibration or options.text)
        self._calibration = ["-f", calibration, "--chunks", str(options.chunks)]

    def _path(self, name: str) -> str:
        return str(self._work / name)

    def _theirs(self, name: str, *arguments: str) -> Command:
        return [str(self._tools / f"llama-{name}"), *arguments]

    def _eval(self, *arguments: str) -> Command:
        return [self._bitladder, "eval", "-q", "--no-cache", *arguments]

    def _run(self, command: Command) -> None:
        quiet = subprocess.DEVNULL
        subprocess.run(command, check=True, env=self.environment, stdout=quiet, stderr=quiet)

    def prepare(self, wanted: list[str]) -> dict[str, Any]:
        """Makes what jobs read, and returns the sizes of both bases."""
        on = [*self._calibration, "-o", self._imatrix, "--no-ppl"]
        self._run(self._theirs("imatrix", "-m", self._model, *on))
        self._run(self._theirs("quantize", "--imatrix", self._imatrix, self._model, self._quant, "Q4_K_M"))
        if "kld" not in wanted:
            return {}
        self._run(self._theirs("perplexity", "-m", self._model, "--kl-divergence-base", self._logits, *self._text))
        subprocess.run(self._product("base", self._model, *self._base_arguments(self._base)), check=True)
        sizes = pathlib.Path(self._base).stat().st_size, pathlib.Path(self._logits).stat().st_size
        return {"ours": sizes[0], "theirs": sizes[1], "ratio": round(sizes[0] / sizes[1], 4)}

    def _product(self, *arguments: str) -> Command:
        return [sys.executable, str(HERE / "product_jobs.py"), *arguments]

    def _base_arguments(self, out: str) -> list[str]:
        return [str(self._options.text), str(self._options.chunks), out]

    def of(self, name: str) -> tuple[list[Command], list[Command]] | None:
        """The commands of a job on both sides; None if its questions are not given."""
        model, quant, imatrix = self._model, self._quant, ["--imatrix", self._imatrix]
        ours_base, theirs_base = self._path("new.base"), self._path("new.logits")
        compare = ["--base", model, "--noise-chunks", "0", *self._text]
        make_theirs = self._theirs("perplexity", "-m", model, "--kl-divergence-base", theirs_base, *self._text)
        kld_theirs = ["-m", quant, "--kl-divergence", *self._text, "--kl-divergence-base"]
        if name in TASKS:
            return self._questions(name)
        if name == "rungs":
            return [self._product("rungs", model, self._imatrix, str(self._work))], [
                self._theirs("quantize", *imatrix, model, self._path("rung.gguf"), rung) for rung in self._rungs()
            ]
        jobs: dict[str, tuple[list[Command], list[Command]]] = {
            "imatrix": (
                [[self._bitladder, "imatrix", "-q", "-m", model, *self._calibration, "-o", self._path("a.gguf")]],
                [self._theirs("imatrix", "-m", model, *self._calibration, "-o", self._path("b.gguf"), "--no-ppl")],
            ),
            "perplexity": (
                [self._eval("-m", model, *self._text)],
                [self._theirs("perplexity", "-m", model, *self._text)],
            ),
            "base": ([self._product("base", model, *self._base_arguments(ours_base))], [make_theirs]),
            "kld": (
                [self._eval("-m", quant, *compare, "--base-file", self._base)],
                [self._theirs("perplexity", *kld_theirs, self._logits)],
            ),
            "base + kld": (
                [["rm", "-f", ours_base], self._eval("-m", quant, *compare, "--base-file", ours_base)],
                [make_theirs, self._theirs("perplexity", *kld_theirs, theirs_base)],
            ),
            "quantize": (
                [[self._bitladder, "quantize", "-q", "-m", model, *imatrix, "-o", self._path("c.gguf"), "Q4_K_M"]],
                [self._theirs("quantize", *imatrix, model, self._path("d.gguf"), "Q4_K_M")],
            ),
        }
        return jobs[name]

    def _rungs(self) -> tuple[str, ...]:
        from bitladder.quantize import RUNGS

        return RUNGS

    def _questions(self, name: str) -> tuple[list[Command], list[Command]] | None:
        source: pathlib.Path | None = getattr(self._options, name)
        if source is None:
            return None
        flag, file_flag, suffix = TASKS[name]
        file = self._work / f"{name}.{suffix}"
        if not file.exists():
            self._run([self._bitladder, "tasks", f"{name}:{source}", "-q", "-o", str(file)])
        common, count = ["-m", self._model, "-c", str(TASK_CTX)], str(self._options.task_count)
        theirs = [*common, f"--{flag}", f"--{flag}-tasks", count, file_flag, str(file), "-np", str(SEQUENCES)]
        ours = self._eval(*common, "--tasks", f"{name}:{file}", "--task-count", count)
        return [ours], [self._theirs("perplexity", *theirs, "--no-escape")]


def compare(
    name: str, ours: list[Command], theirs: list[Command], repeats: int, environment: dict[str, str]
) -> dict[str, object]:
    """Interleaves two jobs and returns medians and ratios. The environment is that of theirs."""
    sides = Side(dict(os.environ)), Side(environment)
    for index in range(repeats):
        # The order alternates too: the second of a pair finds warmer caches.
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            sides[which].run(*(ours, theirs)[which])
    seconds = [statistics.median(side.seconds) for side in sides]
    megabytes = [statistics.median(side.megabytes) for side in sides]
    pairs = sorted(a / b for a, b in zip(sides[0].seconds, sides[1].seconds, strict=True))
    ratio = seconds[0] / seconds[1]
    return {
        "job": name,
        "seconds_ours": round(seconds[0], 2),
        "seconds_theirs": round(seconds[1], 2),
        "time_ratio": round(ratio, 3),
        "time_ratio_of_pairs": [round(pair, 3) for pair in pairs],
        "target": TARGETS[name],
        "met": ratio <= TARGETS[name],
        "megabytes_ours": round(megabytes[0]),
        "megabytes_theirs": round(megabytes[1]),
        "memory_ratio": round(megabytes[0] / megabytes[1], 3),
        "repeats": repeats,
        "load": round(os.getloadavg()[0], 2),
    }


def profiled(ours: list[Command], out: pathlib.Path) -> dict[str, float]:
    """Where the time of our job goes, seconds by part. Commands that are not ours are only run."""
    total: dict[str, float] = {}
    for command in ours:
        if command[0] == "rm":
            subprocess.run(command, check=True)
            continue
        words = command[1:]
        profile = [sys.executable, str(HERE / "profile_parts.py"), str(out), *words]
        subprocess.run(profile, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for part, seconds in json.loads(out.read_text()).items():
            total[part] = round(total.get(part, 0) + seconds, 3)
    return total


def shown(row: dict[str, Any]) -> str:
    """A row of the table."""
    pairs = row["time_ratio_of_pairs"]
    return (
        f"{row['job']:11} {row['seconds_ours']:8.2f} s {row['seconds_theirs']:8.2f} s  × {row['time_ratio']:.3f} "
        f"({pairs[0]:.2f} – {pairs[-1]:.2f})  ≤ {row['target']:<5} {'met' if row['met'] else 'MISSED':7}"
        f"{row['megabytes_ours']:7.0f} MB {row['megabytes_theirs']:7.0f} MB  × {row['memory_ratio']:.3f}"
    )


def help_seconds(count: int) -> float:
    """The median time of `bitladder --help`."""
    bitladder, found = str(pathlib.Path(sys.executable).with_name("bitladder")), []
    for _ in range(count):
        started = time.perf_counter()
        subprocess.run([bitladder, "--help"], check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - started)
    return round(statistics.median(found), 3)


def load(out: pathlib.Path, key: dict[str, Any]) -> dict[str, Any]:
    """What was measured of the same before, or nothing."""
    if out.exists():
        kept: dict[str, Any] = json.loads(out.read_text())
        if {name: kept.get(name) for name in key} == key:
            return kept
    return key | {"jobs": []}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="full-precision GGUF")
    parser.add_argument("--text", type=pathlib.Path, required=True, help="text to measure on")
    parser.add_argument("--calibration", type=pathlib.Path, help="calibration text; the text by default")
    parser.add_argument("--hellaswag", type=pathlib.Path, help="questions of HellaSwag, a file or a folder")
    parser.add_argument("--mmlu", type=pathlib.Path, help="questions of MMLU, a file or a folder")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--task-count", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help=f"comma-separated jobs: {', '.join(TARGETS)}, help")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks/results/ratios.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if not os.environ.get("LLAMA_CPP_TOOLS"):
        sys.exit("set LLAMA_CPP_TOOLS to the folder with llama-imatrix, llama-perplexity and llama-quantize")
    tools = pathlib.Path(os.environ["LLAMA_CPP_TOOLS"])
    wanted = [name.strip() for name in options.only.split(",")] if options.only else [*TARGETS, "help"]
    if unknown := [name for name in wanted if name not in TARGETS and name != "help"]:
        sys.exit(f"no job {', '.join(unknown)}")
    names = {name: path and path.name for name, path in vars(options).items() if isinstance(path, pathlib.Path | None)}
    key = {name: names[name] for name in ("model", "text", "calibration")}
    key |= {"chunks": options.chunks, "task_count": options.task_count, "versions": versions()}
    result = load(options.out, key)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'job':11} {'ours':>10} {'theirs':>10}  {'ratio (of pairs)':>22}  {'target':16}{'ours':>10} {'theirs':>10}")
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(options, pathlib.Path(folder), tools)
        sizes = jobs.prepare(wanted) if wanted != ["help"] else {}
        if sizes:
            result["base_bytes"] = sizes
        for name in TARGETS:
            commands = jobs.of(name) if name in wanted else None
            if commands is None:
                if name in wanted:
                    print(f"{name:11} not measured: give --{name}")
                continue
            row = compare(name, *commands, options.repeats, jobs.environment)
            print(shown(row), flush=True)
            if not row["met"]:
                row["profile"] = profiled(commands[0], pathlib.Path(folder) / "profile.json")
                print(f"{'':11} {line(row['profile'])}", flush=True)  # type: ignore[arg-type]
            others = [other for other in result["jobs"] if other["job"] != name]
            result["jobs"] = sorted([*others, row], key=lambda each: list(TARGETS).index(each["job"]))
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    if "help" in wanted:
        result["help_seconds"] = help_seconds(2 * options.repeats + 1)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        outcome = "met" if result["help_seconds"] <= HELP else "MISSED"
        print(f"{'--help':11} {result['help_seconds']:8.3f} s  ≤ {HELP} s {outcome}")
    if "base_bytes" in result:
        ours, theirs = result["base_bytes"]["ours"], result["base_bytes"]["theirs"]
        print(f"base file   {ours / 1e6:8.1f} MB {theirs / 1e6:7.1f} MB  1/{theirs / ours:.1f}")
    missed = [row["job"] for row in result["jobs"] if not row.get("met", True)]
    print(f"missed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()

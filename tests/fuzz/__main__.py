"""`python -m fuzz`: every parser for some minutes of the CPU. Inputs that break the rule are kept; the exit code is 1.

Each parser runs in a process of its own, under atheris (pip install 'bitladder[fuzz]'). An input that breaks the rule
is kept with its traceback, one for each line of code that it comes from, and the search goes on. If the process dies,
hangs in native code or takes too much memory, its input is kept too, and another process goes on.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from typing import TYPE_CHECKING

from fuzz.mutations import structured

if TYPE_CHECKING:
    from fuzz import rule

_WALL = 60  # seconds for one input, for a hang in native code, where no signal handler of Python runs
_LEAST = 4096  # bytes that an input may grow to


def _parsers() -> "dict[str, rule.Parser]":
    """All parsers by name. It imports bitladder, which the process that fuzzes does under atheris."""
    from fuzz import documents, parsers

    return {parser.name: parser for parser in (*parsers.ALL, *documents.ALL)}


def main() -> int:
    """Parses the command line and runs."""
    parse = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.splitlines()[0])
    parse.add_argument("parsers", nargs="*", metavar="PARSER", help="which of them  [default: all]")
    parse.add_argument("--minutes", type=float, default=1.0, help="of the CPU, for each parser  [default: 1]")
    parse.add_argument("--work", type=pathlib.Path, default=pathlib.Path(".fuzz"), help="folder of corpus and finds")
    parse.add_argument("--record", type=pathlib.Path, help="JSON lines: one is added for each parser that was fuzzed")
    parse.add_argument("--replay", type=pathlib.Path, nargs="+", metavar="FIND", help="run kept inputs again")
    parse.add_argument("--worker", help=argparse.SUPPRESS)
    options = parse.parse_args()
    work = options.work.resolve()
    if options.worker:
        _work(options.worker, work, options.minutes * 60)
    known = _parsers()
    if unknown := set(options.parsers) - set(known):
        parse.error(f"there is no parser {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.replay:
        return _replay(options.replay, work)
    names = options.parsers or list(known)
    if any(known[name].prepares for name in names):
        from fuzz import documents

        documents.prepare(work / "prepared")
    results = [_fuzz(name, work, options.minutes * 60, options.record) for name in names]
    return int(any(results))


def _scratch() -> tempfile.TemporaryDirectory[str]:
    memory = pathlib.Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None)


def _replay(paths: list[pathlib.Path], work: pathlib.Path) -> int:
    """Runs kept inputs again; their folder names the parser."""
    from fuzz import rule

    broken = 0
    for path in paths:
        parser = _parsers()[path.resolve().parent.name]
        if parser.prepares:
            from fuzz import documents

            documents.prepare(work / "prepared")
        with _scratch() as scratch:
            place = rule.Place(work / "prepared", pathlib.Path(scratch))
            try:
                taken = rule.apply(parser, place, path.read_bytes())
                print(f"{path}: {'taken' if taken else 'refused, as it should be'}")
            except Exception:
                broken += 1
                print(f"{path}:\n{traceback.format_exc()}")
    return int(broken > 0)


def _fuzz(name: str, work: pathlib.Path, seconds: float, record: pathlib.Path | None) -> int:
    """Fuzzes a parser in processes of its own until its time is over. Returns the number of kinds of finds."""
    finds = work / "finds" / name
    finds.mkdir(parents=True, exist_ok=True)
    (work / "corpus" / name).mkdir(parents=True, exist_ok=True)
    spent, count, deaths = 0.0, 0, 0
    while spent < seconds and deaths < 20:
        with _scratch() as scratch, (work / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "fuzz", "--worker", name, "--work", str(work)]
            command += ["--minutes", str((seconds - spent) / 60)]
            worker = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"FUZZ_SCRATCH": scratch})
            _, status, usage = os.wait4(worker.pid, 0)
            worker.returncode = os.waitstatus_to_exitcode(status)
            report = pathlib.Path(scratch) / "report.json"
            done = json.loads(report.read_text()) if report.exists() else {"inputs": 0, "complete": False}
            count += done["inputs"]
            spent += max(usage.ru_utime + usage.ru_stime, 1.0)
            if not done["complete"]:
                deaths += 1
                last = pathlib.Path(scratch) / "input"
                if last.exists():
                    shutil.copy(last, finds / f"death-{deaths}")
    kinds = sorted(path.name for path in finds.iterdir() if not path.name.endswith(".txt"))
    corpus = len(list((work / "corpus" / name).iterdir()))
    line = f"{name:14} {count:9,} inputs  {spent / 60:5.1f} CPU minutes  {corpus:5} in the corpus  "
    print(line + (f"FINDS: {', '.join(kinds)}" if kinds else "no find"), flush=True)
    if record is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
        result = {"parser": name, "commit": commit.stdout.strip(), "cpu_minutes": round(spent / 60, 1), "inputs": count}
        with record.open("a") as stream:
            print(json.dumps(result | {"corpus": corpus, "finds": kinds}), file=stream)
    return len(kinds)


def _work(name: str, work: pathlib.Path, seconds: float) -> None:
    """The process that fuzzes one parser. It does not return."""
    import atheris

    scratch = pathlib.Path(os.environ["FUZZ_SCRATCH"])
    (scratch / "files").mkdir()
    finds = work / "finds" / name
    with atheris.instrument_imports(include=["bitladder", "yaml", "tomllib"], exclude=["bitladder.rounding"]):
        from fuzz import rule

        parser = _parsers()[name]
        place = rule.Place(work / "prepared", scratch / "files")
        seeds = parser.inputs(place)
        for seed in seeds:  # the doors of packages import a name when it is first used
            rule.apply(parser, place, seed)
    inputs, begun = 0, time.process_time()

    def report(complete: bool) -> None:
        (scratch / "report.json").write_text(json.dumps({"inputs": inputs, "complete": complete}))

    def once(data: bytes) -> None:
        nonlocal inputs
        inputs += 1
        (scratch / "input").write_bytes(data)
        if not inputs % 100:
            report(complete=False)
        try:
            rule.apply(parser, place, data)
        except Exception as error:
            _keep(finds / rule.signature(error), data, error)
            if rule.memory() > rule.BYTES:  # the peak stays, and so would the find
                os._exit(1)
        if time.process_time() - begun > seconds:
            report(complete=True)
            os._exit(0)

    def mutator(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = structured(data[1:], rng) if rng.random() < 0.5 else None
        return (data[:1] + changed)[:longest] if changed else atheris.Mutate(data, longest)

    corpus = work / "corpus" / name
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    longest = max(_LEAST, *(2 * len(seed) for seed in seeds))
    flags = [f"-max_len={longest}", f"-timeout={_WALL}", "-rss_limit_mb=0", "-verbosity=0"]
    flags += [f"-artifact_prefix={scratch}/", f"-seed={int(time.time())}"]
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    atheris.Setup([sys.argv[0], *flags, str(corpus)], once, custom_mutator=mutator)
    atheris.Fuzz()


def _keep(path: pathlib.Path, data: bytes, error: Exception) -> None:
    """Keeps the shortest input of its kind, and its traceback."""
    if not path.exists() or path.stat().st_size > len(data):
        path.write_bytes(data)
        text = "".join(traceback.format_exception(error))
        path.with_name(f"{path.name}.txt").write_text(text, errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())

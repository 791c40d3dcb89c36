"""A Dask cluster on loopback for tests: a scheduler, and workers with nannies, each a process of its own.

A worker dies in the middle of the first task of some kinds (`KINDS`), once each. Its nanny starts another one.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

# Verb of a step, and the method that a worker calls: all kinds of work that a run has for workers.
KINDS = {
    "base-make",
    "imatrix-make",
    "moments-collect_text",
    "trial-make",
    "price-render",
    "price-measure",
    "plan-make",
    "preset-make",
    "naive-make",
    "round-render",
    "quantize-make",
    "measure-make",
}
DEATHS = "BITLADDER_TEST_DEATHS"  # names the folder with a file for each death that is to come


@contextlib.contextmanager
def dask_cluster(folder: pathlib.Path, kinds: Iterable[str], workers: int = 2) -> Iterator[tuple[str, pathlib.Path]]:
    """The scheduler file of a cluster, and the folder with a file for each kind in which a worker is still to die."""
    deaths = folder / "deaths"
    deaths.mkdir(parents=True)
    for kind in kinds:
        (deaths / kind).touch()
    place = folder / "scheduler.json"
    here = pathlib.Path(__file__)
    paths = [str(here.parent), *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)]
    environment = os.environ | {DEATHS: str(deaths), "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    plain = ["--no-dashboard", "--scheduler-file", str(place)]
    commands = [["dask_scheduler", "--host", "127.0.0.1", "--port", "0", *plain]]
    for number in range(workers):
        alone = ["--nthreads", "1", "--memory-limit", "0", "--local-directory", str(folder / f"worker-{number}")]
        commands.append(["dask_worker", *alone, "--preload", str(here), *plain])
    started = []
    try:
        for name, *arguments in commands:
            with (folder / f"{name}-{len(started)}.log").open("w") as log:
                command = [sys.executable, "-m", f"distributed.cli.{name}", *arguments]
                started.append(
                    subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder, process_group=0)
                )
            while not place.is_file():
                assert started[0].poll() is None, (folder / "dask_scheduler-0.log").read_text()
                time.sleep(0.1)
        from distributed import Client

        with Client(scheduler_file=str(place), set_as_default=False) as client:
            client.wait_for_workers(workers)
        yield str(place), deaths
    finally:
        for process in started[::-1]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a nanny and its worker
            process.wait()


def dask_setup(worker: object) -> None:
    """Called in each worker (--preload)."""
    from bitladder.ladder import spread

    work_on, at_work = spread.work_on, [""]
    deaths, counts = pathlib.Path(os.environ[DEATHS]), dict[str, int]()

    def die() -> None:
        with contextlib.suppress(FileNotFoundError):
            (deaths / at_work[0]).unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def notice(event: str, arguments: tuple[object, ...]) -> None:
        """Dies before the second file that a task renames or adds to."""
        added = event == "open" and len(arguments) > 1 and str(arguments[1]).startswith("a")
        if at_work[0] and (added or event == "os.rename"):
            counts[at_work[0]] = counts.get(at_work[0], 0) + 1
            if counts[at_work[0]] == 2:
                die()

    def dying(state: object, step: str, method: str, *arguments: object) -> object:
        kind = f"{step.split(maxsplit=1)[0]}-{method}"
        at_work[0] = kind if (deaths / kind).exists() else ""
        counts.clear()
        done = work_on(state, step, method, *arguments)
        if at_work[0]:
            die()  # a task of few files dies with its result
        at_work[0] = ""
        return done

    sys.addaudithook(notice)
    spread.work_on = dying

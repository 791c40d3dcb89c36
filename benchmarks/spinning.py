"""How long idle threads spin after work that several threads shared: CPU time that is taken from other work.

    python benchmarks/spinning.py MODEL.gguf [--threads 2] [--regions 20]

Each of three pools works for a moment, and then the main thread sleeps. CPU time that the process takes meanwhile is
of threads that wait for the next piece of work: NumPy's OpenBLAS, torch, and the library. It is shown for each moment
of work, with OMP_WAIT_POLICY as it is and "passive", beside the CPU seconds of the work. `single` is NumPy under
`single_threaded`, where one thread multiplies and none waits. The last column names the shared libraries with OpenMP in
the process: with two of them, each keeps threads of its own.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

POOLS = ("numpy", "single", "torch", "library", "library, then torch")
SLEEP = 0.3


def work_of(pool: str, model: str, threads: int) -> Callable[[], object]:
    """A moment of work of a pool."""
    if pool in ("numpy", "single"):
        from bitladder.engine import single_threaded

        rows = np.random.default_rng(0).standard_normal((512, 1024), np.float32)

        def multiply() -> object:
            return rows.T @ rows

        def alone() -> object:
            with single_threaded():
                return rows.T @ rows

        return multiply if pool == "numpy" else alone
    works: list[Callable[[], object]] = []
    if "library" in pool:
        from bitladder.engine import Context, Decoding, Model

        loaded = Model(pathlib.Path(model))
        context = Context(loaded, Decoding(n_ctx=64, n_batch=64, n_ubatch=64, threads=threads))
        tokens, none = np.ones(64, np.int32), np.zeros(64, np.int32)

        def decode() -> object:
            context.clear()
            context.decode(tokens, np.arange(64, dtype=np.int32), none, np.ones(64, np.bool_))
            return context.logits().sum()

        works.append(decode)
    if "torch" in pool:
        import torch

        torch.set_num_threads(threads)
        inputs = torch.randn(512, 1024)
        works.append(lambda: torch.tanh(inputs.T @ inputs))
    return lambda: [work() for work in works]


def child(pool: str, model: str, threads: int, regions: int) -> None:
    """Prints CPU seconds of work and of the sleep after it, for each moment of work."""
    work = work_of(pool, model, threads)
    for _ in range(3):
        work()
    busy = idle = 0.0
    for _ in range(regions):
        before = time.process_time()
        work()
        after = time.process_time()
        time.sleep(SLEEP)
        busy, idle = busy + after - before, idle + time.process_time() - after
    maps = pathlib.Path("/proc/self/maps").read_text().split()
    names = sorted({pathlib.Path(path).parent.name + "/" + pathlib.Path(path).name for path in maps if "omp" in path})
    print(json.dumps({"work_ms": 1e3 * busy / regions, "spin_ms": 1e3 * idle / regions, "openmp": names}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a small GGUF")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--regions", type=int, default=20)
    parser.add_argument("--pool", choices=POOLS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pool:
        child(options.pool, options.model, options.threads, options.regions)
        return
    print(f"{'pool':20} {'OMP_WAIT_POLICY':16} {'work, CPU ms':>13} {'spin, CPU ms':>13}  libraries with OpenMP")
    for pool in POOLS:
        for policy in ("", "passive"):
            environment = os.environ | ({"OMP_WAIT_POLICY": policy} if policy else {})
            command = [sys.executable, __file__, options.model, "--pool", pool, "--threads", str(options.threads)]
            command += ["--regions", str(options.regions)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            row = json.loads(done.stdout.splitlines()[-1])
            libraries = ", ".join(row["openmp"]) or "none"
            print(
                f"{pool:20} {policy or '–':16} {row['work_ms']:13.2f} {row['spin_ms']:13.2f}  {libraries}", flush=True
            )


if __name__ == "__main__":
    main()

"""Where the time of a command goes: loading, tokenizing, decoding, scoring, quantizing, writing, and the rest.

    python benchmarks/profile_parts.py OUT.json eval -m F16.gguf -f wiki.test.raw --chunks 40
    python benchmarks/profile_parts.py OUT.json SCRIPT.py ARGUMENT …

The rest of the line is a command of bitladder, or a script. A thread looks every 5 ms at what the main thread does: the
innermost function of the product, or of Python's import, that PARTS names. Time between two looks counts for the
second. Where the main thread waits for others, it counts for what they were given to do, or, in lanes, are doing.
"""

import collections
import json
import pathlib
import runpy
import sys
import threading
import time
import types

EVERY = 0.005
LANES = "lanes"  # the main thread waits for them: their threads are looked at instead
# A part of a file's path, names of functions in it (none: all), and the part of the time. The first that fits counts.
PARTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("importlib", (), "import"),
    ("engine/native.py", ("_open", "_import_bindings", "check_abi"), "import"),
    ("engine/model.py", ("tokenize", "tokens"), "tokenize"),
    ("text/chunks.py", (), "tokenize"),
    ("tasks/scored_choices.py", ("tokenize_question",), "tokenize"),
    ("engine/cpu_kernels.py", (), "check of the kernels"),
    ("engine/model.py", ("__init__", "close"), "load"),
    ("engine/context.py", ("__init__", "close"), "load"),
    ("engine/context.py", (), "decode"),
    ("engine/observe.py", (), "decode"),
    ("evaluate/identity.py", ("decode",), "decode"),
    ("calibrate/collect_imatrix.py", ("see", "_sum_rows"), "sums"),
    ("calibrate/moments", ("see", "_add", "add_tokens"), "sums"),
    ("files.py", ("sha256_file", "sha256_bytes"), "hash"),
    ("evaluate/identity.py", (), "hash"),
    ("evaluate/divergence.py", (), "score"),
    ("evaluate/token_scores.py", ("score",), "score"),
    ("evaluate/base/hidden.py", (), "score"),
    ("evaluate/base/logits", (), "score"),
    ("tasks/", (), "score"),
    ("gguf/writer.py", (), "write"),
    ("calibrate/imatrix.py", (), "write"),
    ("evaluate/base/basefile.py", (), "write"),
    ("files.py", (), "write"),
    ("quantize/write_quant.py", (), "quantize"),
    ("engine/types.py", (), "quantize"),
    ("quantize/", (), "prepare"),
    ("engine/presets.py", (), "prepare"),
    ("gguf/", (), "read"),
    ("engine/lanes.py", ("_side_by_side",), LANES),
    ("show/", (), "show"),
    ("text/", (), "text"),
)


def in_lane(frame: types.FrameType | None) -> bool:
    """Whether a stack is that of a lane's thread."""
    while frame is not None:
        if "engine/lanes.py" in frame.f_code.co_filename and frame.f_code.co_name == "follow":
            return True
        frame = frame.f_back
    return False


def part_of(frame: types.FrameType | None) -> str:
    """The part of the time that a stack belongs to."""
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        for place, names, part in PARTS:
            if place in path and (not names or name in names):
                return part
        frame = frame.f_back
    return "other"


class Looks:
    """A thread that adds up the time of parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._main = threading.main_thread().ident or 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        last = time.perf_counter()
        while not self._over.wait(EVERY):
            frames, now = sys._current_frames(), time.perf_counter()
            looked_at = [frames.get(self._main)]
            if part_of(looked_at[0]) == LANES:  # the main thread waits for the lanes
                looked_at = [each for each in frames.values() if in_lane(each)] or looked_at
            for frame in looked_at:
                self.seconds[part_of(frame)] += (now - last) / len(looked_at)
            last = now

    def __enter__(self) -> "Looks":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def line(seconds: dict[str, float]) -> str:
    """The parts in a line, the largest first; those below 1 % are left out."""
    total = sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {value:.2f} s ({value / total:.0%})" for name, value in parts if value >= total / 100)


def main() -> None:
    out, command = pathlib.Path(sys.argv[1]), sys.argv[2:]
    with Looks() as looks:
        try:
            if command[0].endswith(".py"):
                sys.argv = command
                runpy.run_path(command[0], run_name="__main__")
            else:
                from bitladder.cli import invoke

                code = invoke(command)
                if code:
                    sys.exit(code)
        finally:
            out.write_text(json.dumps(looks.seconds) + "\n")


if __name__ == "__main__":
    main()

"""Stand-ins for the stages of a run, which write small files and count how often, and the inputs of such a run."""

import hashlib
import json
import pathlib
import struct
import sys
import time
from unittest import mock

import numpy as np
from plain_options import plain_options

from bitladder.calibrate import Imatrix, ImatrixEntry, ImatrixResult, write_imatrix
from bitladder.convert import ConvertResult
from bitladder.engine import type_by_name
from bitladder.evaluate import Figure, Measurement, Scores, SpeedRow
from bitladder.evaluate.scores import BaseModelName, DeltaP, Divergence, NamedFile
from bitladder.files import replacing
from bitladder.gguf import GgufWriter, TensorPlan, string
from bitladder.quantize import QuantizeResult

RUNGS = ("IQ3_S", "Q4_K_M", "Q8_0")
SCORES = ["score base", *(f"score {rung}" for rung in RUNGS)]
ALL_STEPS = ["convert", "memory", "base", "measure base", "imatrix"]
ALL_STEPS += [f"{verb} {rung}" for rung in RUNGS for verb in ("quantize", "measure")]
ALL_STEPS += ["bench", *SCORES]


class Fakes:
    """Stand-ins whose output is a hash of their input, written in pieces over `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.scored: list[str] = []
        self.copied: dict[str, list[str]] = {}  # of each rung, the files that it may copy from

    def write(self, path, *parts):
        digest = hashlib.sha256(b"|".join(parts)).digest()
        with replacing(path) as temporary, temporary.open("wb") as stream:
            for _ in range(8):
                stream.write(digest * 100)
                stream.flush()
                time.sleep(self.seconds / 8)

    def convert(self, model, out, *, outtype, progress, **others):
        weights = hashlib.sha256((model / "model.safetensors").read_bytes() + outtype.encode()).digest()
        metadata = {"general.architecture": string("llama"), "general.basename": string("Toy"),
                    "general.size_label": string("64"), "general.license": string("mit")}  # fmt: skip
        with replacing(out) as temporary, temporary.open("wb") as stream:
            writer = GgufWriter(stream, metadata, [TensorPlan("a.weight", (32, 2), type_by_name("f16"))])
            time.sleep(self.seconds)
            writer.write("a.weight", np.frombuffer(weights * 4, np.uint8))
            writer.finish()
        return ConvertResult(out, "llama", "f16", 1, out.stat().st_size)

    def make_base(self, model, text, out, settings, progress):
        self.write(out, model.read_bytes(), text.text.encode(), str((settings.n_ctx, settings.chunks)).encode())

    def collect(self, model, texts, out, *, reading, decoding, options, progress):
        n_ctx = decoding.n_ctx
        settings = str((n_ctx, reading.chunks)).encode()
        read = b"|".join([model.read_bytes(), *(text.text.encode() for text in texts), settings])
        # A matrix that can be read: the report shows what it says.
        sums = np.frombuffer(hashlib.sha256(read).digest(), np.uint8).astype(np.float32)[None]
        time.sleep(self.seconds)
        write_imatrix(
            Imatrix({"a.weight": ImatrixEntry(sums, np.array([n_ctx]))}, [text.name for text in texts], 5, n_ctx), out
        )
        return ImatrixResult(out, 7, 5, {})

    def quantize(self, source, out, options, *, imatrix, threads, progress, same=()):
        preset = options.preset
        self.copied[preset] = [path.name for path in same]
        self.write(out, source.read_bytes(), imatrix.read_bytes(), preset.encode())
        return QuantizeResult(out, out.stat().st_size, 4.5, {"a.weight": preset.lower()}, preset)

    def open_base(self, path, text, settings, model):
        return mock.Mock(content=path.read_bytes(), model=model)

    def measure_base(self, base, text, settings):
        options = {"n_ctx": settings.n_ctx, "chunks": settings.chunks, "threads": None, "gpu_layers": 0}
        return Measurement(self.evaluate(base.model, text, base=None, progress=None, **options), {})

    def evaluate(self, model, text, *, base, n_ctx, chunks, threads, gpu_layers, progress):
        self.scored.append(model.name)
        content = model.read_bytes() + text.text.encode() + (base.content if base else b"")
        time.sleep(self.seconds)
        number = hashlib.sha256(content).digest()[0] / 1000
        figure = Figure(value=0.5 + number, error=0.01)
        names = "max p999 p99 p95 p90 p75 median p25 p10 p05 p01 p001 min"
        spread = dict.fromkeys(names.split(), 0.1)
        divergence = {key: value for key, value in spread.items() if key not in ("p75", "p25")}
        compared = {
            "base": BaseModelName(model="Toy-64-F16.gguf", sha256="ab"), "rho_ppl": 0.99, "same_top_p": figure,
            "kld": Divergence(value=0.1 + number, error=0.01, **divergence),
            "delta_p": DeltaP(mean=figure, rms=figure, **spread),
        }  # fmt: skip
        return Scores(
            model=model.name, sha256=hashlib.sha256(model.read_bytes()).hexdigest(), bytes=model.stat().st_size,
            bpw=4.5, text=NamedFile(name=text.name, sha256=text.sha256), n_ctx=n_ctx, chunks=min(chunks or 3, 3),
            tokens_scored=765, ppl=figure, versions={"bitladder": "0.1.0"},
            **(compared if base else {}),
        )  # fmt: skip

    def measure(self, model, text, settings, *, base, progress):
        options = {name: getattr(settings, name) for name in ("n_ctx", "chunks", "threads", "gpu_layers")}
        scores = self.evaluate(model, text, base=base, progress=progress, **options)
        return Measurement(scores, {"nll": np.zeros(scores.tokens_scored), "kld": np.zeros(scores.tokens_scored)})

    def bench(self, models, tests, options, progress):
        time.sleep(self.seconds)
        samples = {path: 1_000_000 * path.read_bytes()[-1] + 1 for path in models}
        return [
            SpeedRow(path.name, "toy", 64, 64, test, options, 2, "CPU", "cpu", "", "2026", (samples[path],) * 2)
            for path in models for test in tests
        ]  # fmt: skip

    def patched(self):
        """All heavy functions replaced, as a context."""
        stand_ins = {
            "bitladder.convert.convert": self.convert, "bitladder.evaluate.make_base": self.make_base,
            "bitladder.evaluate.measure": self.measure, "bitladder.evaluate.open_base": self.open_base,
            "bitladder.evaluate.identify": lambda path: path,
            "bitladder.evaluate.measure_base": self.measure_base, "bitladder.calibrate.collect_imatrix": self.collect,
            "bitladder.quantize.quantize": self.quantize, "bitladder.evaluate.bench": self.bench,
            "bitladder.plan.memory_beside_weights": lambda model, contexts, threads: dict.fromkeys(contexts, 10**6),
            "bitladder.ladder.run.check_texts": lambda steps, texts: None,  # the model has no vocabulary
        }  # fmt: skip
        return _Patches(stand_ins)


class _Patches:
    def __init__(self, stand_ins):
        self.patches = []
        for name, function in stand_ins.items():
            package, attribute = name.rsplit(".", 1)
            __import__(package)
            self.patches.append(mock.patch.object(sys.modules[package], attribute, function))

    def __enter__(self):
        for patch in self.patches:
            patch.start()

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()


def make_inputs(folder):
    """A checkpoint of one tensor, two texts, and the options that use them."""
    model = folder / "toy"
    model.mkdir()
    header = json.dumps({"w": {"dtype": "F16", "shape": [2, 32], "data_offsets": [0, 128]}}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(128))
    (model / "config.json").write_text("{}")
    for name in ("calibration.txt", "text.txt"):
        (folder / name).write_text(f"words of {name} " * 100)
    return inputs_of(folder)


def inputs_of(folder, out="out"):
    return plain_options(
        model=str(folder / "toy"), out=folder / out, rungs=RUNGS, texts=(str(folder / "text.txt"),),
        calibration=(str(folder / "calibration.txt"),),
    )  # fmt: skip


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file that has to be the same after the same run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("ladder.json", ".lock"):
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


class Listener:
    def __init__(self):
        self.infos, self.warnings = [], []

    def info(self, text):
        self.infos.append(text)

    def warn(self, text):
        self.warnings.append(text)

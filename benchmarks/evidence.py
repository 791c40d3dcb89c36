"""KLD of our quants against rivals at the same bytes, on texts that no calibration saw: the tables of docs/evidence.md.

    python benchmarks/evidence.py F16.gguf … --work DIR --calibration A --calibration B
        --text prose=wiki.test.raw --text code=pydoc:test --text german=de.txt
        [--rungs Q4_K_M,Q3_K_M] [--methods GROUP|NAME;…] [--chunks 16]
        [--file Q4_K_M:auto-round=FILE.gguf --how "auto-round=its command and cost"]
    python benchmarks/evidence.py          # docs/evidence.md from benchmarks/results/evidence-*.json alone

Each row is a file: made by a method of `evidence_methods` in at most the bytes of llama-quantize's, and measured on
each text as `bitladder eval` does. A row is written to benchmarks/results/evidence-MODEL.json when it is finished, and
is not made again while its model, texts, options and algorithms are the same. Files are deleted when they are
measured. Scores of tokens stay in DIR, for paired differences. CPU seconds are those of this process, all threads.
"""

import dataclasses
import functools
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import evidence_methods as methods
import evidence_page
import numpy as np
import numpy.typing as npt
from evidence_fit import fits

from bitladder.calibrate import ImatrixOptions, MomentsOptions, collect_imatrix, collect_moments
from bitladder.engine import Decoding, versions
from bitladder.errors import BitladderError
from bitladder.evaluate import (
    EvalRequest,
    Figure,
    Measurement,
    MeasureOptions,
    average,
    load_or_compute_base,
    load_task,
    measure_several,
    paired_mean,
    parse_specs,
)
from bitladder.files import sha256_file, write_json
from bitladder.keys import key_of
from bitladder.text import Reading, Text, load_text

Doubles = npt.NDArray[np.float64]

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "evidence.md"
RUNGS = "IQ2_XXS,IQ2_XS,IQ2_S,IQ2_M,Q2_K,IQ3_XXS,IQ3_XS,IQ3_S,IQ3_M,Q3_K_M,IQ4_XS,IQ4_NL,Q4_K_S,Q4_K_M,Q5_K_M,Q6_K,Q8_0"
TEXTS, CALIBRATION = ("code=pydoc:test",), ("pydoc:calibration",)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all rows of a model share.

    Parameters:
        calibration: text as it was named → text that is calibrated on.
        texts: domain → text that is measured on.
        first: a text that is measured on, as it was named.
        chunks: chunks of each text that are measured.
        imatrix_chunks: chunks of each calibration text for the one importance matrix of all methods.
        n_ctx: tokens of a chunk.
        threads: threads; they decide no result.
        tasks: benchmarks, as for `bitladder eval --tasks`.
        task_count: questions of each.
        task_rungs: rungs that are asked them.
    """

    calibration: dict[str, Text]
    texts: dict[str, Text]
    first: str
    chunks: int
    imatrix_chunks: int
    n_ctx: int
    threads: int
    tasks: str | None
    task_count: int
    task_rungs: tuple[str, ...]


class Evidence:
    """One model: its rows, and what methods need to make their files.

    Parameters:
        model: a full-precision GGUF.
        work: the folder of this model's files.
        settings: what all rows share.
    """

    def __init__(self, model: pathlib.Path, work: pathlib.Path, settings: Settings) -> None:
        self.model, self.work, self.settings = model, work, settings
        self.work.mkdir(parents=True, exist_ok=True)
        self.out = RESULTS / f"evidence-{model.stem}.json"
        self.calibration = list(settings.calibration.values())
        self.decoding = Decoding(n_ctx=settings.n_ctx, threads=settings.threads)
        self.sha256 = sha256_file(model)
        kept = json.loads(self.out.read_text()) if self.out.exists() else {}
        self.rows: list[dict[str, Any]] = kept.get("rows", []) if kept.get("sha256") == self.sha256 else []
        self.commands: list[str] = kept.get("commands", []) if self.rows else []
        self.cpu: dict[str, float] = {}

    @functools.cached_property
    def imatrix(self) -> pathlib.Path:
        """The importance matrix of all methods: the same bytes as of `bitladder run --imatrix-chunks`."""
        reading = Reading(chunks=self.settings.imatrix_chunks, spread=False)
        return self._collected("imatrix", reading, lambda out: collect_imatrix(
            self.model, self.calibration, out, reading=reading, decoding=self.decoding,
            options=ImatrixOptions(),
        ), self.calibration)  # fmt: skip

    def moments(self, weighting: str, chunks: int, *, held_out: bool = False) -> pathlib.Path:
        """Second moments of so many chunks of each text, with tokens weighted in one way.

        The texts are those of the calibration, or those that are measured on.
        """
        reading, options = Reading(chunks=chunks), MomentsOptions(weighting=weighting)
        texts = list(self.settings.texts.values()) if held_out else self.calibration
        return self._collected(f"moments-{weighting}{'-held-out' * held_out}", reading, lambda out: collect_moments(
            self.model, texts, out, reading=reading, decoding=self.decoding, options=options
        ), texts)  # fmt: skip

    def _collected(
        self, name: str, reading: Reading, collect: Callable[[pathlib.Path], object], texts: list[Text]
    ) -> pathlib.Path:
        """A file that is collected once for all rows. Its CPU seconds are kept, and stand in `cpu` under its name."""
        decides = {"name": name, "model": self.sha256, "reading": reading, "decoding": self.decoding}
        key = key_of({**decides, "texts": [text.sha256 for text in texts]})
        out, beside = self.work / f"{name}-{key[:12]}.gguf", self.work / f"{name}-{key[:12]}.seconds"
        if not beside.exists():
            began = time.process_time()
            collect(out)
            beside.write_text(f"{time.process_time() - began:.1f}")
        self.cpu[name] = float(beside.read_text())
        return out

    @functools.cached_property
    def request(self) -> EvalRequest:
        """What is measured of each file; the full-precision predictions are computed once and kept."""
        settings = MeasureOptions(**dataclasses.asdict(self.decoding) | {"chunks": self.settings.chunks})
        texts = tuple(self.settings.texts.values())
        bases = []
        for text in texts:
            kept = self.work / f"{text.sha256[:12]}.{self.settings.chunks}.base"
            bases.append(load_or_compute_base(self.model, text, settings, path=kept))
        tasks = tuple(load_task(spec) for spec in parse_specs(self.settings.tasks)) if self.settings.tasks else ()
        return EvalRequest(texts=texts, settings=settings, bases=tuple(bases), tasks=tasks,
                           task_settings=MeasureOptions(n_ctx=768, threads=self.settings.threads),
                           task_count=self.settings.task_count)  # fmt: skip

    def key(self, method: methods.Method, rung: str) -> str:
        """The hash of all that decides a row."""
        settings = self.settings
        return key_of(
            {
                "model": self.sha256,
                "method": [method.name, method.decides],
                "rung": rung,
                "calibration": [text.sha256 for text in settings.calibration.values()],
                "imatrix_chunks": settings.imatrix_chunks,
                "texts": [text.sha256 for text in settings.texts.values()],
                "measured": [settings.chunks, settings.n_ctx],
                "tasks": [settings.tasks, settings.task_count] if rung in settings.task_rungs else None,
                "algorithms": method.algorithms,
                "library": versions()["llama_cpp_commit"],
            }
        )

    def row(self, method: str, rung: str) -> dict[str, Any] | None:
        """The row of a method and a rung, or None."""
        return next((row for row in self.rows if row["method"] == method and row["rung"] == rung), None)

    def missing(self, method: methods.Method, rungs: tuple[str, ...]) -> tuple[str, ...]:
        """The rungs whose row is not there, or is of other options, texts or algorithms."""
        rows = {rung: self.row(method.name, rung) for rung in rungs}
        return tuple(rung for rung, row in rows.items() if row is None or row["key"] != self.key(method, rung))

    def add(self, method: methods.Method, quant: methods.Quant) -> None:
        """Measures a file, keeps its row, and deletes it unless somebody else made it."""
        request, rung = self.request, quant.rung
        if rung not in self.settings.task_rungs:
            request = dataclasses.replace(request, tasks=())
        key, began = self.key(method, rung), time.process_time()
        row: dict[str, Any] = {"rung": rung, "method": method.name, "group": method.group, "key": key}
        row |= {
            "how": method.how,
            "algorithms": method.algorithms,
            "facts": dict(quant.facts),
            "cpu": {k: round(v, 1) for k, v in quant.cpu.items()},
        }
        if quant.path is not None:
            (measured,) = measure_several([quant.path], request)
            row |= {"bytes": quant.path.stat().st_size, "sha256": measured.scores.sha256, **self._figures(measured)}
            self._keep(key, measured)
            if not quant.theirs:
                quant.path.unlink()
        row["measured_cpu"] = round(time.process_time() - began, 1)
        self.rows = [kept for kept in self.rows if kept["method"] != method.name or kept["rung"] != rung] + [row]
        self.save()
        shown = f"KLD {row['mean']['kld']['value']:.5f}" if "mean" in row else row["facts"].get("refused", "no file")
        seconds = f"{sum(quant.cpu.values()):.0f} + {row['measured_cpu']:.0f} s"
        sys.stderr.write(f"{self.model.stem} {rung} {method.name}: {shown}, {seconds}\n")

    def _figures(self, measured: Measurement) -> dict[str, Any]:
        """The figures on each text, and their means."""
        scores = measured.scores
        parts = scores.texts or (scores,)
        names = dict(zip(self.settings.texts, parts, strict=True)) | {"mean": scores}
        figures = {
            name: {
                "kld": part.kld and {
                    "value": part.kld.value, "error": part.kld.error, "p999": part.kld.p999, "median": part.kld.median,
                },
                "same_top_p": part.same_top_p and part.same_top_p.model_dump(),
                "ppl_ratio": part.ppl_ratio and part.ppl_ratio.model_dump(),
                "tokens": part.tokens_scored,
            }
            for name, part in names.items()
        }  # fmt: skip
        tasks = {name: score.accuracy.model_dump() for name, score in scores.tasks.items()}
        return {"texts": {name: figures[name] for name in self.settings.texts}, "mean": figures["mean"], "tasks": tasks}

    def _keep(self, key: str, measured: Measurement) -> None:
        """KLD of each token, for paired differences."""
        arrays = {
            f"{domain}.{name}": values.astype(np.float32)
            for domain, (_, values_of) in zip(self.settings.texts, measured.by_text, strict=True)
            for name, values in values_of.items()
            if name == "kld"
        }
        np.savez_compressed(self.work / f"{key[:24]}.npz", **arrays)

    def pair(self, row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
        """The ratio of mean KLD of two rows, and their difference, each with a ± from paired tokens; None if unknown.

        The error of the ratio r of a to b is to first order that of the mean of a − r b, over the mean of b.
        """
        files = [self.work / f"{each['key'][:24]}.npz" for each in (row, other)]
        if "mean" not in row or "mean" not in other or not all(path.exists() for path in files):
            return None
        mine, theirs = (dict(np.load(path)) for path in files)
        pairs = [(mine[name].astype(float), theirs[name].astype(float)) for name in theirs]
        if not pairs or mine.keys() != theirs.keys() or any(a.shape != b.shape for a, b in pairs):
            return None
        scored = self.settings.n_ctx - self.settings.n_ctx // 2 - 1  # tokens of a chunk; a short text has fewer chunks

        def gap(a: Doubles, b: Doubles) -> Figure:
            return paired_mean(a, b, len(a) // scored)

        below = average([Figure(value=float(b.mean()), error=0.0) for _, b in pairs]).value
        ratio = average([Figure(value=float(a.mean()), error=0.0) for a, _ in pairs]).value / below
        spread = average([gap(a, ratio * b) for a, b in pairs]).error
        difference = average([gap(a, b) for a, b in pairs])
        on_texts = {}
        for name, (a, b) in zip((name.removesuffix(".kld") for name in theirs), pairs, strict=True):
            own = float(a.mean() / b.mean())
            error = gap(a, own * b).error / float(b.mean())
            on_texts[name] = {"value": own, "error": error}
        return {
            "with": other["method"],
            "ratio": {"value": ratio, "error": spread / below},
            "difference": difference.model_dump(),
            "texts": on_texts,
        }

    def save(self) -> None:
        """Writes the JSON file: rows, their pairs, and all that repeats them."""
        for row in self.rows:
            reference = self.row(methods.REFERENCE, row["rung"])
            if reference not in (None, row) and (pair := self.pair(row, reference)) is not None:
                row["paired"] = pair
            whole = self.row(methods.WHOLE, row["rung"])
            if row["group"] == "parts" and whole is not None and (pair := self.pair(row, whole)) is not None:
                row["paired_with_whole"] = pair
        known, settings = versions(), self.settings
        write_json(
            self.out,
            {
                "model": self.model.name,
                "sha256": self.sha256,
                "bytes": self.model.stat().st_size,
                "commands": self.commands,
                "calibration": [{"name": text.name, "sha256": text.sha256} for text in settings.calibration.values()],
                "imatrix_chunks": settings.imatrix_chunks,
                "texts": {domain: {"name": t.name, "sha256": t.sha256} for domain, t in settings.texts.items()},
                "chunks": settings.chunks,
                "n_ctx": settings.n_ctx,
                "seeds": methods.SEEDS,
                "versions": known,
                "rows": sorted(self.rows, key=lambda row: (row["rung"], row["method"])),
            },
        )


def others_of(files: tuple[str, ...], hows: tuple[str, ...]) -> list[tuple[str, methods.Method, pathlib.Path]]:
    """RUNG:NAME=FILE as rung, method and file; NAME=TEXT says how the files of a name were made."""
    others, made = [], dict(how.split("=", 1) for how in hows if "=" in how)
    for spec in files:
        place, equals, path = spec.partition("=")
        rung, colon, name = place.partition(":")
        if not (equals and colon and pathlib.Path(path).is_file()):
            raise click.UsageError(f"--file {spec}: write RUNG:NAME=FILE, with a file that is there")
        method = methods.of_somebody(name, made.get(name), sha256_file(pathlib.Path(path)))
        others.append((rung.upper(), method, pathlib.Path(path)))
    return others


@click.command()
@click.argument("models", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path))
@click.option("--work", type=click.Path(path_type=pathlib.Path), default=pathlib.Path("evidence.work"))
@click.option("--rungs", default=RUNGS)
@click.option("--methods", "chosen", default="rivals;ours", help="Groups and names, separated by semicolons.")
@click.option("--calibration", multiple=True, default=CALIBRATION)
@click.option("--text", "texts", multiple=True, default=TEXTS, help="DOMAIN=TEXT, of a domain that no calibration saw.")
@click.option("--chunks", default=16)
@click.option("--imatrix-chunks", default=48)
@click.option("-c", "n_ctx", default=512)
@click.option("-t", "threads", default=2)
@click.option("--tasks")
@click.option("--task-count", default=100)
@click.option("--task-rungs", default="Q4_K_M")
@click.option("--file", "files", multiple=True, help="RUNG:NAME=FILE: a quant that somebody else made.")
@click.option("--how", "hows", multiple=True, help="NAME=TEXT: how the files of a name were made.")
def main(
    models: tuple[pathlib.Path, ...],
    work: pathlib.Path,
    rungs: str,
    chosen: str,
    calibration: tuple[str, ...],
    texts: tuple[str, ...],
    chunks: int,
    imatrix_chunks: int,
    n_ctx: int,
    threads: int,
    tasks: str | None,
    task_count: int,
    task_rungs: str,
    files: tuple[str, ...],
    hows: tuple[str, ...],
) -> None:
    """Makes the rows that are missing, and writes docs/evidence.md."""
    words = {word.strip() for word in chosen.split(";")}
    every = [*methods.all_methods(), *fits()]
    used = [method for method in every if {method.group, method.name} & words]
    if unknown := words - {name for method in every for name in (method.group, method.name)}:
        raise click.UsageError(f"--methods: there is no {min(unknown)}; there are {methods.listed(every)}")
    names = tuple(rungs.upper().split(","))
    for model in models:
        settings = Settings(
            {spec: load_text(spec, model) for spec in calibration},
            {domain: load_text(spec, model) for domain, _, spec in (text.partition("=") for text in texts)},
            texts[0].partition("=")[2], chunks, imatrix_chunks, n_ctx, threads, tasks, task_count,
            tuple(task_rungs.split(",")),
        )  # fmt: skip
        evidence = Evidence(model, work / model.stem, settings)
        evidence.commands = list(dict.fromkeys([*evidence.commands, command()]))
        for rung, method, path in others_of(files, hows):
            if evidence.missing(method, (rung,)):
                evidence.add(method, methods.Quant(rung, path, theirs=True))
        for method in used:
            left = evidence.missing(method, names)
            for quant in method.make(evidence, left) if left else ():
                evidence.add(method, quant)
        evidence.save()
    evidence_page.write(sorted(RESULTS.glob("evidence-*.json")), PAGE)


def command() -> str:
    """The command line with names instead of paths."""
    shown = []
    for word in sys.argv[1:]:
        head, equals, value = word.rpartition("=")
        shown.append(word if " " in word else head + equals + (pathlib.PurePath(value).name or value))
    return shlex.join(["python", "benchmarks/evidence.py", *shown])


if __name__ == "__main__":
    try:
        main()
    except BitladderError as error:
        sys.exit(f"evidence: {error}")

"""Files of text: checkpoints, recipes, patterns, questions, texts, and all that a run directory holds."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import rich.console

from bitladder.cli import outputs
from bitladder.convert import convert, default_name
from bitladder.errors import BitladderError
from bitladder.evaluate import export_task, load_task, parse_specs, read_scores, task_command
from bitladder.evaluate.tasks.answer import summarize
from bitladder.gguf import GgufFile
from bitladder.hub import parse, pick
from bitladder.plan import load_prices
from bitladder.recipe import (
    check,
    diff,
    export_command,
    export_lines,
    match_patterns,
    parse_tensor_type,
    read_recipe,
    read_tensor_types,
    recipe_toml,
)
from bitladder.report import publish, read_run, render_card, render_report, write_card
from bitladder.rundir import complete_manifest, load_manifest
from bitladder.show import ladder_json, ladder_table, pareto_plot
from bitladder.text import excerpts, load_text
from bitladder.trial import Journal
from bitladder.units import parse_size
from fuzz.rule import Parser, Place

BPE, SPM, MODEL, RUN = "bpe", "spm", "tiny.gguf", "run"


def prepare(folder: pathlib.Path) -> None:
    """Makes two tiny checkpoints, a model and a finished run, in a process of its own: PyTorch takes much memory."""
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tests = pathlib.Path(__file__).parents[1]
        subprocess.run([sys.executable, "-m", "fuzz.documents", str(folder)], check=True, cwd=tests)
        (folder / "done").touch()


def checkpoints(folder: pathlib.Path) -> None:
    """Two tiny checkpoints, with a tokenizer of either kind and each file that a checkpoint may have."""
    import tiny_models

    for name, train in ((BPE, tiny_models.train_byte_level), (SPM, tiny_models.train_sentencepiece)):
        tiny_models.llama(folder / name, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        train(folder / name)
        card = "---\nlicense: mit\nbase_model: org/name\ntags:\n- a\n- b\nlanguage: [en, no]\n---\n# Tiny\n"
        (folder / name / "README.md").write_text(card)
        ends = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "pad_token": None}
        (folder / name / "special_tokens_map.json").write_text(json.dumps(ends))
        (folder / name / "added_tokens.json").write_text(json.dumps({"<extra>": 390}))
        (folder / name / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    convert(folder / BPE, folder / MODEL, outtype="f16")


def finish(run: pathlib.Path) -> None:
    """Writes the card of a run, and records files as they are, so that it can be published."""
    write_card(run)
    manifest = load_manifest(run)
    assert manifest
    for step in manifest.steps.values():
        for output in step.outputs:
            if (run / output.path).is_file():
                output.bytes = (run / output.path).stat().st_size
    manifest.save(run)


_CHECKPOINT = {
    "config": ("config.json", "generation_config.json", "model.safetensors.index.json"),
    "safetensors": ("model.safetensors",),
    "tokenizer": (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("chat_template.jinja", "chat_template.json"),
    ),
    "sentencepiece": ("tokenizer.model",),
    "card": ("README.md",),
}


def _read_checkpoint(place: Place, name: str, data: bytes) -> None:
    original = place.prepared / (SPM if name == "tokenizer.model" else BPE)
    folder = place.scratch / original.name
    if not folder.exists():
        shutil.copytree(original, folder)
    try:
        (folder / name).write_bytes(data)
        out = default_name(folder, "f16")
        assert "/" not in out and out.isprintable()
        convert(folder, place.scratch / "converted.gguf", outtype="f16", upstream=False)
        with GgufFile(place.scratch / "converted.gguf") as file:
            assert file.tensors
    finally:
        if (original / name).exists():
            shutil.copyfile(original / name, folder / name)
        else:
            (folder / name).unlink()


def _checkpoint_seeds(names: tuple[str, ...], place: Place) -> Iterator[tuple[str, bytes]]:
    for name in names:
        folder = place.prepared / (SPM if name == "tokenizer.model" else BPE)
        if (folder / name).exists():
            yield name, (folder / name).read_bytes()
    if "config.json" in names:
        config = json.loads((place.prepared / BPE / "config.json").read_text())
        rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0}
        yield "config.json", json.dumps(config | {"rope_parameters": rope, "head_dim": 8}).encode()
        fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        yield "config.json", json.dumps(config | {"quantization_config": fp8}).encode()
        weights = {"weight_map": {"model.embed_tokens.weight": "model.safetensors"}, "metadata": {"total_size": 1}}
        yield "model.safetensors.index.json", json.dumps(weights).encode()


def _checkpoint(name: str) -> Parser:
    names = _CHECKPOINT[name]
    return Parser(name, _read_checkpoint, lambda place: _checkpoint_seeds(names, place), names, prepares=True)


def _read_recipe(place: Place, name: str, data: bytes) -> None:
    path = place.file(name, data)
    outputs.is_recipe(path)
    recipe = read_recipe(path)
    text = recipe_toml(recipe)
    again = read_recipe(place.file("again.toml", text.encode()))
    assert recipe_toml(again) == text and again.tensors == recipe.tensors
    with GgufFile(place.prepared / MODEL) as file:
        shapes = {tensor.name: tensor.shape for tensor in file.tensors.values()}
        diff(recipe, again, shapes).to_json()
        [finding.line() for finding in check(recipe, file).findings]
    export_lines(recipe)
    export_command(recipe, "types.txt")


def _recipe_seeds(place: Place) -> Iterator[tuple[str, bytes]]:
    with GgufFile(place.prepared / MODEL) as file:
        names = list(file.tensors)
    lines = [f'"{name}" = "{kind}"' for name, kind in zip(names, ["q4_0", "Q8_0", "f16", "f32"] * 9, strict=False)]
    yield "r.toml", ('preset = "Q4_0"\n[tensors]\n' + "\n".join(lines[:6])).encode()
    head = 'schema_version = 1\nmodel = "m"\nbytes = 5\nbpw = 4.5\n[imatrix]\nname = "i"\nchunks = 3\n'
    head += '[[imatrix.texts]]\nname = "t"\nsha256 = "x"\n[versions]\na = "1"\n[metadata]\n"bitladder.x" = 3\n'
    yield "r.toml", (head + "[tensors]\n" + "\n".join(line.replace('"', "", 2) for line in lines[:3])).encode()


def _read_patterns(place: Place, name: str, data: bytes) -> None:
    if name == "words":
        words = data.decode("utf-8", "surrogateescape")
        for read in (parse_specs, parse_size, parse_tensor_type, parse):
            with contextlib.suppress(BitladderError):
                read(words)
        pick([words, f"{words}.gguf", "a-00001-of-00002.gguf"], words)
        return
    pairs = [parse_tensor_type(word) for word in read_tensor_types(place.file(name, data))]
    with GgufFile(place.prepared / MODEL) as file:
        match_patterns(file.path, pairs, list(file.tensors))


def _pattern_seeds(place: Place) -> Iterator[tuple[str, bytes]]:
    for pattern in (
        r"\.([0-9]|1[01257]|31)\.attn_k",
        r"blk\.\d+\.(ffn|attn)_(?!v)[\w.]{2,13}$",
        "[[:alpha:]a-f]+?",
        "q",
    ):
        yield "t.txt", f"{pattern}=q8_0\nattn_v=q4_0".encode()
    for words in ("arc:a.bin,mmlu", "continuation:x", "3.7GiB", "org/name@main:Q4_K_M", "org/name/f.gguf", "a=q4_k"):
        yield "words", words.encode()


_QUESTION = {"sentence": "The _ did.", "option1": "cat", "option2": "dog", "answer": "1"}
_ARC = {"question": {"stem": "Why", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]}}
_HELLASWAG = {"activity_label": "A", "ctx": "b", "endings": ["w", "x", "y", "z"], "label": 2}
_BINARY = (
    b"\1\0\0\0\x08\0\0\0" b"\1\0\0\0q" b"\2\0\0\0" b"\1\0\0\0a\1\0\0\0b" b"\1\0\0\0\0\0\0\0" b"\0\0\0\0"
)  # fmt: skip
_TASKS = {
    "arc:q.bin": _BINARY,
    "arc:q.jsonl": json.dumps(_ARC | {"answerKey": "B"}).encode() + b"\n",
    "hellaswag:q.txt": b"A: b\n2\nw\nx\ny\nz\n",
    "hellaswag:q.jsonl": json.dumps(_HELLASWAG).encode() + b"\n",
    "mmlu:q.csv": b'Question,A,B,C,D,Answer\n"Why, so?",a,b,c,d,B\n',
    "truthfulqa:q.json": json.dumps([{"question": "q", "mc1_targets": {"a": 1, "b": 0}}]).encode(),
    "truthfulqa:q.csv": b"Question,Best Answer,Incorrect Answers\nq,a,b; c\n",
    "winogrande:q.csv": b"0,The _ did.,cat,dog,1\n\n",
    "winogrande:q.jsonl": json.dumps(_QUESTION).encode() + b"\n",
    "continuation:q.txt": b"A sentence that is a text to measure with, and another one that goes on.\n" * 60,
}
_PACKED = {"arc:q.jsonl.gz": gzip.compress, "arc:q.jsonl.bz2": bz2.compress, "arc:q.jsonl.xz": lzma.compress}


def _read_task(place: Place, name: str, data: bytes) -> None:
    task, _, file = name.partition(":")
    path = place.file(file, data)
    outputs.is_questions(path)
    questions = load_task(parse_specs(f"{task}:{path}")[0])
    assert questions.items and str(summarize(questions, min(3, len(questions.items))))
    out = place.scratch / "exported"
    export_task(questions, out)
    task_command(questions, out, len(questions.items))


def _task_seeds(place: Place) -> Iterator[tuple[str, bytes]]:
    yield from _TASKS.items()
    for name, pack in _PACKED.items():
        yield name, pack(_TASKS["arc:q.jsonl"])


def _read_text(place: Place, name: str, data: bytes) -> None:
    text = load_text(str(place.file(name, data)))
    assert excerpts([text], 2, 8).text


def _read_journal(place: Place, name: str, data: bytes) -> None:
    journal = Journal(place.file(name, data), "c", 8)
    if not journal.measurements:
        raise BitladderError("no line counts: all is measured again")
    for measurement in journal.measurements.values():
        assert measurement.kld >= 0 and measurement.error >= 0


def _journal_seeds(place: Place) -> Iterator[tuple[str, bytes]]:
    path = place.scratch / "seed.jsonl"
    path.unlink(missing_ok=True)
    Journal(path, "c", 8).measure(_Model(), {"blk.0.attn_q.weight": "q4_K"}, 2, "probe")
    yield "measured.jsonl", path.read_bytes()


class _Model:
    def kld(self, types: Mapping[str, str], chunks: int) -> npt.NDArray[np.float64]:
        """The same divergence of every token."""
        return np.full((chunks, 4), 0.5)


_RUN_FILES = (
    *("ladder.json", "sensitivity-IQ4_XS-Q8_0.json", "candidates.json", "scores/Q4_K_M.json", "scores/base.json"),
    *("scores/Q4_K_M.naive.json", "recipes/Q4_K_M.toml", "README.md"),
)


def _read_run(place: Place, name: str, data: bytes) -> None:
    folder = place.scratch / RUN
    if not folder.exists():
        shutil.copytree(place.prepared / RUN, folder)
    path = folder / name
    original = (place.prepared / RUN / name).read_bytes()
    try:
        path.write_bytes(data)
        if name.startswith("sensitivity"):
            with contextlib.suppress(BitladderError):
                load_prices(path)
        if name.startswith("scores"):
            read_scores(path)
        complete_manifest(folder)
        run = read_run(folder)
        json.dumps(ladder_json(run)), pareto_plot(run, width=60, height=8)
        rich.console.Console(file=io.StringIO(), width=80).print(ladder_table(run))
        render_card(folder)
        entries = publish.published_files(folder)
        publish.check_private(folder, entries)
        publish.warnings(folder, entries), publish.default_file(entries), publish.groups(entries)
        if len(data) % 8 == 0:
            render_report(folder)
    finally:
        path.write_bytes(original)


def _run_seeds(place: Place) -> Iterator[tuple[str, bytes]]:
    for name in _RUN_FILES:
        yield name, (place.prepared / RUN / name).read_bytes()


ALL = (
    *map(_checkpoint, _CHECKPOINT),
    Parser("recipe", _read_recipe, _recipe_seeds, ("r.toml",), prepares=True),
    Parser("patterns", _read_patterns, _pattern_seeds, ("t.txt", "words"), prepares=True),
    Parser("tasks", _read_task, _task_seeds, (*_TASKS, *_PACKED)),
    Parser("text", _read_text, lambda place: [("t.txt", b"A text.\nAnother line, caf\xc3\xa9.\n")], ("t.txt",)),
    Parser("journal", _read_journal, _journal_seeds, ("measured.jsonl",)),
    Parser("run", _read_run, _run_seeds, _RUN_FILES, prepares=True),
)


if __name__ == "__main__":
    from report_runs import full_run

    target = pathlib.Path(sys.argv[1]).resolve()
    checkpoints(target)
    example = target / "example.gguf"
    convert(pathlib.Path(__file__).parents[2] / "examples" / "tiny-olmo2", example, outtype="f16")
    text = target / "calibration.txt"
    text.write_text(load_text("pydoc:calibration").text[:40_000])
    finish(full_run(example, text, target / RUN))

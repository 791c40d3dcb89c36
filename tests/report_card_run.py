"""A run directory as a card needs it, with invented figures, and how it is changed and read."""

import json

from markdown_it import MarkdownIt

from bitladder.recipe import FileUsed, ImatrixUsed, Recipe, TextUsed, write_recipe
from bitladder.rundir import Manifest, OutputFile, RunRecord, StepRecord

RUNGS = ("Q8_0", "IQ3_S", "Q4_K_M", "IQ4_NL")
# bytes, bpw, KLD and its error, RMS Δp, ρ
MEASURED = {
    "Q8_0": (8_520_000_000, 8.5, (0.00012345, 0.0000012), 0.00321, 0.99987),
    "IQ3_S": (3_660_000_000, 3.7, (0.1234, 0.0021), 0.0812, 0.9712),
    "Q4_K_M": (4_920_000_000, 4.9, (0.02345, 0.00034), 0.0342, 0.9951),
    "IQ4_NL": (4_990_000_000, 5.0, (0.02301, 0.00035), 0.0339, 0.9952),
}
TEXT = {"name": "wiki.test.raw", "sha256": "ee" * 32}
VERSIONS = {"bitladder": "0.1.0", "llama_cpp_python": "0.3.36", "llama_cpp_commit": "abc1234"}


PERCENTILES = dict.fromkeys(("p999", "p99", "p95", "p90", "median", "p10", "p05", "p01", "p001", "min"), 0.0)
SPEED = {"stddev": 1.0, "repetitions": 3, "n_prompt": 0, "n_gen": 128, "n_depth": 0, "n_batch": 2048, "n_ubatch": 512,
         "threads": 2, "gpu_layers": 0, "flash_attn": "auto", "backend": "CPU", "cpu": "Some CPU"}  # fmt: skip


def figure(value, error):
    return {"value": value, "error": error}


def scores(rung):
    common = {"sha256": "aa" * 32, "text": TEXT, "n_ctx": 512, "chunks": 40, "tokens_scored": 10200}
    common |= {"versions": VERSIONS}
    if rung == "base":
        return common | {"model": "X-F16.gguf", "bytes": 16 * 10**9, "bpw": 16.0, "ppl": figure(9.12345, 0.0654)}
    size, bpw, kld, rms, rho = MEASURED[rung]
    return common | {
        "model": f"X-{rung}.gguf", "bytes": size, "bpw": bpw, "ppl": figure(9.2, 0.066), "rho_ppl": rho,
        "kld": figure(*kld) | {"max": 3.0} | PERCENTILES,
        "delta_p": {"mean": figure(0.0, 0.01), "rms": figure(rms, rms / 50), "max": 1.0, "p75": 0.0, "p25": 0.0}
        | PERCENTILES,
        "same_top_p": figure(0.93, 0.0025),
    }  # fmt: skip


def change_manifest(folder, **changes):
    path = folder / "ladder.json"
    value = json.loads(path.read_text())
    value["run"] |= changes
    path.write_text(json.dumps(value))


def tables(card):
    """Every table as a renderer of GitHub's Markdown sees it: heading it stands under → rows of the source's cells."""
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("\n---\n", 1)[1])
    found, heading, row = {}, "", None
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = tokens[place + 1].content
        elif token.type == "table_open":
            found.setdefault(heading, []).append([])
        elif token.type == "tr_open":
            row = []
        elif token.type in ("th_open", "td_open"):
            row.append(tokens[place + 1].content)
        elif token.type == "tr_close":
            found[heading][-1].append(row)
    return found


def table(card, heading):
    """The rows of the first table under a heading, without its head."""
    return tables(card)[heading][0][1:]


def rewrite(folder, name, **changes):
    """Change a scores file; a name that is not there yet begins as Q4_K_M's."""
    path = folder / "scores" / f"{name}.json"
    value = json.loads(path.read_text()) if path.is_file() else scores("Q4_K_M")
    changed = {key: field for key, field in (value | changes).items() if field is not None}
    path.write_text(json.dumps(changed))


def change_step(folder, name, **facts):
    path = folder / "ladder.json"
    value = json.loads(path.read_text())
    step = value["steps"].setdefault(name, {"key": "k", "inputs": {}, "outputs": [], "facts": {}})
    step["facts"] |= facts
    path.write_text(json.dumps(value))


def write_run(folder):
    """Writes a finished run whose files are missing, as a card needs it, and returns its folder."""
    general = {"name": "X | Instruct", "license": "apache-2.0", "languages": ["en", "no"]}
    facts = {
        "file": "X-F16.gguf", "stem": "X", "architecture": "llama", "encoding": "F16", "parameters": 8_000_000_000,
        "general": general, "origin": None, "sha256": "bb" * 32,
    }  # fmt: skip
    full = OutputFile(path="X-F16.gguf", bytes=1, sha256="bb" * 32)
    Manifest(
        run=RunRecord(
            command="bitladder run org/X --out out", model="org/X", model_id="org/X", rungs=RUNGS, n_ctx=512,
            quantized_by="someone", complete=True,
        ),
        steps={
            "convert": StepRecord(key="k", inputs={}, outputs=[full], facts=facts),
            "imatrix": StepRecord(key="k", inputs={}, outputs=[], facts={"texts": [{"name": "c.txt", "sha256": "cc"}]}),
        },
    ).save(folder)  # fmt: skip
    texts = [TextUsed(name="c.txt", sha256="cc" * 32)]
    for rung in RUNGS:
        write_recipe(
            folder / "recipes" / f"{rung}.toml",
            Recipe(
                model="X", file=f"X-{rung}.gguf", preset=rung, bytes=1, bpw=1.0, versions=VERSIONS,
                tensors={"a": "q8_0"}, source=FileUsed(name="X-F16.gguf", sha256="bb" * 32),
                imatrix=ImatrixUsed(name="imatrix.gguf", sha256="dd" * 32, chunks=100, n_ctx=512, texts=texts),
            ),
        )  # fmt: skip
    (folder / "scores").mkdir()
    for name in ("base", *RUNGS):
        (folder / "scores" / f"{name}.json").write_text(json.dumps(scores(name)))
    return folder

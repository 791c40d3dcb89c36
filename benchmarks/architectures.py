"""What works for which architecture: docs/architectures.md, from random tiny models that transformers makes.

    python benchmarks/architectures.py [--only qwen3,gemma2] [--source FOLDER] [--docs] [--fixtures]

For each architecture a model with random weights is converted by llama.cpp's converter. Its logits are compared with
those of transformers. Then the commands of the product are run on it. What fails is in the table with its reason.
FOLDER has the source of the converter; without it the one in the user's cache is taken, or downloaded. --docs writes
the page. --fixtures writes the models and logits of tests/models. About half a minute for each architecture.

The models have a vocabulary of 400 tokens, of tokenizers that are trained here. The converter takes only tokenizers
whose hash it knows. So it runs with that one check left out, and in
this process, which saves its start.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import pathlib
import re
import runpy
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from bitladder.cli import invoke
from bitladder.convert import build
from bitladder.convert.upstream import converter_source, left_out
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile
from bitladder.ladder import Machine
from bitladder.progress import SILENT

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from architecture_models import IN_TESTS, MODELS, SMALLER, make  # noqa: E402
from reference_logits import native_logits  # noqa: E402

PAGE, FIXTURES = ROOT / "docs" / "architectures.md", ROOT / "tests" / "models"
TOKENS = list(range(300, 324))
# One colour, which no resampling changes; as in tests/test_architectures.py.
IMAGE = np.broadcast_to(np.uint8([200, 100, 50]), (56, 56, 3))


def use_converter(source: pathlib.Path) -> None:
    """Makes bitladder run the converter in this process, which saves its start, and lets it take every tokenizer."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]

    def run_here(
        converter: Any, folder: Any, target: Any, outtype: str, progress: Any, *, projector: bool = False
    ) -> None:
        # The converter needs the gguf package of its own version. It gives way again afterwards.
        ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "gguf"}
        import conversion

        conversion.TextModel.get_vocab_base_pre = lambda self, tokenizer: "dbrx"
        words, sys.argv = sys.argv, [str(converter.script), str(folder), "--outfile", str(target), "--outtype", outtype]
        sys.argv += ["--mmproj"] if projector else left_out(converter, folder)
        try:
            runpy.run_path(str(converter.script), run_name="__main__")
        except (Exception, SystemExit) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{pathlib.Path(last.filename).name}, {last.name}"
            raise BitladderError(f"the converter failed: {type(error).__name__}: {error} ({where})") from error
        finally:
            sys.argv = words
            for name in [name for name in sys.modules if name.partition(".")[0] in ("gguf", "conversion")]:
                del sys.modules[name]
            sys.modules.update(ours)

    build.run_converter = run_here
    # How fast this machine is does not matter here.
    importlib.import_module("bitladder.ladder.estimate").measure_machine = lambda threads=None: Machine()


def difference(model: Any, path: pathlib.Path) -> float:
    """The largest difference of a logit from that of transformers, as a fraction of the range of the logits."""
    expected = logits(model)
    native = native_logits(path, TOKENS)[:, : expected.shape[1]]
    return float(np.abs(native - expected).max() / np.ptp(expected))


def logits(model: Any) -> np.ndarray[Any, Any]:
    """The logits of transformers, float32 [tokens, vocabulary]."""
    with torch.no_grad():
        values: np.ndarray[Any, Any] = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    return values


def run(*words: str) -> tuple[str, str]:
    """Runs a command of bitladder. Returns its output, and its last error line if it fails."""
    shown, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
        code = invoke([*words, "-q"])
    lines = [line.removeprefix("bitladder: ") for line in said.getvalue().splitlines() if line.strip()]
    return shown.getvalue(), "" if code == 0 else (lines[-1] if lines else f"exit code {code}")


def examine(name: str, source: pathlib.Path, work: pathlib.Path) -> dict[str, str]:
    """One row: what each step gives, or why it does not work."""
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row: dict[str, str] = {"name": name}
    try:
        model = make(name, folder / "checkpoint")
    except Exception as error:  # of transformers, whose configurations change
        return row | {"convert": f"transformers makes no such model: {str(error).splitlines()[0][:100]}"}
    full = folder / "full.gguf"
    text = ["-f", "pydoc:calibration", "-c", "128", "--chunks", "4"]
    m, imatrix, moments = ["-m", str(full)], str(folder / "imatrix.gguf"), str(folder / "moments.gguf")
    quant, rounded = str(folder / "quant.gguf"), str(folder / "rounded.gguf")
    converter = ["--converter", str(source)]
    shown, problem = run("doctor", str(folder / "checkpoint"), *converter, "--json")
    row["doctor"] = problem or ("works" if json.loads(shown)["works"] else json.loads(shown)["reasons"][0])
    shown, problem = run("convert", str(folder / "checkpoint"), "-o", str(full), "--outtype", "f32", *converter)
    if problem:
        return row | {"convert": problem}
    row["convert"] = shown.split(":")[1].split(",")[0].strip() + (" + mmproj" if "projector" in shown else "")
    row["logits"] = f"{difference(model, full):.1e}"
    row["imatrix"] = run("imatrix", *m, *text, "-o", imatrix)[1] or "yes"
    row["stats"] = run("stats", imatrix)[1] or "yes"
    row["quantize"] = run("quantize", "Q4_K_M", *m, "--imatrix", imatrix, "-o", quant)[1] or "yes"
    row["moments"] = "gradients"
    row["why"] = run("calibrate", *m, *text, "-o", moments, "--weighting", "gradients")[1]
    if row["why"]:
        row["moments"] = run("calibrate", *m, *text, "-o", moments, "--weighting", "positions")[1] or "positions"
    best = ["--rounding", "best", "--moments", moments, "--guard", "none"]
    row["rounding"] = run("quantize", "Q4_K_M", *m, "--imatrix", imatrix, "-o", rounded, *best)[1] or "yes"
    figures = ["--base", str(full), "-f", "pydoc:test", "-c", "128", "--chunks", "4", "--noise-chunks", "0"]
    shown, problem = run("eval", "-m", quant, *figures, "--no-cache", "--json")
    row["KLD"] = problem or f"{json.loads(shown)['kld']['value']:.2g}"
    quick = ["--probe-tokens", "4000", "--no-feedback", "-c", "128", "--work", str(folder / "plan")]
    row["plan"] = (
        run("plan", *m, "--imatrix", imatrix, "--like", "Q4_K_M", "-o", str(folder / "r.toml"), *quick)[1] or "yes"
    )
    row["prune"] = run("plan", *m, "--suggest-prune", "-c", "128", "--chunks", "2")[1] or "yes"
    row["card"] = card(full, folder / "ladder")
    shutil.rmtree(folder)
    return row


def card(full: pathlib.Path, out: pathlib.Path) -> str:
    """Makes a ladder of one rung with its card. Returns "yes", or why there is none."""
    short = ["--chunks", "2", "--imatrix-chunks", "2", "-c", "128", "--no-bench", "--no-smooth"]
    rung = ["--ladder", "Q4_K_M", "--mode", "naive", "--rounding", "stock"]
    problem = run("run", str(full), "-o", str(out), *short, *rung)[1]
    return problem or ("yes" if "Q4_K_M" in (out / "README.md").read_text() else "no card")


def write_fixture(name: str, source: pathlib.Path, work: pathlib.Path) -> None:
    """Writes a smaller model in F16 and its logits to tests/models."""
    folder = work / f"{name}-fixture"
    shutil.rmtree(folder, ignore_errors=True)
    changed = SMALLER | {key: 64 for key in MODELS[name][1] if key in ("moe_intermediate_size", "block_ff_dim")}
    changed |= {key: 64 for key in MODELS[name][1] if key in ("q_lora_rank", "kv_lora_rank")}
    changed |= {"mamba_d_head": 32, "mamba_d_ssm": 128} if "mamba_d_ssm" in MODELS[name][1] else {}
    changed |= {"num_key_value_heads": 2} if "kv_lora_rank" in MODELS[name][1] else {}
    model = make(name, folder / "checkpoint", changed)
    FIXTURES.mkdir(exist_ok=True)
    converter = ["--converter", str(source)]  # and the projector of images, beside the model
    out = FIXTURES / f"{name}.gguf"
    problem = run("convert", str(folder / "checkpoint"), "-o", str(out), "--outtype", "f16", *converter)[1]
    if problem:
        raise SystemExit(f"{name}: {problem}")
    with torch.no_grad(), GgufFile(out) as file:  # the logits of the weights as they are stored
        halves = {tuple(tensor.shape[::-1]) for tensor in file.tensors.values() if tensor.type.name == "f16"}
        for parameter in model.parameters():
            if tuple(parameter.shape) in halves or parameter.dim() > 1:
                parameter.copy_(parameter.half().float())
    np.save(FIXTURES / f"{name}.npy", logits(model).astype(np.float32))
    if name == "gemma3-vision":
        np.save(FIXTURES / f"{name}.image.npy", image_features(model))
    shutil.rmtree(folder)


def image_features(model: Any) -> np.ndarray[Any, Any]:
    """What transformers makes of IMAGE for the text model, float32 [tokens, width]."""
    pixels = torch.from_numpy((IMAGE / 255 - 0.5) / 0.5).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=pixels)
    values: np.ndarray[Any, Any] = getattr(features, "pooler_output", features)[0].numpy()
    return values


def page(rows: list[dict[str, str]]) -> str:
    """The page: a table, and the reasons of what does not work."""
    columns = [
        "doctor",
        "convert",
        "logits",
        "imatrix",
        "stats",
        "quantize",
        "moments",
        "rounding",
        "KLD",
        "plan",
        "prune",
        "card",
    ]
    lines = ["| model | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    reasons: list[str] = []
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column, "–")
            if len(value) > 16:
                if value not in reasons:
                    reasons.append(value)
                value = f"({reasons.index(value) + 1})"
            cells.append(value)
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    shown = [re.sub(r"\S*/", "", reason).replace("|", "/")[:300] for reason in reasons]  # without folders
    notes = [f"{number}. `{reason}`" for number, reason in enumerate(shown, 1)]
    why: dict[str, list[str]] = {}
    for row in rows:
        if row.get("why"):
            why.setdefault(row["why"].rpartition("full.gguf: ")[2], []).append(row["name"])
    positions = ["", "Tokens are weighted by positions, because there are no gradients:", ""]
    positions += [f"- {', '.join(names)}: {reason.split(': ')[-1]}." for reason, names in why.items()]
    return HEAD + "\n".join([*lines, "", *notes, *positions]) + "\n"


REAL = "\n## Real checkpoints\n"
HEAD = f"""# Architectures

`bitladder convert` converts Llama and OLMo-2 itself, and everything else with llama.cpp's own converter
([conversion](convert.md#other-architectures)). [`bitladder doctor`](convert.md#does-my-model-work) says what works for
a model of yours. This table says what works for random tiny models that transformers {transformers.__version__} makes,
all converted by llama.cpp's converter. It is written by `python benchmarks/architectures.py --docs`.

- **doctor**: what `bitladder doctor` says of the checkpoint.
- **convert**: the architecture as the GGUF names it.
- **logits**: the largest difference from the logits of transformers, as a fraction of their range (F32).
- **imatrix**, **stats**, **quantize**: importance matrix, its statistics, and Q4_K_M with it.
- **moments**: how tokens are weighted for second moments: by gradients, or by positions.
- **rounding**: Q4_K_M with `--rounding best`.
- **[KLD](glossary.md#measurement)**: a base of the full-precision model, and the mean KLD of Q4_K_M.
- **plan**, **prune**: types by measured costs, and what each block is worth.
- **card**: a ladder of one rung by `bitladder run`, with its card.

A number in brackets names the reason below the table. `glm4moe-mtp` has a prediction head, which transformers does not
compute and no text reaches. `gemma3-vision` has a vision part, which becomes a projector. Makers publish keys of
config.json that transformers leaves out or renames when it saves a model; they are written as published
(`scoring_func` of DeepSeek V3, `rotary_pct` of Cohere 2, `layer_types` of Granite 4). Without `scoring_func` llama.cpp
computes the experts of DeepSeek V3 by a softmax, and its logits differ by 7 % of their range. So such a checkpoint is
refused.

What transformers' modules give is trusted only after a look at the logits; where these differ, positions take over.
libmtmd loads the projector of gemma3-vision. What it makes of an image differs from transformers by up to 7 % of the
range.

"""


def apart(step: Callable[..., Any], name: str, *more: Any) -> dict[str, str]:
    """The row of an architecture from a child of this process, so that one that dies takes no other with it."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: sender.send(step(name, *more)))
    child.start()
    sender.close()
    try:
        row: dict[str, str] = receiver.recv() or {"name": name}
    except EOFError:
        row = {"name": name, "convert": "the process died"}
    child.join()
    return row


def main() -> None:
    """Examines the architectures and prints or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=pathlib.Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--work", type=pathlib.Path)
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--fixtures", action="store_true")
    arguments = parser.parse_args()
    source = (arguments.source or converter_source(None, None, SILENT)).resolve()
    use_converter(source)
    names = arguments.only.split(",") if arguments.only else list(IN_TESTS if arguments.fixtures else MODELS)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or pathlib.Path(temporary)
        rows = []
        for name in names:
            rows.append(apart(write_fixture if arguments.fixtures else examine, name, source, work))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.docs:
        kept = "".join(PAGE.read_text(encoding="utf-8").partition(REAL)[1:])  # of benchmarks/checkpoints.py
        PAGE.write_text(page(rows) + kept, encoding="utf-8")


if __name__ == "__main__":
    main()

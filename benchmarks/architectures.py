"""What works for which architecture: docs/architectures.md, from random tiny models that transformers makes.

    python benchmarks/architectures.py --tokenizer FOLDER [--only qwen3,gemma2] [--work FOLDER] [--docs]

FOLDER has the tokenizer of Qwen 2.5, one of those that llama.cpp's converter recognises. For each architecture a model
with random weights is converted; its logits are compared with those of transformers; then the commands of the product
are run on it. What fails is in the table with its reason. --docs writes the page. A minute for each architecture.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import torch
import transformers

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import tiny_models  # noqa: E402
from reference_logits import native_logits  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
TOKENS = list(range(300, 324))
PIECES = 400  # of a SentencePiece model
WITH_PIECES = ("gemma2", "gemma3", "phi3")  # their converters want tokenizer.model
SMALL = {
    "vocab_size": 151936,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
SSM = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
# Name → class prefix in transformers, and what its configuration has besides the sizes above.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 64}),
    "olmoe": ("Olmoe", {"num_key_value_heads": 4, **EXPERTS}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3moe": ("Qwen3Moe", {"head_dim": 32, "norm_topk_prob": True, **EXPERTS}),
    "gemma2": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}),
    "gemma3": ("Gemma3Text", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}),
    "phi3": ("Phi3", {}),
    "granite": ("Granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "granitehybrid": (
        "GraniteMoeHybrid",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 128,
            **SSM,
        },
    ),
    "smollm3": ("SmolLM3", {"pretraining_tp": 1}),
    "gpt-oss": ("GptOss", {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128}),
    "falcon-h1": ("FalconH1", {"mamba_d_ssm": 128, "head_dim": 16, **SSM}),
    "mamba2": ("Mamba2", {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "expand": 2}),
    "deepseek2": ("DeepseekV2", LATENT | {"topk_method": "greedy"}),
    "deepseek3": ("DeepseekV3", LATENT),
    "glm4moe": ("Glm4Moe", {"head_dim": 16, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1,
                            "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1}),
    "cohere2": ("Cohere2", {"head_dim": 16, "sliding_window": 64, "logit_scale": 0.25, "rotary_pct": 1.0}),
    "starcoder2": ("Starcoder2", {}),
    "ernie4.5": ("Ernie4_5", {"head_dim": 16}),
    "exaone4": ("Exaone4", {"head_dim": 16, "sliding_window": 64}),
    "seed-oss": ("SeedOss", {"head_dim": 16}),
}  # fmt: skip


def make(name: str, tokenizer: pathlib.Path, folder: pathlib.Path) -> Any:
    """A checkpoint with random weights, wide enough that every part shows in the logits. Returns the model."""
    prefix, more = MODELS[name]
    pieces = {"vocab_size": PIECES} if name in WITH_PIECES else {}
    config = getattr(transformers, f"{prefix}Config")(**(SMALL | more | pieces))
    torch.manual_seed(0)
    kind = prefix.removesuffix("Text")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 * parameter.shape[-1] ** -0.5)
            elif "norm" in key and "bias" not in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if pieces:
        tiny_models.train_sentencepiece(folder, PIECES)
        return model
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)  # for tokenizer.json
    shutil.copy(tokenizer / "tokenizer_config.json", folder)  # in the form that every version reads
    return model


def difference(model: Any, path: pathlib.Path) -> float:
    """The largest difference of a logit from that of transformers, as a fraction of the range of the logits."""
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    found = native_logits(path, TOKENS)[:, : expected.shape[1]]
    return float(np.abs(found - expected).max() / np.ptp(expected))


def run(*words: str) -> tuple[str, str]:
    """Runs a command of bitladder. Returns its output, and its last error line if it fails."""
    command = [sys.executable, "-m", "bitladder", *words, "-q"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    lines = [line.removeprefix("bitladder: ") for line in done.stderr.splitlines() if line.strip()]
    return done.stdout, "" if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def examine(name: str, tokenizer: pathlib.Path, work: pathlib.Path) -> dict[str, str]:
    """One row: what each step gives, or why it does not work."""
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row: dict[str, str] = {"name": name}
    try:
        model = make(name, tokenizer, folder / "checkpoint")
    except Exception as error:  # of transformers, whose configurations change
        return row | {"convert": f"transformers makes no such model: {str(error).splitlines()[0][:100]}"}
    full = folder / "full.gguf"
    text = ["-f", "pydoc:calibration", "-c", "128", "--chunks", "4"]
    m, imatrix, moments = ["-m", str(full)], str(folder / "imatrix.gguf"), str(folder / "moments.gguf")
    quant, rounded = str(folder / "quant.gguf"), str(folder / "rounded.gguf")
    shown, problem = run("convert", str(folder / "checkpoint"), "-o", str(full), "--outtype", "f32")
    if problem:
        return row | {"convert": problem}
    row["convert"] = shown.split(":")[1].split(",")[0].strip()
    row["logits"] = f"{difference(model, full):.1e}"
    row["imatrix"] = run("imatrix", *m, *text, "-o", imatrix)[1] or "yes"
    row["stats"] = run("stats", imatrix)[1] or "yes"
    row["quantize"] = run("quantize", "Q4_K_M", *m, "--imatrix", imatrix, "-o", quant)[1] or "yes"
    for weighting in ("gradients", "positions"):
        problem = run("calibrate", *m, *text, "-o", moments, "--weighting", weighting)[1]
        row["moments"] = weighting if not problem else row.get("moments", "") + f"{weighting}: {problem} "
        if not problem:
            break
    best = ["--rounding", "best", "--moments", moments, "--guard", "none"]
    row["rounding"] = run("quantize", "Q4_K_M", *m, "--imatrix", imatrix, "-o", rounded, *best)[1] or "yes"
    figures = [
        "--base",
        str(full),
        "-f",
        "pydoc:test",
        "-c",
        "128",
        "--chunks",
        "4",
        "--noise-chunks",
        "0",
        "--no-cache",
    ]
    shown, problem = run("eval", "-m", quant, *figures, "--json")
    row["KLD"] = problem or f"{json.loads(shown)['kld']['value']:.2g}"
    quick = ["--probe-tokens", "4000", "--no-feedback", "-c", "128", "--work", str(folder / "plan")]
    row["plan"] = (
        run("plan", *m, "--imatrix", imatrix, "--like", "Q4_K_M", "-o", str(folder / "r.toml"), *quick)[1] or "yes"
    )
    row["prune"] = run("plan", *m, "--suggest-prune", "-c", "128", "--chunks", "2")[1] or "yes"
    shutil.rmtree(folder)
    return row


def page(rows: list[dict[str, str]]) -> str:
    """The page: a table, and the reasons of what does not work."""
    columns = ["convert", "logits", "imatrix", "stats", "quantize", "moments", "rounding", "KLD", "plan", "prune"]
    lines = ["| model | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    reasons: list[str] = []
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column, "–")
            if len(value) > 12:
                if value not in reasons:
                    reasons.append(value)
                value = f"({reasons.index(value) + 1})"
            cells.append(value)
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    shown = [re.sub(r"\S*/", "", reason).replace("|", "/")[:300] for reason in reasons]  # without folders
    notes = [f"{number}. `{reason}`" for number, reason in enumerate(shown, 1)]
    return HEAD + "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"


HEAD = f"""# Architectures

`bitladder convert` converts Llama and OLMo-2 itself, and everything else with llama.cpp's own converter
([conversion](convert.md#other-architectures)). This table says what works for random tiny models that transformers
{transformers.__version__} makes. It is written by `python benchmarks/architectures.py --tokenizer FOLDER --docs`.

- **convert**: the architecture as the GGUF names it.
- **logits**: the largest difference from the logits of transformers, as a fraction of their range (F32).
- **imatrix**, **stats**, **quantize**: importance matrix, its statistics, and Q4_K_M with it.
- **moments**: how tokens are weighted for second moments: by gradients, or by positions.
- **rounding**: Q4_K_M with `--rounding best`.
- **KLD**: a base of the full-precision model, and the mean KLD of Q4_K_M.
- **plan**, **prune**: types by measured costs, and what each block is worth.

A number in brackets names the reason below the table. Some lie in the tiny models: a tokenizer that a converter does
not take, keys that transformers leaves out, and rows of 64 weights, where a preset's types are the smallest that fit.
Why DeepSeek V3's logits differ is not known.

"""


def main() -> None:
    """Examines the architectures and prints or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True)
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--work", type=pathlib.Path)
    parser.add_argument("--docs", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or pathlib.Path(temporary)
        rows = []
        for name in arguments.only.split(","):
            rows.append(examine(name, arguments.tokenizer, work))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.docs:
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

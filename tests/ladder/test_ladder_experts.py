"""A ladder of a mixture of experts, from its checkpoint to its card: planned, rounded expert by expert, guarded."""

import json
import pathlib
import subprocess
import sys

import pytest
import tiny_models
import torch
from moe import mixture, write_mixture
from plain_options import plain_options
from transformers import AutoModelForCausalLM

from bitladder.calibrate import MomentsFile
from bitladder.convert import build, convert
from bitladder.convert.upstream import Converter
from bitladder.engine import Model, Request, preset_types
from bitladder.gguf import GgufFile
from bitladder.ladder import run
from bitladder.plan import FeedbackOptions, PlanDecoding, PlanOptions, PriceOptions
from bitladder.quantize import quantize
from bitladder.recipe import read_recipe
from bitladder.report import write_card

SIZES = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 256}
EXPERTS = 4
QUICK = {
    "planning": PlanOptions(
        menu="q3_K,q4_K",
        decoding=PlanDecoding(n_ctx=64),
        prices=PriceOptions(probe_tokens=1000, check_pairs=2),
        feedback=FeedbackOptions(chunks=4, rounds=1, random_recipes=0, exchanges=0),
        bpw_below=0.5,
        bpw_above=0.5,
    ),
    "guard_chunks": 2,
    "tune_guard_chunks": 1,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer, and a GGUF that has it too."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.train_byte_level(folder)
    tiny_models.llama(folder)
    convert(folder, folder / "tokenizer.gguf", outtype="f32")
    return folder


@pytest.fixture
def converter(tokenizer, monkeypatch):
    """In the place of llama.cpp's converter, which is downloaded and asks for tokenizers that it knows."""

    def run_here(program, folder, target, outtype, progress, *, projector=False):
        kind = json.loads((folder / "config.json").read_text())["model_type"].replace("_", "")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        write_mixture(kind, model, tokenizer / "tokenizer.gguf", target, "float16")

    monkeypatch.setattr(build, "run_converter", run_here)
    program = Converter(pathlib.Path("convert_hf_to_gguf.py"), pathlib.Path("python"))
    monkeypatch.setattr(build, "converter_at", lambda path, progress: program)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3moe", "olmoe"])
def test_from_the_checkpoint_to_the_card(kind, tokenizer, converter, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    mixture(kind, num_experts=EXPERTS, num_local_experts=EXPERTS, **SIZES).save_pretrained(checkpoint)
    for file in tokenizer.glob("*token*.json"):
        (checkpoint / file.name).write_bytes(file.read_bytes())
    options = plain_options(
        model=str(checkpoint),
        out=tmp_path / "ladder",
        rungs=("Q3_K_S",),
        mode="quality",
        method="feedback",
        smooth=False,
        n_ctx=64,
        chunks=6,
        imatrix_chunks=12,
        moments_chunks=4,
        tune_chunks=2,
        **QUICK,
        bench=False,
        threads=1,
    )
    run(options)
    write_card(options.out)
    steps = json.loads((options.out / "ladder.json").read_text())["steps"]
    assert steps["moments"]["facts"]["weighting"] == "gradients"
    full = next(path for path in options.out.glob("*.gguf") if path.name.endswith("F16.gguf"))
    rung = next(options.out.glob("*-Q3_K_S.gguf"))
    planned = read_recipe(options.out / "recipes" / "Q3_K_S.toml")
    preset = preset_types(full, Request("Q3_K_S", imatrix=True)).types
    with GgufFile(full) as source, GgufFile(rung) as made:
        for name, tensor in made.tensors.items():
            if "ffn_gate_inp" in name:  # routers stay as llama-quantize leaves them
                assert tensor.type.name == preset[name].name == planned.tensors[name] == "f32"
        stacked = [name for name in made.tensors if "_exps" in name]
        assert len(stacked) == 6
        for name in stacked:  # one type for all experts of a tensor
            assert made.tensors[name].shape == source.tensors[name].shape == (256, 256, EXPERTS)
            assert made.tensors[name].type.name == planned.tensors[name]
        assert made.size <= quantize(full, tmp_path / "naive.gguf", "Q3_K_S").bytes
    scores, naive = (json.loads((options.out / "scores" / f"Q3_K_S{part}.json").read_text()) for part in ("", ".naive"))
    assert 0 < scores["kld"]["value"] < naive["kld"]["value"]
    assert "Q3_K_S" in (options.out / "README.md").read_text()
    with Model(rung):
        pass
    assert run(options).made == ()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_experts(tokenizer, tmp_path):
    """The second moments of 256 experts take 256 MiB in float32; rounding reads them one by one."""
    model, imatrix, moments = (str(tmp_path / name) for name in ("model.gguf", "imatrix.gguf", "moments.gguf"))
    many = {"num_experts": 256, "num_local_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 1}
    sizes = {"hidden_size": 512, "head_dim": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    write_mixture("qwen3moe", mixture("qwen3moe", **many, **sizes), tokenizer / "tokenizer.gguf", pathlib.Path(model))

    def peak(*words):
        """Most bytes of memory of a command."""
        code = "import resource, sys; from bitladder.cli import invoke; code = invoke(sys.argv[1:])\n"
        code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10); sys.exit(code)"
        done = subprocess.run([sys.executable, "-c", code, *words, "-q"], capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    text = ["-f", "pydoc:calibration", "-c", "128", "--chunks", "8", "-t", "1"]
    peak("imatrix", "-m", model, *text, "-o", imatrix)
    peak("calibrate", "-m", model, *text, "-o", moments)
    with MomentsFile(moments) as file:
        assert file.provenance.weighting == "gradients"
        gate = file.shape("blk.0.ffn_gate_exps.weight")
        whole = 4 * gate.matrices * gate.n_in**2
        assert (gate.matrices, whole) == (256, 1 << 28)
        assert file.counts("blk.0.ffn_gate_exps.weight").sum() == 8 * 8 * 128  # chunks of tokens, each to 8 experts
    quantize = ["quantize", "Q4_0", "-m", model, "--imatrix", imatrix, "-t", "1", "-o", str(tmp_path / "quant.gguf")]
    stock = peak(*quantize)
    rounded = peak(*quantize, "--rounding", "feedback", "--moments", moments, "--guard", "none")
    assert rounded - stock < whole / 2
    peak("calibrate", "-m", model, *text, "-o", str(tmp_path / "little.gguf"), "--memory", "0.1")
    with MomentsFile(tmp_path / "little.gguf") as file:  # sums of a block do not fit: positions, in several passes
        assert file.provenance.weighting == "positions"

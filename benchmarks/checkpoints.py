"""Real models from `bitladder run` to the card: KLD of each rung against the preset that llama-quantize makes.

    python benchmarks/checkpoints.py MODEL … [--stories DIR] --calibration TEXT --text TEXT --work DIR

A model is whatever `run` takes. --stories adds stories260K, whose weights (`stories260K.bin`) and tokenizer
(`tok512.bin`) are in DIR as llama2.c has them: a checkpoint of Llama 2's form is made of it. A run makes the presets
too, with the same importance matrix, and pairs both on the same tokens. The last lines are the table of
docs/architectures.md; scores stay in DIR of --work.
"""

import argparse
import json
import pathlib
import resource
import struct

import numpy as np
import safetensors.numpy
from sentencepiece import sentencepiece_model_pb2

from bitladder.cli import invoke


def stories(source: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Writes stories260K as a checkpoint of Hugging Face, and returns its folder."""
    data = (source / "stories260K.bin").read_bytes()
    width, inner, blocks, heads, kv_heads, vocabulary, context = struct.unpack("7i", data[:28])
    values, at = np.frombuffer(data, np.float32, offset=28), 0

    def part(*shape: int) -> np.ndarray:
        nonlocal at
        at += (size := int(np.prod(shape)))
        return values[at - size : at].reshape(shape)

    keys = width // heads * kv_heads
    tensors = {"model.embed_tokens.weight": part(vocabulary, width)}
    for name, *shape in (
        ("input_layernorm", width),
        ("self_attn.q_proj", width, width),
        ("self_attn.k_proj", keys, width),
        ("self_attn.v_proj", keys, width),
        ("self_attn.o_proj", width, width),
        ("post_attention_layernorm", width),
        ("mlp.gate_proj", inner, width),
        ("mlp.down_proj", width, inner),
        ("mlp.up_proj", inner, width),
    ):
        weights = part(blocks, *shape)
        if name in ("self_attn.q_proj", "self_attn.k_proj"):  # halves of a head in the place of neighbours
            pairs = weights.reshape(blocks, -1, width // heads // 2, 2, width)
            weights = pairs.swapaxes(2, 3).reshape(weights.shape)
        for block, weight in enumerate(weights):
            tensors[f"model.layers.{block}.{name}.weight"] = weight
    tensors["model.norm.weight"] = part(width)
    out.mkdir(parents=True, exist_ok=True)
    kept = {name: np.ascontiguousarray(weight) for name, weight in tensors.items()}
    safetensors.numpy.save_file(kept, out / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (out / "config.json").write_text(json.dumps(config))
    (out / "tokenizer.model").write_bytes(pieces((source / "tok512.bin").read_bytes(), vocabulary))
    return out


def pieces(data: bytes, count: int) -> bytes:
    """A SentencePiece model of a tokenizer of llama2.c."""
    model, at = sentencepiece_model_pb2.ModelProto(), 4
    kinds = model.SentencePiece
    for number in range(count):
        score, length = struct.unpack_from("fi", data, at)
        text = data[at + 8 : at + 8 + length].decode()
        at += 8 + length
        byte = 3 <= number < 259
        special = {0: ("<unk>", kinds.UNKNOWN), 1: ("<s>", kinds.CONTROL), 2: ("</s>", kinds.CONTROL)}
        usual = text.replace(" ", "\u2581"), kinds.BYTE if byte else kinds.NORMAL
        model.pieces.add(**dict(zip(("piece", "type"), special.get(number, usual), strict=True)), score=score)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = count
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    return bytes(model.SerializeToString())


def row(name: str, folder: pathlib.Path, rung: str, seconds: float) -> str:
    """A line of the table."""
    ours, theirs = (json.loads((folder / "scores" / f"{rung}{part}.json").read_text()) for part in ("", ".naive"))
    kld, naive, gap = ours["kld"], theirs["kld"], ours["paired"]["kld"]
    figures = [f"{each['value']:.5f} ± {each['error']:.5f}" for each in (kld, naive, gap)]
    ratio = kld["value"] / naive["value"]
    return f"| {name} | {rung} | {' | '.join(figures)} | {ratio:.2f} | {seconds / 60:.0f} |"


def main() -> None:
    """Makes a ladder of each model, one after the other, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--stories", type=pathlib.Path)
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--ladder", default="Q4_K_M")
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--chunks", default="8")
    parser.add_argument("-t", "--threads", default="1")
    parser.add_argument("--work", type=pathlib.Path, required=True)
    options = parser.parse_args()
    models = list(options.models)
    if options.stories:
        models.insert(0, str(stories(options.stories, options.work / "stories260K")))
    texts = [
        word for flag in ("calibration", "text") for text in getattr(options, flag) for word in (f"--{flag}", text)
    ]
    rows = [
        "| model | rung | KLD | of llama-quantize | difference | ratio | CPU minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in models:
        name = pathlib.Path(model).stem
        folder = options.work / f"{name}-ladder"
        words = ["run", model, "-o", str(folder), *texts, "--effort", options.effort, "--ladder", options.ladder]
        before = used()
        code = invoke([*words, "--chunks", options.chunks, "-t", options.threads, "--no-bench", "-q"])
        if code:
            rows.append(f"| {name} | exit code {code} | | | | | |")
            continue
        rows += [row(name, folder, rung, used() - before) for rung in options.ladder.split(",")]
        print(rows[-1], flush=True)
    print("\n".join(rows))


def used() -> float:
    """Seconds of processor time of this process and its children."""
    each = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in each)


if __name__ == "__main__":
    main()

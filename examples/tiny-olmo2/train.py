#!/usr/bin/env python3
"""Train tiny-olmo2, the model that ships with bitladder: train.py OUT --data DIR [--steps N].

An OLMo-2 of 8 blocks and width 256 (6.8M parameters outside the embeddings) with a byte-level BPE tokenizer of
4,096 entries. Needs torch, transformers, tokenizers and the public texts in DIR (laid out as the README beside
this file says). Everything is seeded; with the same versions and thread count the run repeats.

wiki.test.raw is read only at the end, to measure perplexity. The test half of the Python documentation
(`bitladder.text.texts`) is never read.
"""

import argparse
import bz2
import csv
import itertools
import json
import math
import pathlib
import random
import time

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from bitladder.text import builtin_text

SEED = 20261123
VOCABULARY = 4096
LENGTH = 512  # tokens per training sequence
BATCH = 8  # sequences per step
END = "<|endoftext|>"
# The pre-tokenizer of OLMo-2's own tokenizer (cl100k's), so that llama.cpp splits text the same way.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def wiki_articles(text: str) -> list[str]:
    """Cut a wikitext file into pieces of roughly 4,000 characters at paragraph ends."""
    pieces: list[str] = []
    current: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        current.append(line)
        size += len(line)
        if size > 4000:
            pieces.append("".join(current))
            current, size = [], 0
    return [*pieces, "".join(current)]


def documents(data: pathlib.Path) -> list[str]:
    """All training documents; wikitext three times and Python's documentation four, the rest once."""
    wiki = wiki_articles((data / "wikitext2/wikitext2_train_5k.txt").read_text())
    wiki += wiki_articles((data / "wikitext2/wiki.valid.raw").read_text())
    found = wiki * 3 + wiki_articles(builtin_text("calibration")) * 4
    for path in sorted((data / "calibration").glob("*.txt")):
        found += wiki_articles(path.read_text(errors="replace"))
    for path in sorted((data / "mmlu").glob("*/*.csv")):
        for row in csv.DictReader(path.open(newline="")):
            choices = [row[f"choice{i}"] for i in range(4)]
            found.append(f"{row['question']}\n" + "\n".join(choices) + f"\n{choices[int(row['answer'])]}\n")
    for path in sorted((data / "arc").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            task = json.loads(line)
            answers = {choice["label"]: choice["text"] for choice in task["question"]["choices"]}
            found.append(f"{task['question']['stem']}\n{answers[task['answerKey']]}\n")
    with bz2.open(data / "hellaswag/hellaswag_val_full.txt.bz2", "rt") as stream:
        lines = stream.read().splitlines()
    for start in range(0, len(lines) - 5, 6):
        context, label, *endings = lines[start : start + 6]
        found.append(f"{context} {endings[int(label)].strip()}\n")
    return found


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def configuration() -> Olmo2Config:
    return Olmo2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        attention_bias=False,
    )


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate: a short warm-up, a plateau, then a linear fall over the last half."""
    return min(1.0, (step + 1) / 40, max(0.02, 2 * (steps - step) / steps))


def train(model: Olmo2ForCausalLM, tokens: np.ndarray, steps: int, out: pathlib.Path) -> None:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.015, momentum=0.95, weight_decay=0.03),
        torch.optim.AdamW(
            [
                {"params": [model.model.embed_tokens.weight], "lr": 4e-3},
                {"params": [model.lm_head.weight], "lr": 3e-3},
                {"params": norms, "lr": 3e-3},
            ],
            betas=(0.9, 0.97),
            weight_decay=0.0,
        ),
    ]
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    order: list[int] = []
    generator = np.random.default_rng(SEED)
    windows = (len(tokens) - 1) // LENGTH
    started, smooth = time.time(), None
    for step in range(steps):
        if len(order) < BATCH:
            order += generator.permutation(windows).tolist()
        starts = [order.pop() * LENGTH for _ in range(BATCH)]
        rows = torch.from_numpy(np.stack([tokens[s : s + LENGTH + 1] for s in starts]).astype(np.int64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(rows[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if step % 20 == 0 or step == steps - 1:
            seconds = time.time() - started
            rate = (step + 1) * BATCH * LENGTH / seconds
            print(f"step {step}/{steps} loss {smooth:.4f} {rate:.0f} tokens/s {seconds / 60:.1f} min", flush=True)
        if step % 200 == 199:
            save(model, out)


def save(model: Olmo2ForCausalLM, out: pathlib.Path) -> None:
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(out, state_dict=weights)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def perplexity(model: Olmo2ForCausalLM, tokens: np.ndarray, n_ctx: int = 512) -> tuple[float, float]:
    """Perplexity over chunks of n_ctx tokens, the second half of each scored, and its standard error."""
    losses = []
    with torch.inference_mode():
        for start in range(0, len(tokens) - n_ctx + 1, n_ctx):
            row = torch.from_numpy(tokens[start : start + n_ctx].astype(np.int64))[None]
            logits = model(row, use_cache=False).logits[0, n_ctx // 2 : -1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, row[0, n_ctx // 2 + 1 :], reduction="none"))
    nll = torch.cat(losses).double()
    value = nll.mean().exp().item()
    return value, value * math.sqrt(nll.var().item() / len(nll))


def unigram_perplexity(train_tokens: np.ndarray, test_tokens: np.ndarray) -> float:
    """Perplexity of a unigram model with add-one smoothing, its counts from the training tokens."""
    counts = np.bincount(train_tokens, minlength=VOCABULARY) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[test_tokens].mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    options.out.mkdir(parents=True, exist_ok=True)

    texts = documents(options.data)
    random.Random(SEED).shuffle(texts)
    tokenizer = train_tokenizer(texts)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token="<|pad|>", model_max_length=LENGTH
    )
    wrapped.save_pretrained(options.out)
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch(texts)
    tokens = np.fromiter(itertools.chain.from_iterable([*e.ids, end] for e in encoded), dtype=np.uint16)
    print(f"{len(texts)} documents, {sum(map(len, texts))} characters, {len(tokens)} tokens", flush=True)

    model = Olmo2ForCausalLM(configuration())
    outside = sum(p.numel() for n, p in model.named_parameters() if "layers" in n)
    print(f"{outside} parameters outside the embeddings", flush=True)
    train(model, tokens, options.steps, options.out)
    save(model, options.out)

    model = Olmo2ForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    test = np.array(tokenizer.encode((options.data / "wikitext2/wiki.test.raw").read_text()).ids, dtype=np.uint16)
    value, error = perplexity(model, test)
    print(f"wiki.test.raw: {len(test)} tokens, perplexity {value:.2f} ± {error:.2f}")
    print(f"unigram model: perplexity {unigram_perplexity(tokens, test):.2f}")


if __name__ == "__main__":
    main()

"""Random tiny models, made on the fly: the real pipeline runs on them in seconds.

Every function writes into a checkpoint directory, as transformers would save it. Weights are drawn wide enough that
rope, norms and biases all show in the logits.
"""

import io
import json
import pathlib
from typing import Any

import sentencepiece
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from bitladder.convert import bpe as ours

TEXT = """\
The quick brown fox jumps over the lazy dog. It's what they'd call "a test", isn't it? I'VE seen WE'LL do 1234567890.
def main(argument: int) -> None:\n    for i in range(10):\n        print(f"{i}: {argument * 2}")\n\n\treturn None
El veloz murciélago hindú comía feliz cardillo y kiwi. Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.
敏捷的棕色狐狸跳过了懒狗。 いろはにほへと ちりぬるを。 Съешь же ещё этих мягких французских булок. 🙂🚀
The model reads the text, the text reads the model; the weights of the model are numbers, and the numbers are weights.
"""
AWKWARD = (
    "Hello, world! It's I'VE they'Ll DON'T 'tis 'S y'all'd've\n"
    "1 12 123 1234 12345 3.14159 1,000,000 ½ ² Ⅷ ٣\n"
    "  two leading, trailing two  \n\n\n\n three\n \n\t\n\t\ttabs\tinside \r\nwindows\r\n\r\n"
    "def f(x):\n    return x**2  # power\n\n\n\nif (a!=b && c>=d) { s[i++] = '\\0'; }\n"
    "🙂🚀 👩‍👩‍👧 é é ﬁ — … “quotes” 中文字符 日本語 한국어 Привет ñandú العربية हिन्दी ไทย\n"
    "a\u200bb c　d     spaces      and\u2028line <not_special> <|nor|> http://x.y/?q=1&r=%20#z\n"
    "ʼn ΑΒΓ αβγ ŁÓDŹ łódź CamelCaseAndSHOUTING snake_case_name __init__ ==== ---- ++++ ''' \"\"\" ``` "
)


def train_byte_level(folder: pathlib.Path, vocab_size: int = 384, style: str = "llama3", bos: bool = True) -> Any:
    """Train a byte-level BPE and save it with special tokens <s>, </s> (control) and <extra> (not special).

    `style` is the pre-tokenizer: gpt2, smollm, llama3, qwen2, gpt4o, tekken.
    """
    regex = {"llama3": ours.LLAMA3, "qwen2": ours.QWEN2, "gpt4o": ours.GPT4O, "tekken": ours.TEKKEN}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style in ("gpt2", "smollm"))
    before = {"smollm": [pre_tokenizers.Digits(individual_digits=True)], "gpt2": []}
    steps = before.get(style) if style in before else [pre_tokenizers.Split(Regex(regex[style]), "isolated")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*(steps or []), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False, special=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    return fast


def train_sentencepiece(folder: pathlib.Path, vocab_size: int = 400) -> Any:
    """Train a SentencePiece BPE with byte fallback, as Llama 2's, and save tokenizer.model. Returns its processor."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def llama(folder: pathlib.Path, *, dtype: str = "float32", shard: str = "5GB", seed: int = 0, **config: Any) -> Any:
    """A random Llama with grouped-query attention; `config` overrides LlamaConfig. Returns the model."""
    return _save(LlamaForCausalLM, LlamaConfig(**_sizes(config)), folder, dtype=dtype, shard=shard, seed=seed)


def olmo2(folder: pathlib.Path, *, dtype: str = "float32", shard: str = "5GB", seed: int = 0, **config: Any) -> Any:
    """A random OLMo 2; `config` overrides Olmo2Config. Returns the model."""
    return _save(Olmo2ForCausalLM, Olmo2Config(**_sizes(config)), folder, dtype=dtype, shard=shard, seed=seed)


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        **config,
    }


def _save(kind: Any, config: Any, folder: pathlib.Path, *, dtype: str, shard: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:  # norms are made as ones and biases as zeros, which would hide a mistake
                weight.copy_(torch.rand_like(weight) + (0.5 if "norm" in name else -0.5))
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def configure(folder: pathlib.Path, without: tuple[str, ...] = (), **values: Any) -> None:
    """Changes config.json of a checkpoint: takes keys away and sets others."""
    path = folder / "config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(kept | values))

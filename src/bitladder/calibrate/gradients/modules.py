"""transformers' own modules over the tensors of a GGUF file.

A model is made without weights. Its linear layers are then replaced by products with the file's tensors, which are read
when they are needed (`layers.Layers`); all other parameters, which are vectors, are filled in. Tensors are found by
gguf's map of names. llama.cpp's converter changes two things that have to be undone: rows of q and k are permuted where
its rope rotates neighbours, and 1 is added to the weights of some norms. The experts of a block are one module, called
with the experts that the router chose for each token; its stacked weights are tensors of the file.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any

import gguf
import torch
from torch import nn

from bitladder.calibrate.gradients.torch_weights import Layers, Routed
from bitladder.calibrate.gradients.usable import DIVISORS, configuration
from bitladder.engine import Model
from bitladder.errors import GradientsError
from bitladder.gguf import EMBEDDING, GgufFile

_PERMUTED = ("attn_q", "attn_k")
_STACKED = {"gate_up_proj", "down_proj"}  # parameters of a module of experts
_XIELU = {"alpha_p", "alpha_n"}
_ROUTER, _CHOICE = "ffn_gate_inp", "exp_probs_b.bias"  # what is added for the choice of experts


class _Product(nn.Module):
    """A linear layer whose weight and bias are tensors of the file; `heads` of its outputs are permuted, if any."""

    def __init__(self, layers: Layers, prefix: str, heads: int = 0) -> None:
        super().__init__()
        self._layers, self._prefix, self._heads = layers, prefix, heads

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self._layers.linear(inputs, self._prefix)
        if not self._heads:
            return outputs
        # Neighbours (2i, 2i + 1) of a head become the halves i and n/2 + i.
        pairs = outputs.view(*outputs.shape[:-1], self._heads, -1, 2)
        return pairs.transpose(-1, -2).flatten(-3)


class _Experts(nn.Module):
    """The experts of a block: each multiplies the tokens that are routed to it.

    Parameters:
        layers: the products.
        block: number of the block.
        gate: makes [rows, f] of the outputs of gate and up, [rows, 2 f].
    """

    def __init__(self, layers: Layers, block: int, gate: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._layers, self._gate = layers, gate
        self._names = [f"blk.{block}.ffn_{part}_exps" for part in ("gate", "up", "down")]
        self._count = layers.weights.matrices(f"{self._names[0]}.weight")

    def forward(self, inputs: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Inputs [tokens, width]; the experts of each token, and what each counts, [tokens, used]."""
        order = chosen.reshape(-1).argsort(stable=True)
        tokens = order // chosen.shape[1]
        routed = Routed(tuple(chosen.reshape(-1).bincount(minlength=self._count).tolist()), tokens)
        gate, up, down = self._names
        rows = inputs[tokens]
        inner = self._gate(torch.cat([self._layers.linear(rows, name, routed) for name in (gate, up)], -1))
        outputs = self._layers.linear(inner, down, routed) * shares.reshape(-1)[order, None]
        return torch.zeros_like(inputs).index_add(0, tokens, outputs)


class _Embedding(nn.Module):
    """The embeddings of the file, times a scale."""

    def __init__(self, layers: Layers, scale: float) -> None:
        super().__init__()
        self._layers, self._scale = layers, scale

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self._layers.weights.rows(EMBEDDING, tokens.reshape(-1)).view(*tokens.shape, -1)
        return rows if self._scale == 1 else rows * self._scale


class _Recorder(nn.Module):
    """In the place of a block: keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: torch.Tensor = torch.empty(0)
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def forward(self, stream: torch.Tensor, *positional: Any, **named: Any) -> torch.Tensor:
        self.stream, self.arguments = stream, (positional, named)
        return stream


class Modules:
    """The blocks of a model, what comes before them, and what comes behind the head.

    Parameters:
        file: the model, open.
        layers: the products with its weights.

    Attributes:
        blocks: number of blocks.
        width: numbers of a hidden state.
        head_dim: numbers of a head of queries.
        window: positions that some block sees at most; None if all see all.
        used_experts: experts that multiply a token; 1 in a dense model.

    Raises:
        GradientsError: transformers has no such model, or the file lacks a tensor of it.
    """

    def __init__(self, file: GgufFile, layers: Layers) -> None:
        from transformers import AutoModelForCausalLM

        self._name, self._layers = file.path.name, layers
        config = configuration(file)
        # The fused attention of torch has no cap of its scores.
        config._attn_implementation = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
        try:
            with torch.device("meta"):
                self._causal: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            problem = str(error).split(". ")[0]  # what follows is how to report it
            raise GradientsError(f"{self._name}: transformers makes no such model: {problem}") from error
        self._causal.eval().requires_grad_(False)
        self._base = getattr(self._causal, self._causal.base_model_prefix)
        self.blocks: int = config.num_hidden_layers
        self.width: int = config.hidden_size
        self.head_dim: int = config.head_dim
        self.window: int | None = config.sliding_window
        self.used_experts: int = getattr(config, "num_experts_per_tok", None) or 1
        architectures = {name: each for each, name in gguf.MODEL_ARCH_NAMES.items()}
        if file.architecture not in architectures:
            raise GradientsError(f"{self._name}: gguf does not know the architecture {file.architecture!r}")
        self._names = gguf.get_tensor_name_map(architectures[file.architecture], self.blocks)
        self._stack = self._block_list()
        self._recorders = [_Recorder() for _ in range(self.blocks)]
        self._length = 0
        self._recording = threading.Lock()  # the model without its blocks, or without all but the head, runs for one
        heads = {}
        with Model(file.path, vocab_only=True) as vocabulary:
            permuted = vocabulary.rotates_neighbours and not self._rotates_neighbours()
        if permuted:
            heads = dict(zip(_PERMUTED, (config.num_attention_heads, config.num_key_value_heads), strict=True))
        self._causal.set_output_embeddings(nn.Identity())
        self._fill(file, heads)
        self._norm = self._final_norm()
        self._after: Callable[[torch.Tensor], torch.Tensor] | None = self._behind_head
        probe = torch.linspace(-3, 3, 7).expand(1, 7)
        if torch.equal(self._behind_head(probe), probe):
            self._after = None

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The residual stream [1, length, width] before the first block, of tokens [length]."""
        with self._recording:
            self._record({"input_ids": tokens[None]})
            return self._recorders[0].stream

    def run(self, stream: torch.Tensor, first: int, stop: int, *, final: bool) -> torch.Tensor:
        """Blocks first…stop−1, and the final norm, over a residual stream [1, length, width]."""
        with self._recording:
            if self._length != stream.shape[1]:
                self._record({"inputs_embeds": stream.detach()})
        for block in range(first, stop):
            positional, named = self._recorders[block].arguments
            out = self._stack[block](stream, *positional, **named)
            stream = out[0] if isinstance(out, tuple) else out
        return self._final(stream) if final else stream

    def after_head(self, raw: torch.Tensor) -> torch.Tensor:
        """The logits, from the products with the head: scaled or capped where the model does that."""
        return raw if self._after is None else self._after(raw)

    def before_head(self, gradient: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        """The derivative by the products with the head, from that by the logits."""
        if self._after is None:
            return gradient
        with torch.enable_grad():
            leaf = raw.detach().requires_grad_()
            (down,) = torch.autograd.grad(self._after(leaf), leaf, gradient)
        return down

    def _behind_head(self, raw: torch.Tensor) -> torch.Tensor:
        """What the model does to the products with its head: the model runs without blocks and head."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        class Given(nn.Module):
            def forward(self, *_: Any, **__: Any) -> Any:
                return MoeModelOutputWithPast(last_hidden_state=raw[None])

        prefix = self._causal.base_model_prefix
        with self._recording:
            setattr(self._causal, prefix, Given())
            try:
                logits: torch.Tensor = self._causal(input_ids=torch.zeros(1, len(raw), dtype=torch.int64)).logits[0]
            finally:
                setattr(self._causal, prefix, self._base)
        return logits

    @torch.no_grad()
    def _record(self, inputs: dict[str, torch.Tensor]) -> None:
        """Runs the model without its blocks, to see what these are called with."""
        name, whole = self._stack_name, self._stack
        setattr(self._base, name, nn.ModuleList(self._recorders))
        try:
            self._base(**inputs, use_cache=False)
        finally:
            setattr(self._base, name, whole)
        self._length = next(iter(inputs.values())).shape[1]

    def _block_list(self) -> nn.ModuleList:
        for name, module in self._base.named_children():
            if isinstance(module, nn.ModuleList) and len(module) == self.blocks:
                self._stack_name = name
                return module
        raise GradientsError(f"{self._name}: the blocks of transformers' model are not in a list")

    def _final_norm(self) -> Any:
        """The norm behind the blocks. gguf has no name for one without weights (OLMo 1)."""
        prefix, children = self._causal.base_model_prefix, dict(self._base.named_children())
        named = [child for name, child in children.items() if self._names.get_name(f"{prefix}.{name}") == "output_norm"]
        plain = [child for name, child in children.items() if name.endswith("norm") and not list(child.parameters())]
        if not (named or plain):
            raise GradientsError(f"{self._name}: transformers' model has no norm behind its blocks")
        return (named or plain)[0]

    def _rotates_neighbours(self) -> bool:
        """Whether the model itself rotates neighbours, so that its q and k are not permuted."""
        rotate = getattr(sys.modules[type(self._base).__module__], "rotate_half", None)
        return rotate is not None and rotate(torch.arange(4.0)).tolist() == [-1, 0, -3, 2]

    def _tensor(self, module: str) -> str:
        """The name that gguf has for a module."""
        name = self._names.get_name(module)
        if name is None:
            raise GradientsError(f"{self._name}: gguf has no name for transformers' {module}")
        return str(name)

    def _fill(self, file: GgufFile, heads: dict[str, int]) -> None:
        """Puts the file's tensors into the model; `heads` says of which outputs the order is undone."""
        for name, module in list(self._causal.named_modules()):
            parent = self._causal.get_submodule(name.rpartition(".")[0])
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, nn.Linear):
                tensor = self._tensor(name)
                product = _Product(self._layers, tensor, heads.get(tensor.split(".")[-1], 0))
                setattr(parent, name.rpartition(".")[2], product)
            elif isinstance(module, nn.Embedding) and name.startswith(self._causal.base_model_prefix):
                if self._tensor(name) + ".weight" != EMBEDDING:
                    raise GradientsError(f"{self._name}: embeddings of positions have no gradients here")
                scale = float(getattr(module, "scalar_embed_scale", None) or 1.0)
                setattr(parent, name.rpartition(".")[2], _Embedding(self._layers, scale))
            elif any(part.endswith("inv_freq") for part, _ in module.named_buffers(recurse=False)):
                setattr(parent, name.rpartition(".")[2], self._rotary(module, file))
            elif own.keys() == _XIELU:
                self._fill_xielu(name, module, file)
            elif own.keys() & _STACKED:
                setattr(parent, name.rpartition(".")[2], self._experts(name, module, own))
            elif own:
                self._fill_vectors(name, module, own)
        left = [name for name, buffer in self._causal.named_buffers() if buffer.is_meta]
        left += [name for name, parameter in self._causal.named_parameters() if parameter.is_meta]
        if left:
            raise GradientsError(f"{self._name}: transformers' {left[0]} is in no tensor of the file")

    def _fill_xielu(self, name: str, module: Any, file: GgufFile) -> None:
        """Fills the parameters of an activation that has some, of which the metadata has a list (Apertus)."""
        for part in (*_XIELU, "beta", "eps"):
            values = file.get(f"xielu.{part}")
            if not isinstance(values, list) or len(values) < self.blocks:
                raise GradientsError(f"{self._name}: the metadata has no xielu.{part} of each block")
            filled = torch.tensor([float(values[self._block(name)])])
            setattr(module, part, nn.Parameter(filled, requires_grad=False) if part in _XIELU else filled[0])

    def _experts(self, name: str, module: Any, own: dict[str, nn.Parameter]) -> _Experts:
        usual = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
        if own.keys() != _STACKED or any(getattr(module, key, value) != value for key, value in usual.items()):
            raise GradientsError(f"{self._name}: transformers' experts {name} have a form without gradients here")
        return _Experts(self._layers, self._block(name), module._apply_gate)

    def _block(self, module: str) -> int:
        """The block that a module is in."""
        return int(module.partition(f".{self._stack_name}.")[2].split(".")[0])

    def _fill_vectors(self, name: str, module: Any, own: dict[str, nn.Parameter]) -> None:
        router = own.keys() == {"weight"} and own["weight"].dim() == 2
        tensor = f"blk.{self._block(name)}.{_ROUTER}" if router else self._tensor(name)
        for part, parameter in own.items():
            if not self._layers.weights.has(f"{tensor}.{part}"):
                raise GradientsError(f"{self._name}: there is no tensor {tensor}.{part}")
            values = self._layers.weights.get(f"{tensor}.{part}")
            if values.shape != parameter.shape:
                raise GradientsError(f"{self._name}: {tensor}.{part} has another shape than transformers' {name}")
            setattr(module, part, nn.Parameter(values.clone(), requires_grad=False))
        if router:
            for part, _ in module.named_buffers(recurse=False):
                if self._layers.weights.has(f"blk.{self._block(name)}.{_CHOICE}"):
                    setattr(module, part, self._layers.weights.get(f"blk.{self._block(name)}.{_CHOICE}").clone())
            return
        if "weight" in own and _adds_one(module):
            module.weight = nn.Parameter(module.weight - 1, requires_grad=False)

    def _rotary(self, module: Any, file: GgufFile) -> nn.Module:
        rotary: Any = type(module)(config=self._causal.config)
        if DIVISORS in file.tensors:
            divisors = self._layers.weights.get(DIVISORS)
            rotary.inv_freq = rotary.inv_freq / divisors
        built: nn.Module = rotary
        return built

    def _final(self, stream: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._norm(stream)
        return result


def _adds_one(norm: Any) -> bool:
    """Whether a norm multiplies by 1 + weight: without weight and bias it then gives more than zeros."""
    kept = {part: parameter.data for part, parameter in norm.named_parameters(recurse=False)}
    try:
        for part, values in kept.items():
            getattr(norm, part).data = torch.zeros_like(values)
        with torch.no_grad():
            return bool(norm(torch.linspace(1, 2, len(kept["weight"]))[None]).abs().sum() > 0)
    finally:
        for part, values in kept.items():
            getattr(norm, part).data = values

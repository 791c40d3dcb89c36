"""The engine against transformers, numpy and the gguf package."""

import gguf
import numpy as np
import pytest

from bitladder.engine import (
    Context,
    Decoding,
    HiddenStates,
    Model,
    RowKernels,
    Weights,
    all_types,
    native,
    type_by_name,
)
from bitladder.engine.native import ggml
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile

WRITABLE = ["f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq4_nl"]


@pytest.mark.parametrize("layers", [0, 99])
def test_without_gpu_layers_nothing_is_given_to_a_gpu(tiny_gguf, monkeypatch, layers):
    asked = []
    init = native.llama.llama_init_from_model
    monkeypatch.setattr(
        native.llama,
        "llama_init_from_model",
        lambda model, params: [asked.append(params.op_offload), init(model, params)][1],
    )
    with Model(tiny_gguf, gpu_layers=layers) as model, Context(model, Decoding(n_ctx=64)):
        pass
    assert asked == [layers > 0]


@pytest.fixture(scope="module")
def kernels():
    kernels = RowKernels(2)
    yield kernels
    kernels.close()


@pytest.mark.parametrize("name", WRITABLE)
def test_dequantize_equals_gguf_package(kernels, name):
    kind = type_by_name(name)
    weights = np.random.default_rng(1).standard_normal((40, 512)).astype(np.float32)
    data = kernels.quantize(weights, kind)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType(kind.id))
    assert np.array_equal(kernels.dequantize(data, kind, 512), expected)
    assert np.abs(expected - weights).max() < 2


def test_every_type_that_can_be_written_is_closer_with_more_bits(kernels):
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((8, 512)).astype(np.float32)
    importance = rng.random(512).astype(np.float32) + 0.1
    errors = {}
    for name in ("iq1_s", "iq2_xxs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs", "q5_K", "q6_K", "q8_0"):
        kind = type_by_name(name)
        error = kernels.dequantize(kernels.quantize(weights, kind, importance), kind, 512) - weights
        errors[kind.bpw] = float((error**2 * importance).mean())
    assert list(errors) == sorted(errors)
    assert list(errors.values()) == sorted(errors.values(), reverse=True)


def test_bytes_do_not_depend_on_threads():
    weights = np.random.default_rng(3).standard_normal((999, 768)).astype(np.float32)
    results = []
    for threads in (1, 2, 5):
        kernels = RowKernels(threads)
        results.append(kernels.quantize(weights, type_by_name("q4_K"), np.arange(768, dtype=np.float32)))
        kernels.close()
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_kernel_errors(kernels):
    with pytest.raises(BitladderError, match="576"):
        kernels.quantize(np.zeros((2, 576), np.float32), type_by_name("q4_K"))
    with pytest.raises(BitladderError, match="importance matrix"):
        kernels.quantize(np.zeros((2, 256), np.float32), type_by_name("iq2_xxs"))
    with pytest.raises(BitladderError, match="NaN"):
        kernels.quantize(np.full((2, 256), np.nan, np.float32), type_by_name("q8_0"))
    with pytest.raises(BitladderError, match="q4_K"):
        type_by_name("q4_X")


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_half_precision_has_the_bits_of_the_library(kernels, name):
    """All exponents and both signs, numbers halfway between two others among them, against ggml's portable kernel."""
    kind, most = type_by_name(name), 65519.0 if name == "f16" else 3.3e38
    bits = np.random.default_rng(5).integers(0, 1 << 32, 1 << 18, dtype=np.uint64).astype(np.uint32)
    bits[::2] &= np.uint32(0xFFFFF000 if name == "f16" else 0xFFFF8000)
    weights = bits.view(np.float32)
    weights = weights[np.isfinite(weights) & (np.abs(weights) < most)][: 1 << 17].reshape(1, -1)
    expected = np.empty((1, 2 * weights.size), np.uint8)
    assert ggml.ggml_quantize_chunk(kind.id, weights.ctypes.data, expected.ctypes.data, 0, 1, weights.size, None)
    assert np.array_equal(kernels.quantize(weights, kind), expected)
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(BitladderError, match="NaN or Inf"):
            kernels.quantize(np.array([[1, wrong]], np.float32), kind)


def test_types_come_from_the_library():
    sizes = gguf.constants.GGML_QUANT_SIZES
    for number, kind in all_types().items():
        known = next((t for t in sizes if t.value == number), None)
        if known is not None and kind.name != "q8_1":  # never stored; the gguf package counts its sum as F32
            assert (kind.block, kind.block_bytes) == sizes[known]


def test_abi_check_notices_a_shifted_structure(monkeypatch):
    native.check_abi()
    real = native.llama.llama_model_quantize_default_params

    def shifted():
        params = real()
        params.max_buf_size = 0
        return params

    monkeypatch.setattr(native.llama, "llama_model_quantize_default_params", shifted)
    with pytest.raises(BitladderError, match="llama_model_quantize_params"):
        native.check_abi()


def decode(context, tokens, outputs=None):
    context.clear()
    n = len(tokens)
    context.decode(tokens, np.arange(n), np.zeros(n, int), np.ones(n, bool) if outputs is None else outputs)
    return context.logits().copy()


class Recorder:
    def __init__(self, only=None):
        self.only, self.inputs, self.experts = only, {}, {}

    def wants(self, seen):
        return self.only is None or seen.weight in self.only

    def see(self, seen, inputs, experts):
        self.inputs[seen.weight] = inputs.copy()
        self.experts[seen.weight] = experts


def test_hidden_states_times_the_head_give_the_logits(tiny_gguf, kernels):
    states = HiddenStates("output.weight")
    with Model(tiny_gguf) as model, Context(model, Decoding(n_ctx=64), observer=states) as context:
        tokens = model.tokenize("The assert statement inserts debugging assertions into a program.")
        outputs = np.arange(len(tokens)) % 3 == 0
        logits = decode(context, tokens, outputs)
    with GgufFile(tiny_gguf) as file:
        head = file.tensors["output.weight"]
        matrix = kernels.dequantize(file.read(head), head.type, head.width)
    hidden = states.take()
    assert hidden.shape == (outputs.sum(), 256) and not states.take().size
    assert np.abs(hidden @ matrix.T - logits).max() < 2e-3 * np.ptp(logits)


def test_every_weight_is_seen(tiny_gguf):
    recorder = Recorder()
    with Model(tiny_gguf) as model, Context(model, Decoding(n_ctx=64), observer=recorder) as context:
        decode(context, model.tokenize("one two three four"))
    with GgufFile(tiny_gguf) as file:
        matrices = {name for name, t in file.tensors.items() if len(t.shape) == 2 and name != "token_embd.weight"}
    assert set(recorder.inputs) == matrices


def test_swap_and_restore_give_equal_bits(tiny_gguf):
    with Model(tiny_gguf, mmap=False, repack=False) as model:
        weights = Weights(model)
        tokens = model.tokenize("while expression: the suite is executed")
        with Context(model, Decoding(n_ctx=64)) as context:
            before = decode(context, tokens)
            for name in ("blk.3.ffn_up.weight", "token_embd.weight"):
                old = weights.get(name)
                weights.set_bytes(name, np.zeros_like(old))
                assert np.abs(decode(context, tokens) - before).max() > 1e-3
                weights.set_bytes(name, old)
                assert np.array_equal(decode(context, tokens), before)
        with pytest.raises(BitladderError, match="blk.9"):
            weights.get("blk.9.ffn_up.weight")
        with pytest.raises(BitladderError, match="bytes"):
            weights.set_bytes("blk.0.ffn_up.weight", np.zeros(3, np.uint8))
    with Model(tiny_gguf) as model, pytest.raises(BitladderError, match="mmap=False"):
        Weights(model)


def test_sequences_side_by_side_equal_sequences_alone(tiny_gguf):
    with Model(tiny_gguf) as model:
        rows = [model.tokenize("a list of expressions")[:3], model.tokenize("raise an exception")[:3]]
        with Context(model, Decoding(n_ctx=32), n_seq=2) as context:
            context.decode(np.concatenate(rows), [0, 1, 2] * 2, [0] * 3 + [1] * 3, [True] * 6)
            together = context.logits().copy()
        with Context(model, Decoding(n_ctx=32)) as context:
            alone = np.concatenate([decode(context, row) for row in rows])
    assert np.abs(together - alone).max() < 2e-3 * np.ptp(alone)


def test_an_observer_that_raises_stops_decoding(tiny_gguf):
    class Broken(Recorder):
        def see(self, seen, inputs, experts):
            raise KeyError(seen.weight)

    with (
        Model(tiny_gguf) as model,
        Context(model, Decoding(n_ctx=64), observer=Broken()) as context,
        pytest.raises(KeyError, match="blk.0"),
    ):
        decode(context, [5, 6, 7])


def test_load_errors(tmp_path, tiny_gguf):
    with pytest.raises(BitladderError, match="no such model"):
        Model(tmp_path / "absent.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_gguf.read_bytes()[:100_000])
    with pytest.raises(BitladderError, match=r"broken.gguf does not load: \w+"):
        Model(broken)

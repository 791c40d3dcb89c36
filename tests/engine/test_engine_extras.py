"""Special layouts of weights are used only where a multiplication with them is right."""

import subprocess

import numpy as np
import pytest

from bitladder.engine import Context, Decoding, Model, cpu_kernels, native
from bitladder.quantize import quantize


@pytest.mark.parametrize(
    ("buffers", "code", "expected"),
    [([b"CPU_REPACK"], None, True), ([b"AMX", b"CPU_REPACK"], 0, True), ([b"AMX"], 1, False), ([b"AMX"], -11, False)],
)
def test_amx_is_tried_where_it_is_and_nothing_else(buffers, code, expected, monkeypatch):
    class Process(subprocess.Popen):
        def __init__(self, command, **options):
            assert code is not None, "nothing is to be tried"
            super().__init__([*command[:1], "-c", f"import os; os._exit({code})"], **options)

    monkeypatch.setattr(cpu_kernels, "_extra_buffers", lambda: [(name, 1) for name in buffers])
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(cpu_kernels, "begin_check", cpu_kernels.begin_check.__wrapped__)
    assert cpu_kernels.extras_work.__wrapped__() is expected


def test_where_no_process_can_be_started_they_do_not_work(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(cpu_kernels, "_extra_buffers", lambda: [(b"AMX", 1)])
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert cpu_kernels.begin_check.__wrapped__() is False


def test_what_is_tried_tells_right_from_wrong(monkeypatch):
    plain = native.llama._lib.ggml_backend_cpu_buffer_type
    plain.restype = native.ctypes.c_void_p
    assert cpu_kernels._multiply(plain())
    real = cpu_kernels.quantize_rows
    monkeypatch.setattr(cpu_kernels, "quantize_rows", lambda weights, kind: real(weights[::-1], kind))
    assert not cpu_kernels._multiply(plain())


def test_a_quantized_model_decodes_alike_with_and_without(tiny_gguf, tmp_path):
    quant = quantize(tiny_gguf, tmp_path / "q.gguf", "Q4_0").path
    found = []
    for repack in (True, False):
        with Model(quant, repack=repack) as model, Context(model, Decoding(n_ctx=64, threads=1)) as context:
            context.decode(range(40), range(40), [0] * 40, [True] * 40)
            found.append(context.logits().copy())
    assert np.abs(found[0] - found[1]).max() < 0.02 * np.ptp(found[1])

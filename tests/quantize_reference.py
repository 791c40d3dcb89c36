"""A small model to quantize, and llama-quantize to compare with: the tool, or the library told what the tool tells it.

An option set is a llama-quantize command line without the files, such as ["--pure", "Q4_K_M"].
"""

import ctypes
import os
import pathlib

import numpy as np
import tiny_models

from bitladder.calibrate import Imatrix, ImatrixEntry, read_imatrix, write_imatrix
from bitladder.convert import convert
from bitladder.engine import preset_number, type_by_name
from bitladder.engine.native import llama
from bitladder.gguf import GgufFile

# What bitladder writes otherwise: names without folders, and two keys of its own.
OWN_KEYS = {"bitladder.version", "bitladder.recipe.sha256"}
WITHOUT_FOLDERS = {"quantize.imatrix.file", "quantize.imatrix.dataset"}


def make_model(folder, family=tiny_models.llama, **config):
    """A random F16 model with rows of 256 and 288 weights (ffn_down: no multiple of 256)."""
    sizes = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 4, "num_key_value_heads": 1}
    family(folder / "checkpoint", dtype="float16", **sizes | config)
    tiny_models.train_byte_level(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "model.gguf", outtype="f16")
    return folder / "model.gguf"


def make_imatrix(model, out):
    """An importance matrix with random entries for all matrices of a model's blocks and its head."""
    rng = np.random.default_rng(1)
    entries = {}
    with GgufFile(model) as file:
        for name, tensor in file.tensors.items():
            if len(tensor.shape) > 1 and name != "token_embd.weight":
                entries[name] = ImatrixEntry(rng.chisquare(1, (1, tensor.width)) * 512, np.array([512]))
    write_imatrix(Imatrix(entries, ["text.txt"], 1, 512), out)
    return out


def reference(tools, source, out, arguments):
    """Quantize with llama-quantize, or where there are no tools with the library; returns what to compare with."""
    if tools is not None:
        *options, preset = arguments
        tools.run("llama-quantize", *options, source, out, preset, 2)
    else:
        library_quantize(source, out, arguments)
    return out


def library_quantize(source, out, arguments):  # noqa: PLR0912
    """llama_model_quantize with the parameters that tools/quantize/quantize.cpp makes of its arguments."""
    params = llama.llama_model_quantize_default_params()
    entries, overrides, kv, names = {}, [], [], {"--include-weights": [], "--exclude-weights": []}
    *options, preset = arguments
    rest = iter(options)
    for option in rest:
        match option:
            case "--pure":
                params.pure = True
            case "--leave-output-tensor":
                params.quantize_output_tensor = False
            case "--allow-requantize":
                params.allow_requantize = True
            case "--output-tensor-type":
                params.output_tensor_type = type_by_name(next(rest)).id
            case "--token-embedding-type":
                params.token_embedding_type = type_by_name(next(rest)).id
            case "--tensor-type":
                overrides.append(next(rest))
            case "--tensor-type-file":
                overrides += pathlib.Path(next(rest)).read_text().split()
            case "--imatrix":
                entries = {n: e.means().reshape(-1) for n, e in read_imatrix(next(rest)).entries.items()}
            case "--override-kv":
                kv.append(next(rest))
            case "--prune-layers":
                layers = [*sorted(map(int, next(rest).split(","))), -1]
                params.prune_layers = (ctypes.c_int32 * len(layers))(*layers)
            case _:
                names[option].append(next(rest))
    for part in names["--exclude-weights"]:
        entries = {n: e for n, e in entries.items() if part not in n}
    if names["--include-weights"]:
        entries = {n: e for n, e in entries.items() if any(part in n for part in names["--include-weights"])}
    params.only_copy = preset == "COPY"
    params.ftype = preset_number("F32" if preset == "COPY" else preset)
    keep = [_imatrix(params, entries), _overrides(params, overrides), _kv(params, kv)]
    assert llama.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)) == 0, keep


def _imatrix(params, entries):
    if not entries:
        return None
    array = (llama.llama_model_imatrix_data * (len(entries) + 1))()
    for slot, (name, values) in zip(array, entries.items(), strict=False):
        slot.name, slot.size = name.encode(), values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = array
    return array, entries


def _overrides(params, texts):
    array = (llama.llama_model_tensor_override * (len(texts) + 1))()
    for slot, text in zip(array, texts, strict=False):
        pattern, _, kind = text.partition("=")
        slot.pattern, slot.type = pattern.lower().encode(), type_by_name(kind).id
    if texts:
        params.tt_overrides = array
    return array


def _kv(params, texts):
    array = (llama.llama_model_kv_override * (len(texts) + 1))()
    for slot, text in zip(array, texts, strict=False):
        key, _, rest = text.partition("=")
        kind, _, value = rest.partition(":")
        slot.key = key.encode()
        slot.tag = {"int": 0, "float": 1, "bool": 2, "str": 3}[kind]
        match kind:
            case "int":
                slot.value.val_i64 = int(value)
            case "float":
                slot.value.val_f64 = float(value)
            case "bool":
                slot.value.val_bool = value == "true"
            case "str":
                slot.value.val_str = value.encode()
    if texts:
        params.kv_overrides = array
    return array


def same_tensors(ours, theirs):
    """Assert that two files have the same tensors, in order, with the same types and bytes."""
    with GgufFile(ours) as a, GgufFile(theirs) as b:
        types = {name: tensor.type.name for name, tensor in a.tensors.items()}
        assert types == {name: tensor.type.name for name, tensor in b.tensors.items()}
        assert list(a.tensors) == list(b.tensors)
        for name, tensor in a.tensors.items():
            assert tensor.shape == b.tensors[name].shape, name
            assert np.array_equal(a.read(tensor), b.read(b.tensors[name])), name


def same_metadata(ours, theirs, *, except_for=frozenset()):
    """Assert that two files have the same metadata in the same order, but for what is documented."""
    with GgufFile(ours) as a, GgufFile(theirs) as b:
        different = OWN_KEYS | WITHOUT_FOLDERS | except_for
        kept = {key: value for key, value in a.metadata.items() if key not in different}
        assert kept == {key: value for key, value in b.metadata.items() if key not in different}
        assert list(kept) == [key for key in b.metadata if key not in different]

"""Files on which the library ends the process: one line that names the file, exit code 1, nothing half-written."""

import subprocess
import sys

import gguf
import numpy as np
import pytest


def rewritten(path, out, change):
    """The tiny model with other metadata."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "olmo2")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            value = change(key, field.contents())
            writer.add_key_value(key, value, field.types[0], sub_type=field.types[-1] if array else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def duplicate_token(key, value):
    return [value[0], value[0], *value[2:]] if key == "tokenizer.ggml.tokens" else value


def no_heads(key, value):
    return 0 if key == "olmo2.attention.head_count" else value


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("change", "cause"), [(duplicate_token, "GGML_ASSERT"), (no_heads, "SIGFPE")])
def test_a_death_in_the_library_is_one_line(change, cause, tiny_gguf, tmp_path):
    model = rewritten(tiny_gguf, tmp_path / "broken.gguf", change)
    words = [
        "imatrix",
        "-m",
        str(model),
        "-f",
        "pydoc:test",
        "-c",
        "64",
        "--chunks",
        "1",
        "-o",
        str(tmp_path / "i.gguf"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "bitladder", *words, "-q"], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "llama.cpp stopped with broken.gguf" in done.stderr and cause in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]

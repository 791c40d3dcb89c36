"""Files on which the library ends the process: one line that names the file, exit code 1, nothing half-written."""

import subprocess
import sys

import pytest
from rewritten import rewritten


def duplicate_token(key, value):
    return [value[0], value[0], *value[2:]] if key == "tokenizer.ggml.tokens" else value


def no_heads(key, value):
    return 0 if key == "olmo2.attention.head_count" else value


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("change", "cause"), [(duplicate_token, "GGML_ASSERT"), (no_heads, "SIGFPE")])
def test_a_death_in_the_library_is_one_line(change, cause, tiny_gguf, tmp_path):
    model = rewritten(tiny_gguf, tmp_path / "broken.gguf", metadata=change)
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

"""llama.cpp's own converter: unpacked with care, asked what it needs, run with its messages shown."""

import io
import json
import pathlib
import shutil
import sys
import tarfile

import numpy as np
import pytest
from heard import Heard as Notes
from safetensors.numpy import save_file

from bitladder.cli import invoke
from bitladder.convert import convert, upstream, uses_upstream
from bitladder.convert.upstream import Converter, refuse_code, requirements, run_converter, unpack, upstream_converter
from bitladder.convert.upstream_checks import check_converted
from bitladder.errors import BitladderError, UsageError
from bitladder.gguf import GgufFile

VERSION = "9.9.9"
TOP = f"llama_cpp_python-{VERSION}"
FILES = {
    "convert_hf_to_gguf.py": b"print()",
    "conversion/__init__.py": b"",
    "gguf-py/gguf/__init__.py": b"",
    "requirements/requirements-convert_hf_to_gguf.txt": b"-r ./requirements-more.txt\n--extra-index-url https://x.org/cpu\n"
    b"\n# a comment\ntorch==2.11.0\n",
    "requirements/requirements-more.txt": b"numpy~=2.2.6 # why\ngguf>=0.1.0\n",
    "src/llama.cpp": b"not wanted",
}


def archive(path: pathlib.Path, files: dict[str, bytes], top: str = TOP) -> pathlib.Path:
    with tarfile.open(path, "w:gz") as file:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{top}/vendor/llama.cpp/{name}")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def test_only_the_converter_is_unpacked(tmp_path):
    unpack(archive(tmp_path / "a.tar.gz", FILES), tmp_path / "out", VERSION)
    unpacked = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert unpacked == FILES.keys() - {"src/llama.cpp"}
    assert requirements(tmp_path / "out") == (["torch==2.11.0", "numpy~=2.2.6"], ["https://x.org/cpu"])


@pytest.mark.parametrize(
    ("files", "top", "words"),
    [
        (FILES, "llama_cpp_python-1.0.0", "must be of llama_cpp_python-9.9.9"),
        ({"conversion/a.py": b""}, TOP, "has no convert_hf_to_gguf.py"),
        ({"conversion/../../../../x.py": b""}, TOP, "cannot be unpacked"),
        ({"conversion/big.py": bytes(upstream.MOST_UNPACKED + 1)}, TOP, "unpacks to more than 64 MiB"),
    ],
)
def test_a_strange_archive_is_refused(tmp_path, files, top, words):
    with pytest.raises(BitladderError, match=words):
        unpack(archive(tmp_path / "a.tar.gz", files, top), tmp_path / "out", VERSION)
    assert not (tmp_path / "x.py").exists()


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"no archive")
    with pytest.raises(BitladderError, match=r"a.tar.gz cannot be unpacked"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out", VERSION)


def test_without_a_network_the_message_says_how_to_bring_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(BitladderError, match=r"cannot be downloaded \(ERROR: .*\)\. .* --converter FILE.tar.gz$"):
        upstream_converter(cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_packages_that_cannot_be_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(upstream, "library_version", lambda: VERSION)
    files = FILES | {"requirements/requirements-convert_hf_to_gguf.txt": b"no-such-package-at-all==1\n"}
    brought = archive(tmp_path / "a.tar.gz", files)
    with pytest.raises(BitladderError, match=r"--converter SCRIPT .*no-such-package-at-all"):
        upstream_converter(brought, cache=tmp_path / "cache")
    # The source is kept, and nothing half-made.
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"llama-cpp-python-{VERSION}"]


def test_an_environment_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream, "library_version", lambda: VERSION)
    files = FILES | {"requirements/requirements-convert_hf_to_gguf.txt": b"# nothing\n"}
    brought = archive(tmp_path / "a.tar.gz", files)
    first = upstream_converter(brought, cache=tmp_path / "cache")
    assert first.python.is_file()
    assert first.script.read_bytes() == FILES["convert_hf_to_gguf.py"]
    brought.unlink()
    assert upstream_converter(cache=tmp_path / "cache") == first
    run = [str(first.python), "-c", "import sys; print(sys.prefix)"]
    assert upstream.subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == str(
        first.python.parent.parent
    )


class Heard:
    def __init__(self):
        self.advanced = 0.0

    def task(self, label, total):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def note(self, text):
        pass

    def advance(self, amount=1.0):
        self.advanced += amount


def script(tmp_path: pathlib.Path, body: str) -> Converter:
    path = tmp_path / "convert_hf_to_gguf.py"
    path.write_text("import sys\ntarget = sys.argv[sys.argv.index('--outfile') + 1]\n" + body)
    return Converter(path, pathlib.Path(sys.executable))


def test_progress_is_what_the_converter_says(tmp_path):
    body = "for i in (10, 60, 100):\n    sys.stderr.write(f'\\rWriting: {i:3d}%|##| 1/2')\n"
    body += "open(target, 'wb').write(b'GGUF')"
    heard = Heard()
    run_converter(script(tmp_path, body), tmp_path, tmp_path / "o.gguf", "f16", heard)
    assert heard.advanced == 100


@pytest.mark.parametrize(
    ("architecture", "tensor", "flag"),
    [
        ("Qwen3_5ForCausalLM", "model.norm.weight", True),
        ("Qwen3_5ForCausalLM", "mtp.norm.weight", False),
        ("Qwen3ForCausalLM", "model.norm.weight", False),
    ],
)
def test_prediction_heads_that_a_checkpoint_has_not_are_left_out(architecture, tensor, flag, tmp_path):
    """As published by whoever trained a Qwen 3.5 with transformers, which drops them."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    save_file({tensor: np.ones(4, np.float32)}, tmp_path / "model.safetensors")
    body = "known = ('--no-mtp', )\nopen(target, 'wb').write(b'GGUF' + ' '.join(sys.argv).encode())"
    run_converter(script(tmp_path, body), tmp_path, tmp_path / "o.gguf", "f16", Heard())
    assert ("--no-mtp" in (tmp_path / "o.gguf").read_text()) == flag
    run_converter(script(tmp_path, body.replace("--no-mtp", "")), tmp_path, tmp_path / "o.gguf", "f16", Heard())
    assert "--no-mtp" not in (tmp_path / "o.gguf").read_text()  # a converter of another version


def test_the_converter_gets_no_tokens(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    body = "import os; open(target, 'wb').write(b'GGUF' + repr(dict(os.environ)).encode())"
    run_converter(script(tmp_path, body), tmp_path, tmp_path / "o.gguf", "f16", Heard())
    seen = (tmp_path / "o.gguf").read_text()
    assert "PATH" in seen and "secret" not in seen


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("sys.stderr.write('one\\nKeyError: x\\n'); sys.exit(3)", r"failed \(3\): one / KeyError: x"),
        ("open(target, 'wb').write(b'zip')", "wrote no GGUF"),
    ],
)
def test_a_failure_has_its_last_lines(tmp_path, body, words):
    with pytest.raises(BitladderError, match=words):
        run_converter(script(tmp_path, body), tmp_path, tmp_path / "o.gguf", "f16", Heard())


def test_code_of_a_checkpoint_is_not_run_unasked(tmp_path):
    refuse_code(tmp_path, ["XForCausalLM"], trusted=False)
    (tmp_path / "modeling_x.py").write_text("")
    with pytest.raises(UsageError, match=r"modeling_x.py.*--trust-remote-code"):
        refuse_code(tmp_path, ["XForCausalLM"], trusted=False)
    refuse_code(tmp_path, ["XForCausalLM"], trusted=True)


def test_what_it_writes_is_checked(tiny_gguf, tiny_checkpoint, tmp_path):
    made = check_converted(tiny_gguf, tiny_checkpoint, Heard())
    assert (made.architecture, made.outtype) == ("olmo2", "f16")
    with GgufFile(tiny_gguf) as file:
        tensor = file.tensors["blk.1.ffn_down.weight"]
        data = bytearray(tiny_gguf.read_bytes())
        raw = file.read(tensor).tobytes()
    start = bytes(data).index(raw)
    for bits in (b"\x00\x7c", b"\x01\xfc"):  # an infinity and a NaN of F16
        data[start + 40 : start + 42] = bits
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(data)
        with pytest.raises(BitladderError, match=r"blk.1.ffn_down.weight has a value .*at index 20; .*--outtype bf16"):
            check_converted(broken, tiny_checkpoint, Heard())


def test_an_unknown_architecture_goes_to_it(tiny_checkpoint, tmp_path):
    folder = tmp_path / "Other"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    assert not uses_upstream(folder, upstream=None, converter=None)
    assert uses_upstream(folder, upstream=True, converter=None)
    for change in ({"architectures": ["OtherForCausalLM"]}, {"architectures": [], "model_type": "other"}):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert uses_upstream(folder, upstream=None, converter=None)
    with pytest.raises(BitladderError, match=r"other is not one that bitladder converts .*--upstream"):
        convert(folder, tmp_path / "o.gguf", upstream=False)


@pytest.mark.slow
def test_the_real_one(tmp_path):
    """Downloads the converter and makes its environment: minutes, and gigabytes where PyTorch has no CPU build."""
    program = upstream_converter(progress=Heard())
    assert program.script.is_file() and program.python.is_file()


MAP = '_MODEL_MAP: dict = {"SeeingModel": "m"}'
LISTED = {
    "conversion/__init__.py": f"TEXT{MAP}\nMMPROJ{MAP}\n",
    "conversion/m.py": "@ModelBase.register('SeeingModel')\nclass M:\n    model_arch = gguf.MODEL_ARCH.OLMO2\n",
    "gguf-py/gguf/constants.py": '    MODEL_ARCH.OLMO2: "olmo2",\n',
}


def of_class(name: str, checkpoint: pathlib.Path, folder: pathlib.Path, **more: str) -> pathlib.Path:
    """A copy of a checkpoint that says to be of another class, without Python code."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.py"), dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name]} | more))
    return folder


@pytest.mark.parametrize("fails", [False, True])
def test_a_projector_is_converted_beside_the_model(fails, tiny_gguf, tiny_checkpoint, tmp_path):
    """The script copies a model; asked for the projector, it writes another file or fails."""
    for name, text in LISTED.items():
        (tmp_path / "converter" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "converter" / name).write_text(text)
    body = f"import shutil\nif '--mmproj' in sys.argv and {fails}:\n    sys.exit('ValueError: no such part')\n"
    body += f"shutil.copy({str(tiny_gguf)!r}, target)\n"
    converter = script(tmp_path / "converter", body).script.parent
    folder = of_class("SeeingModel", tiny_checkpoint, tmp_path / "Seeing")
    heard = Notes()
    out, beside = tmp_path / "F.gguf", tmp_path / "mmproj-F.gguf"
    result = convert(folder, out, converter=converter, projector=beside, progress=heard)
    assert out.is_file()
    assert beside.is_file() is not fails
    assert result.projector == (None if fails else beside)
    assert any("without its projector" in line and "no such part" in line for line in heard.warnings) is fails
    assert convert(folder, out, converter=converter, progress=heard).projector is None
    assert invoke(["convert", str(folder), "-o", str(tmp_path / "G.gguf"), "--converter", str(converter), "-q"]) == 0
    assert (tmp_path / "mmproj-G.gguf").is_file() is not fails


def test_a_checkpoint_that_lacks_what_llama_cpp_needs(tiny_checkpoint, tmp_path):
    folder = of_class("DeepseekV3ForCausalLM", tiny_checkpoint, tmp_path / "V3")
    converter = script(tmp_path, "").script
    with pytest.raises(UsageError, match=r'config.json has no scoring_func.* add "scoring_func": "sigmoid"'):
        convert(folder, tmp_path / "o.gguf", converter=converter)
    of_class("DeepseekV3ForCausalLM", tiny_checkpoint, folder, scoring_func="sigmoid")
    with pytest.raises(BitladderError, match="wrote no GGUF|No such file"):
        convert(folder, tmp_path / "o.gguf", converter=converter)

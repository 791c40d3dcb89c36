"""llama.cpp's own converter, for the architectures that bitladder does not convert itself.

It lies in the source archive of the installed llama-cpp-python, so it belongs to the library that will load the file.
pip downloads the archive and checks its hash against the index. The converter runs in an environment of its own, with
the versions that it asks for. Both are made once and kept in the user's cache.

Source of the layout of the archive and of the requirements: vendor/llama.cpp in llama-cpp-python's source archive.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Sequence

import platformdirs

from bitladder.convert.checkpoint_files import read_header, read_json
from bitladder.errors import BitladderError, UsageError
from bitladder.progress import SILENT, Progress

LIBRARY = "llama-cpp-python"
SCRIPT = "convert_hf_to_gguf.py"
REQUIREMENTS = "requirements/requirements-convert_hf_to_gguf.txt"
# What is unpacked of vendor/llama.cpp.
WANTED = (SCRIPT, "conversion/", "gguf-py/", "requirements/", "LICENSE")
MOST_UNPACKED = 64 << 20  # bytes; what is wanted has some 2 MB
LINES = 5  # last lines of a program that an error shows
# Environment variables that the converter gets: those that Python and its libraries need, and no tokens.
PASSED = (
    *("PATH", "HOME", "USERPROFILE", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP", "LANG", "LC_ALL", "LD_LIBRARY_PATH"),
    *("DYLD_LIBRARY_PATH", "PYTHONPATH", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"),
)
# What pip does not get of its environment, in which it may have indexes, proxies and certificates.
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Architectures whose converter expects prediction heads, their tensors, and the flag that leaves them out.
_WITH_HEADS, _HEADS, _NO_HEADS = ("Qwen3Next", "Qwen3_5"), ("mtp.", "model.mtp."), "--no-mtp"
_PERCENT = re.compile(r"(\d{1,3})%\|")


@dataclasses.dataclass(frozen=True)
class Converter:
    """A converter that can run.

    Parameters:
        script: the script, with its packages beside it.
        python: the interpreter that runs it.
    """

    script: pathlib.Path
    python: pathlib.Path


def library_version() -> str:
    """The version of the installed llama-cpp-python, whose converter is used."""
    return importlib.metadata.version(LIBRARY)


def upstream_converter(
    archive: pathlib.Path | None = None, *, cache: pathlib.Path | None = None, progress: Progress = SILENT
) -> Converter:
    """The converter of the installed library: from the cache, or downloaded and made ready there.

    Parameters:
        archive: llama-cpp-python's source archive (.tar.gz) if it was brought here by hand; None downloads it.
        cache: folder to keep it in; None for the user's cache.
        progress: is told what is done.

    Raises:
        BitladderError: there is no network, or the packages that the converter asks for cannot be installed.
    """
    home = converter_source(archive, cache, progress)
    environment = home.with_name(f"{home.name}.env")
    python = _interpreter(environment)
    if not python.is_file():
        _make_environment(environment, home, progress)
    return Converter(home / SCRIPT, python)


def converter_source(archive: pathlib.Path | None, cache: pathlib.Path | None, progress: Progress) -> pathlib.Path:
    """The folder with the converter of the installed library: from the cache, or downloaded and unpacked there.

    Parameters:
        archive: llama-cpp-python's source archive (.tar.gz) if it was brought here by hand; None downloads it.
        cache: folder to keep it in; None for the user's cache.
        progress: is told of a download.

    Raises:
        BitladderError: there is no network, or the archive is damaged or of another version.
    """
    version = library_version()
    cache = platformdirs.user_cache_path("bitladder") / "converter" if cache is None else cache
    home = cache / f"{LIBRARY}-{version}"
    if not (home / SCRIPT).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".source.", suffix=".tmp") as temporary:
            folder = pathlib.Path(temporary)
            if archive is None:
                archive = _download(version, folder, progress)
            unpack(archive, folder / "source", version)
            _publish(folder / "source", home)
    return home


def converter_file(path: pathlib.Path) -> pathlib.Path:
    """The file that --converter names: a script, the script in a folder, or a source archive.

    Raises UsageError if there is none.
    """
    file = path / SCRIPT if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"--converter {path}: no such file; name {SCRIPT}, its folder, or a .tar.gz of {LIBRARY}")
    return file


def converter_at(path: pathlib.Path | None, progress: Progress) -> Converter:
    """The converter that --converter names, or the library's own. Raises BitladderError as `upstream_converter`."""
    if path is None:
        return upstream_converter(progress=progress)
    file = converter_file(path)
    if is_archive(file):
        return upstream_converter(file, progress=progress)
    return Converter(file, pathlib.Path(sys.executable))


def is_archive(file: pathlib.Path) -> bool:
    """Whether a file that --converter names is a source archive, by its name."""
    return file.name.endswith((".tar.gz", ".tgz"))


def unpack(archive: pathlib.Path, folder: pathlib.Path, version: str) -> None:
    """Unpacks the converter from a source archive.

    Parameters:
        archive: the .tar.gz.
        folder: where to; it is made.
        version: the version of the library that the archive must be of.

    Raises:
        BitladderError: the archive is of another version, damaged, or has no converter.
    """
    top = f"llama_cpp_python-{version}"
    inner = f"{top}/vendor/llama.cpp/"
    unpacked = 0
    try:
        with tarfile.open(archive, "r:gz") as file:
            for member in file:
                if not member.name.startswith(f"{top}/"):
                    other = member.name.partition("/")[0]
                    raise BitladderError(f"{archive} has {other}; the converter must be of {top}, as the library is")
                name = member.name.removeprefix(inner)
                if not (member.isfile() and member.name.startswith(inner) and name.startswith(WANTED)):
                    continue
                unpacked += member.size
                if unpacked > MOST_UNPACKED:
                    raise BitladderError(f"{archive} unpacks to more than {MOST_UNPACKED >> 20} MiB; it is damaged")
                # The filter refuses names that lead out of the folder.
                file.extract(member.replace(name=name), folder, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise BitladderError(f"{archive} cannot be unpacked: {error}") from error
    if not (folder / SCRIPT).is_file():
        raise BitladderError(f"{archive} has no {SCRIPT}; download it again")


def requirements(home: pathlib.Path) -> tuple[list[str], list[str]]:
    """What the converter asks for, as pip's requirements, and further indexes that it names.

    Parameters:
        home: the folder of the converter.
    """
    packages: list[str] = []
    indexes: list[str] = []
    files = [home / REQUIREMENTS]
    for path in files:
        lines = [line.partition(" #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            if line.startswith("-r "):
                files.append(path.parent / line.removeprefix("-r ").strip())
            elif line.startswith("--extra-index-url"):
                indexes.append(line.removeprefix("--extra-index-url").strip(" ="))
            elif line and not line.startswith(("#", "-")) and not line.startswith("gguf"):
                packages.append(line)  # gguf lies beside the script
    return packages, indexes


def run_converter(
    converter: Converter,
    folder: pathlib.Path,
    target: pathlib.Path,
    outtype: str,
    progress: Progress,
    *,
    projector: bool = False,
) -> None:
    """Converts a checkpoint, or the projector of images or sounds that it has.

    Parameters:
        converter: the converter.
        folder: directory of the checkpoint.
        target: the file to write.
        outtype: f16, bf16, f32 or auto.
        progress: shows how much is done, as the converter says.
        projector: whether the projector is meant.

    Raises:
        BitladderError: the converter fails or writes no GGUF; the message has its last lines.
    """
    command = [
        str(converter.python),
        str(converter.script),
        str(folder),
        "--outfile",
        str(target),
        "--outtype",
        outtype,
        *(["--mmproj"] if projector else left_out(converter, folder)),
    ]
    label = f"Converting {'the projector' if projector else ''} with {converter.script.name}".replace("  ", " ")
    lines: list[str] = []
    with progress.task(label, 100) as bar:
        done = 0
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={name: os.environ[name] for name in PASSED if name in os.environ},
        )
        try:
            assert process.stderr is not None
            for line in process.stderr:  # universal newlines: each state of the converter's bar is a line
                percent = [int(part) for part in _PERCENT.findall(line)]
                if percent and percent[-1] > done:
                    bar.advance(percent[-1] - done)
                    done = percent[-1]
                elif not percent and line.strip():
                    lines.append(line.strip())
                    del lines[:-LINES]
            code = process.wait()
        finally:
            process.kill()
            process.wait()
    if code != 0:
        raise BitladderError(f"{converter.script.name} failed ({code}): {' / '.join(lines) or 'no message'}")
    with target.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise BitladderError(f"{converter.script.name} ended well but wrote no GGUF")


def left_out(converter: Converter, folder: pathlib.Path) -> list[str]:
    """The flag that leaves prediction heads out, for a checkpoint that has none though its architecture has.

    Whoever trains a Qwen 3.5 with transformers publishes it without them, and llama.cpp's converter expects them.
    """
    config = folder / "config.json"
    names = (read_json(config).get("architectures") or []) if config.is_file() else []
    if not any(str(name).startswith(_WITH_HEADS) for name in names):
        return []
    tensors = [name for path in folder.glob("*.safetensors") for name in read_header(path)]
    known = _NO_HEADS in converter.script.read_text(encoding="utf-8", errors="replace")
    return [_NO_HEADS] if known and not any(name.startswith(_HEADS) for name in tensors) else []


def refuse_code(folder: pathlib.Path, names: Sequence[str], *, trusted: bool) -> None:
    """Refuses a checkpoint that brings Python code, because llama.cpp's converter may run it.

    Parameters:
        folder: directory of the checkpoint.
        names: names of its architectures, for the message.
        trusted: whether the user has said that the code may run.

    Raises:
        UsageError: there is code that is not trusted.
    """
    code = sorted(path.name for path in folder.glob("*.py"))
    if code and not trusted:
        raise UsageError(
            f"{folder} ({', '.join(names)}) brings Python code ({', '.join(code[:3])}), which llama.cpp's converter "
            "may run; read it, then give --trust-remote-code"
        )


def _download(version: str, folder: pathlib.Path, progress: Progress) -> pathlib.Path:
    """The source archive, from the package index that pip is set up for. pip compares its hash with the index's."""
    progress.info(f"llama.cpp's converter: downloads the source archive of {LIBRARY} {version} (75 MB, once)")
    requirement = f"{LIBRARY}=={version}"
    problem = _pip(["download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), requirement])
    if problem is not None:
        raise BitladderError(
            f"llama.cpp's converter cannot be downloaded ({problem}). Where there is a network, run `pip download "
            f"--no-deps --no-binary :all: {requirement}`, bring the .tar.gz here and give --converter FILE.tar.gz"
        )
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise BitladderError(f"pip downloaded no source archive of {requirement}; give --converter PATH")
    return archives[0]


def _make_environment(environment: pathlib.Path, home: pathlib.Path, progress: Progress) -> None:
    """Makes the environment that the converter runs in."""
    packages, indexes = requirements(home)
    progress.info(f"llama.cpp's converter: makes an environment with {', '.join(packages)} (once)")
    building = environment.with_name(f".{environment.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    advice = (
        "llama.cpp's converter needs packages that cannot be installed here; give --converter SCRIPT to run a copy "
    )
    advice += "of convert_hf_to_gguf.py with this Python"
    try:
        venv.create(building)
        python = _interpreter(building)
        with progress.task("Installing what the converter needs", len(packages)) as bar:
            for requirement in packages:
                bar.note(requirement)
                _install(python, requirement, indexes, advice)
                bar.advance()
        building.rename(environment)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _install(python: pathlib.Path, requirement: str, indexes: Sequence[str], advice: str) -> None:
    """Installs a requirement. PyTorch comes from the index that the converter names, where its CPU build is small."""
    if requirement.startswith("torch"):
        for index in indexes:
            words = ["install", "--retries", "0", "--timeout", "15", "--index-url", index, requirement]
            if _pip(["--python", str(python), *words]) is None:
                return
    problem = _pip(["--python", str(python), "install", requirement])
    if problem is not None:
        raise BitladderError(f"{advice} ({problem})")


def _pip(words: Sequence[str]) -> str | None:
    """Runs pip. Returns the last line of its messages if it fails."""
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *words]
    environment = {name: value for name, value in os.environ.items() if name not in TOKENS}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


def _interpreter(environment: pathlib.Path) -> pathlib.Path:
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _publish(finished: pathlib.Path, home: pathlib.Path) -> None:
    """Puts a finished folder where it is looked for. Another process may have been faster."""
    try:
        finished.rename(home)
    except OSError:
        if not (home / SCRIPT).is_file():
            raise

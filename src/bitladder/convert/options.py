"""What a conversion can be told."""

import dataclasses
import pathlib
from typing import Literal

from bitladder.options import Options, option


@dataclasses.dataclass(frozen=True)
class ConvertOptions(Options):
    """What a conversion can be told; the parameters of `convert`."""

    GROUP = "Conversion"

    outtype: Literal["auto", "f16", "bf16", "f32"] = option(
        "auto",
        "--outtype",
        help="Type of the matrices (vectors stay F32); auto is bf16 for a bfloat16 checkpoint, else f16.",
    )
    upstream: bool | None = option(
        None,
        "--upstream/--native",
        unset="native for the architectures that bitladder converts itself",
        help="Convert with llama.cpp's own converter, which pip downloads once, or refuse what needs it.",
    )
    converter: pathlib.Path | None = option(
        None,
        "--converter",
        names="file",
        metavar="PATH",
        help="Use this instead of the download: convert_hf_to_gguf.py, its folder, or llama-cpp-python's .tar.gz.",
    )
    mmproj: bool = option(
        True,
        "--mmproj/--no-mmproj",
        help="Convert the projector of images or sounds too, to a file mmproj-… beside the model.",
    )
    trust_remote_code: bool = option(
        False, "--trust-remote-code", help="Let llama.cpp's converter run Python code that MODEL brings."
    )

"""The options of decoding, which every command that decodes has, with llama.cpp's spelling."""

import dataclasses

from bitladder.options import Options, option

MIN_CTX = 4


@dataclasses.dataclass(frozen=True)
class Decoding(Options):
    """How a model is decoded. Raises UsageError for a number outside its limits."""

    GROUP = "Decoding"

    n_ctx: int = option(
        512, "-c", "--ctx-size", least=MIN_CTX, metavar="TOKENS", help="Tokens of a chunk, which is one context."
    )
    n_batch: int = option(
        2048, "-b", "--batch-size", least=1, decides=False, metavar="TOKENS", help="Tokens decoded by one call."
    )
    n_ubatch: int = option(
        512, "-ub", "--ubatch-size", least=1, decides=False, metavar="TOKENS", help="Tokens computed at once."
    )
    threads: int | None = option(
        None, "-t", "--threads", least=1, decides=False, metavar="N", help="Threads of the CPU.", unset="all"
    )
    gpu_layers: int = option(
        0, "-ngl", "--gpu-layers", "--n-gpu-layers", metavar="N", help="Layers that the GPU computes."
    )

    def deciding(self) -> dict[str, object]:
        """The tokens of a chunk, and whether a GPU computes. The number of its layers changes no figure."""
        return {"n_ctx": self.n_ctx, "gpu": self.gpu_layers != 0}

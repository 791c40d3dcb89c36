"""How moments are weighted by gradients: the options."""

import dataclasses

from bitladder.options import Options, option


@dataclasses.dataclass(frozen=True)
class GradientOptions(Options):
    """How moments are weighted by gradients."""

    outputs: bool = option(True, help="Moments of the gradients of outputs, which rounding uses too.")
    draws: int = option(1, least=1, help="Labels that are drawn for each position.")
    seed: int = option(0, help="Seed of the labels.")
    pilots: int = option(
        4, least=2, help="Every fourth chunk, by default, is used only for the moments that leverages are made of."
    )
    fewest: int = option(8, least=1, help="With fewer chunks tokens are weighted by the squared length of gradients.")
    damping: float = option(
        0.1, help="Damping of the moments that leverages are made of, as a share of their diagonal."
    )
    sketch: int = option(128, least=1, help="Random products that estimate the leverages of wider inputs and outputs.")
    rank: int = option(
        128, least=1, help="Columns of the factor that is kept for the gradients of the outputs of gate and up."
    )
    half: bool | None = option(
        None,
        help="Products with weights in bfloat16.",
        unset="where the CPU has instructions for them, and the logits stay within the tolerance",
    )

"""How a quant is refined: the constants that decide what smoothing, rounding, its guard and tuning do.

Names of fields are unique among all options of a run, because the command line fills them by name.
"""

import dataclasses

from bitladder.options import Options, option
from bitladder.rounding import RoundingOptions
from bitladder.text import HELD_OUT


@dataclasses.dataclass(frozen=True)
class SmoothingOptions(Options):
    """How channels are rescaled and ordered, and how that is tried."""

    GROUP = "Smoothing"

    scales: bool = option(True, "--scales/--no-scales", help="Rescale channels.")
    order: bool = option(
        True,
        "--order/--no-order",
        help="Reorder channels, if the head is the token embedding (it then has no scales to move).",
    )
    most_powers: int = option(6, least=0, help="Powers of two by which a channel may be scaled, to either side.")
    # Products are the same but for what F16 rounds, which leaves 0.002 in 30 blocks. A wrong scale in one left 0.1.
    tolerance: float = option(0.01, least=0, help="How far logits may move, as a share of their range.")
    outliers: int = option(64, least=0, help="Channels at most that are examined as the large ones of a block.")
    order_chunks: int = option(16, least=1, help="Chunks of random tokens that show which channels are large.")
    trial_chunks: int = option(
        4,
        "--trial-chunks",
        least=1,
        metavar="N",
        help="Chunks for the trial of smoothing.",
        efforts={"high": 8},
    )
    trial_offset: float = option(
        0.25, least=0, most=1, help="Where in a calibration text these passages begin (0 to 1)."
    )


@dataclasses.dataclass(frozen=True)
class GuardOptions(Options):
    """How rounded blocks are tried."""

    GROUP = "Rounding"

    guard_chunks: int = option(
        2,
        "--guard-chunks",
        least=1,
        metavar="N",
        help="Most chunks of held-out text on which rounded blocks are checked.",
        efforts={"high": 8},
    )
    guard_offset: float = option(
        0.5, least=0, most=1, help="Where in a calibration text these passages begin (0 to 1)."
    )
    sure: float = option(
        3.0, least=0, help="Standard errors by which a difference is clear before all chunks are used."
    )
    negligible: float = option(
        0.005, least=0, help="A difference that is surely below this share of KLD does not matter."
    )
    unclear: int = option(
        4, least=0, help="Most layers (or groups of layers) that are examined because they gain no more than the error."
    )
    single_layers: int = option(3, least=0, help="With more layers than this, groups of layers are examined first.")


@dataclasses.dataclass(frozen=True)
class TuneOptions(Options):
    """How scales are tuned (Adam, arXiv 1412.6980), and how that is tried."""

    GROUP = "Tuning"

    tune_chunks: int = option(
        0,
        "--tune-chunks",
        least=0,
        metavar="N",
        help="Chunks of each calibration text that scales are tuned on. With 0 they are not tuned.",
        efforts={"high": 64},
    )
    tune_rate: float = option(
        3e-4, "--tune-rate", least=1e-12, most=0.1, help="Largest change of a scale by one chunk, as a share of it."
    )
    tune_seed: int = option(0, "--tune-seed", least=0, help="Seed of the order of chunks.")
    warm_up: int = option(10, least=1, help="Steps over which the rate grows; then it falls along half a cosine.")
    mean_decay: float = option(0.9, least=0, most=1, help="Of the mean of gradients (β₁).")
    square_decay: float = option(0.98, least=0, most=1, help="Of the mean of their squares (β₂).")
    epsilon: float = option(1e-12, least=0, help="Added to the root of the mean square.")
    held_out_share: float = option(
        HELD_OUT, least=0, most=1, help="The end of each calibration text, on which tuning is tried."
    )
    tune_guard_chunks: int = option(
        8, "--tune-guard-chunks", least=1, metavar="N", help="Chunks of held-out text on which KLD must fall."
    )


@dataclasses.dataclass(frozen=True)
class RefineOptions(Options):
    """All that makes a quant better at the same bytes."""

    smoothing: SmoothingOptions = option(SmoothingOptions)
    rounding: RoundingOptions = option(RoundingOptions)
    guard: GuardOptions = option(GuardOptions)
    tuning: TuneOptions = option(TuneOptions)

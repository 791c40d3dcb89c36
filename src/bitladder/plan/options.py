"""What a plan can be told. `bitladder plan` and `bitladder run` have the same options and defaults.

Names of fields are unique among all these classes, because the command line fills them by name.
"""

import dataclasses
from typing import Literal

from bitladder.calibrate import FisherOptions
from bitladder.engine import Decoding
from bitladder.evaluate import MeasureOptions, nearly_all_scored
from bitladder.options import Options, option
from bitladder.quantize import unreached_option

MENUS = ("k", "iq", "all", "fast")  # menus with a name


@dataclasses.dataclass(frozen=True)
class TargetOptions(Options):
    """What to plan for: exactly one of the first five."""

    GROUP = "Target (one of the first five)"

    like: str | None = option(
        None, "--like", names="preset", metavar="PRESET", help="Least KLD in at most the bytes of this preset."
    )
    size: str | None = option(
        None, "--size", metavar="SIZE", help="Least KLD in at most this file size (3.7GiB, 900MB, bytes)."
    )
    bpw: float | None = option(None, "--bpw", metavar="BITS", help="Least KLD in at most this many bits per weight.")
    kld: float | None = option(None, "--kld", metavar="NATS", help="Smallest file of at most this KLD.")
    vram: str | None = option(
        None,
        "--vram",
        metavar="SIZE",
        help="Least KLD in a file that fits this memory with KV cache and buffers of --context.",
    )
    context: int = option(4096, "--context", least=1, metavar="TOKENS", help="Tokens of the context for --vram.")


@dataclasses.dataclass(frozen=True)
class Constraints(Options):
    """What a recipe must respect besides its size, as the command line writes it."""

    GROUP = "Constraints"

    pins: tuple[str, ...] = option(
        (),
        "--tensor-type",
        metavar="PATTERN=TYPE",
        help="Pin the tensors whose name contains the pattern; the first pattern that matches decides.",
    )
    floors: tuple[str, ...] = option(
        (), "--floor", metavar="KIND=TYPE", help="Fewest bits of a kind (attn_v=q5_K, ffn_down=4.5)."
    )
    ties: tuple[str, ...] = option((), "--tie", metavar="KIND,KIND", help="Kinds with equal types within each layer.")
    max_types: int | None = option(None, "--max-types", least=1, metavar="N", help="Use at most N different types.")
    min_speed: float | None = option(
        None, "--min-speed", least=0.001, metavar="TOKENS/S", help="Least predicted speed of generation on this CPU."
    )


@dataclasses.dataclass(frozen=True)
class LawOptions(Options):
    """How the law through the measured swaps is fitted (`prices.law`)."""

    least_exponent: float = option(0.5, least=0, help="Smallest exponent of the error that is accepted.")
    most_exponent: float = option(2.0, least=0, help="Largest exponent of the error that is accepted.")
    exponent_damping: float = option(
        1.0,
        least=0,
        help="Weight of the exponent 1; at 1 it counts like two types whose errors differ by a factor of e.",
    )


@dataclasses.dataclass(frozen=True)
class PriceOptions(Options):
    """How types are priced, and how much is measured for that."""

    GROUP = "Prices and measurement"

    method: Literal["forward", "fisher"] = option(
        "forward", "--prices", help="From swaps in the loaded model, or from gradients (needs bitladder[torch])."
    )
    probe_tokens: int = option(
        20_000,
        "--probe-tokens",
        least=1,
        metavar="N",
        help="Tokens to decode for prices.",
        efforts={"fast": 8_000, "high": 50_000},
    )
    probe_chunks: int = option(1, least=1, help="Chunks that each swap is measured on.")
    probe_bpw: float = option(3.5, help="Bits per weight to probe with: KLD far above noise, model not yet broken.")
    group_share: float = option(0.4, least=0, most=1, help="Share of the tokens that whole kinds are measured with.")
    prune_slack: float = option(
        1.3, least=1, help="A type loses to a smaller one whose rendered error is smaller by more than this factor."
    )
    check_pairs: int = option(
        10, least=0, efforts={"fast": 5, "high": 20}, help="Single swaps that prices are checked with."
    )
    check_seed: int = option(1, help="Seed of the draw of these swaps.")
    price_passes: int = option(
        0,
        least=0,
        help="Passes after feedback of the rounded blocks that recipes are measured with; a file's have those of "
        "rounding.",
        efforts={"high": 1},
    )
    fisher: FisherOptions = option(FisherOptions)
    law: LawOptions = option(LawOptions)


@dataclasses.dataclass(frozen=True)
class CorrectionOptions(Options):
    """The ridge regression that corrects prices (`corrections`): standard deviations of its terms beforehand, noise."""

    spread_all: float = option(0.5, least=0.001, help="Of the term that all prices share.")
    spread_kind: float = option(0.4, least=0.001, help="Of the term of a kind.")
    spread_type: float = option(0.3, least=0.001, help="Of the term of a type of a kind.")
    spread_third: float = option(0.3, least=0.001, help="Of the term of a third of a kind's layers.")
    least_factor: float = option(0.1, least=0, help="No price is lowered below this fraction of itself.")
    misfit: float = option(0.1, least=0, help="Fraction of a difference of KLD that the terms cannot express.")
    level_noise: float = option(
        0.005, least=1e-6, help="Noise of every difference, as a fraction of the reference's KLD."
    )


@dataclasses.dataclass(frozen=True)
class FeedbackOptions(Options):
    """How many recipes are measured, and on how much text."""

    GROUP = "Prices and measurement"

    chunks: int = option(
        6,
        "--chunks",
        least=2,
        metavar="N",
        help="Chunks that a recipe is measured on.",
        efforts={"fast": 4, "high": 12},
    )
    move_chunks: int | None = option(
        2,
        least=1,
        help="Chunks for a recipe that only corrects prices.",
        unset="half of --chunks",
        efforts={"fast": 1, "high": None},
    )
    judge_chunks: int | None = option(
        4,
        "--judge-chunks",
        least=0,
        metavar="N",
        help="Further chunks, to which no price is fitted, on which the best recipes are judged; 0 for no judging.",
        unset="as many as --chunks",
        efforts={"fast": 2, "high": None},
    )
    rounds: int = option(2, least=0, efforts={"fast": 1, "high": 4}, help="Rounds of correcting and solving.")
    random_recipes: int = option(
        5,
        least=0,
        help="Random recipes that correct the prices of parts of kinds.",
        efforts={"fast": 0, "high": 10},
    )
    exchanges: int = option(2, least=0, efforts={"fast": 0, "high": 6}, help="Exchanges that are tried at the end.")
    exchange_candidates: int = option(40, least=1, help="Exchanges that each of these is chosen from.")
    failed_exchanges: int = option(3, least=1, help="Exchanges without gain after which no more is tried.")
    finalists: int = option(3, least=1, help="Recipes that are judged besides the rivals.")
    whole_share: float = option(
        0.8, least=0, most=1, help="Recipes with at least this share of the tensors correct prices."
    )
    correction: CorrectionOptions = option(CorrectionOptions)

    @property
    def teaching_chunks(self) -> int:
        """Chunks for a recipe that only corrects prices."""
        return max(1, self.chunks // 2) if self.move_chunks is None else self.move_chunks

    @property
    def judging_chunks(self) -> int:
        """Chunks that the best recipes are judged on."""
        return self.chunks if self.judge_chunks is None else self.judge_chunks

    @property
    def text_chunks(self) -> int:
        """Chunks of text that are needed."""
        return self.chunks + self.judging_chunks


@dataclasses.dataclass(frozen=True)
class RivalOptions(Options):
    """Recipes of simpler methods that plans are compared with (`rivals`). The preset itself always is."""

    GROUP = "Prices and measurement"

    simpler: bool = option(
        False,
        help="Measure recipes of simpler methods too: the preset moved by statistics, weighted error, greedy.",
        efforts={"high": True},
    )
    moved_share: int = option(4, least=1, help="One tensor in this many goes up, and one down.")
    moved_bpw: float = option(0.5, least=0.001, help="Smallest step, in bits per weight.")


@dataclasses.dataclass(frozen=True)
class PlanDecoding(Decoding):
    """How a model is decoded while recipes are measured: in shorter chunks than when quants are."""

    n_ctx: int = option(
        128, "-c", "--ctx-size", least=4, metavar="TOKENS", help="Tokens of a chunk, which is one context."
    )
    n_batch: int = option(
        512, "-b", "--batch-size", least=1, decides=False, metavar="TOKENS", help="Tokens decoded by one call."
    )
    unscored: int | None = option(
        None,
        least=0,
        help="Predictions at the start of a chunk that are not scored.",
        unset="a sixteenth of the chunk",
    )

    def deciding(self) -> dict[str, object]:
        """As of `Decoding`, and what is scored of a chunk."""
        return {**super().deciding(), "unscored": self.measuring(1).unscored}

    def measuring(self, chunks: int) -> MeasureOptions:
        """How so many chunks are measured."""
        settings = nearly_all_scored(self, chunks)
        return settings if self.unscored is None else settings.replace(unscored=self.unscored)


@dataclasses.dataclass(frozen=True)
class PlanOptions(Options):
    """All options of a plan."""

    menu: str = option(
        "iq",
        "--menu",
        metavar="k|iq|all|fast|TYPES",
        help="Types to choose from.",
        efforts={"high": "all"},
    )
    bpw_below: float = option(1.5, least=0, help="A tensor's type has at most this many bits less than the target.")
    bpw_above: float = option(4.5, least=0, help="A tensor's type has at most this many bits more than the target.")
    fast_share: float = option(
        0.9,
        least=0.01,
        help="Speed from which a type is fast (--menu fast), as a share of that of a K-quant of the same size.",
    )
    unreached_type: str = unreached_option()
    measure: bool = option(True, "--feedback/--no-feedback", help="Measure recipes and correct prices.")
    metadata_bytes: int = option(
        384, least=0, help="Bytes left free in a rung's file for metadata on rounding and smoothing."
    )
    cache_bytes: int | None = option(
        None,
        least=0,
        decides=False,
        help="Largest size of the rendered blocks kept.",
        unset="four times the model, and at most half of the free disk",
    )
    constraints: Constraints = option(Constraints)
    prices: PriceOptions = option(PriceOptions)
    feedback: FeedbackOptions = option(FeedbackOptions)
    rivals: RivalOptions = option(RivalOptions)
    decoding: PlanDecoding = option(PlanDecoding)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (name := self.menu.strip().lower()) in MENUS:
            object.__setattr__(self, "menu", name)  # so that "K" is what "k" is, in keys too

    @property
    def chunks(self) -> int:
        """Chunks of text that are needed; as many without feedback, so that prices serve both."""
        return max(self.prices.probe_chunks, self.feedback.text_chunks)

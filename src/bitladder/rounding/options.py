"""How to round: the constants that decide which blocks a tensor gets."""

import dataclasses
from typing import Literal

from bitladder.options import Options, option

Method = Literal["stock", "feedback", "descent", "best"]


@dataclasses.dataclass(frozen=True)
class RoundingOptions(Options):
    """How to round.

    "feedback" hands the error of each column on to the columns after it; "descent" then changes single indices as long
    as that helps; "best" changes scales too; "stock" keeps the library's blocks.
    """

    GROUP = "Rounding"

    method: Method = option(
        "best",
        "--rounding",
        help="stock: llama.cpp's rounding; best: lower loss, hours for large models; feedback, descent: simpler "
        "forms of best.",
        efforts={"fast": "stock"},
    )
    damping: float = option(0.1, least=0, help="Added to the diagonals of second moments, as a share of their mean.")
    shrinkage: float = option(
        0.1, least=0, most=1, help="Share by which entries of second moments off the diagonal are reduced first."
    )
    passes: int = option(
        2,
        least=0,
        help="Most passes over a tensor after feedback.",
        efforts={"fast": 1, "high": 6},
    )
    by_importance: bool = option(False, help="Round columns with large inputs first, not from left to right.")
    two_sided: bool = option(True, help="Rows make up for each other's errors where output moments are known.")
    steps: tuple[float, ...] = option(
        (1, 0.95, 1.05, 0.9, 1.1), help="Factors of the step of a block that has a step of its own, which are tried."
    )
    turned_steps: tuple[float, ...] = option(
        (-0.9, -1, -1.1),
        help="Further factors for types whose levels reach farther on one side of 0 than on the other.",
    )
    scale_moves: int = option(2, least=0, help="How far the scale of points may move in one pass.")
    scale_every: int = option(
        2,
        least=1,
        help="Passes from one trial of scales and steps to the next; the first pass has one.",
    )
    enough: float = option(0.002, least=0, help="Passes end when one lowers the output error by less than this share.")
    hold: float = option(
        0.5, least=0, help="Both signs of a column that should be below this share of the least magnitude are tried."
    )
    hold_even: float = option(1.0, least=0, help="The same for types in which the number of minuses is even.")

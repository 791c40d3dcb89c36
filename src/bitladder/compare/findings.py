"""What a comparison finds out about where a file is from."""

import dataclasses
from typing import Literal

# "other": it is not a quant of the base, for certain. "sign": it probably is of another checkpoint, or was changed on
# purpose. "note": it differs in something that leaves the comparison fair.
Level = Literal["other", "sign", "note"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A difference from the base, in a sentence; `about` says what was looked at."""

    level: Level
    about: Literal["architecture", "vocabulary", "tokenizer", "hyperparameters", "tensors", "weights", "perplexity"]
    text: str


def worst(findings: list[Finding]) -> Level | None:
    """The gravest level of several; None if there are none."""
    levels: tuple[Level, ...] = ("other", "sign", "note")
    return next((level for level in levels if any(one.level == level for one in findings)), None)

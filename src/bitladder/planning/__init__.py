"""From prices to a recipe: a target, an exact allocation, and measured feedback."""

from bitladder.planning.constraints import Constraints, parse_floor
from bitladder.planning.feedback import FeedbackEffort, Found, Tried
from bitladder.planning.plan import Planner, PlanOptions, PlanResult
from bitladder.planning.subject import Preset, Subject
from bitladder.planning.target import Target

__all__ = [
    "Constraints",
    "FeedbackEffort",
    "Found",
    "PlanOptions",
    "PlanResult",
    "Planner",
    "Preset",
    "Subject",
    "Target",
    "Tried",
    "parse_floor",
]

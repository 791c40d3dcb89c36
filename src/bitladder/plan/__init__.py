"""From prices to a recipe: a target, an exact allocation, and measured feedback."""

from bitladder.plan.constraints import Constraints, parse_floor
from bitladder.plan.feedback import FeedbackEffort, Found, Tried
from bitladder.plan.planner import Planner, PlanOptions, PlanResult
from bitladder.plan.subject import Preset, Subject
from bitladder.plan.target import Target

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

"""The steps of a run, decided before anything is done: from the options, without reading or writing."""

from collections.abc import Sequence

from bitladder.ladder.options import RunOptions
from bitladder.ladder.steps.base import MakeBase
from bitladder.ladder.steps.bench import Bench
from bitladder.ladder.steps.convert import Convert
from bitladder.ladder.steps.imatrix import CollectImatrix
from bitladder.ladder.steps.measure import Measure
from bitladder.ladder.steps.memory import Memory
from bitladder.ladder.steps.moments import CollectMoments
from bitladder.ladder.steps.naive import Naive
from bitladder.ladder.steps.plan import Candidates, PlanRung
from bitladder.ladder.steps.preset import MakePreset
from bitladder.ladder.steps.price import prices_of
from bitladder.ladder.steps.quantize import Quantize
from bitladder.ladder.steps.round import Round
from bitladder.ladder.steps.score import Score
from bitladder.ladder.steps.smooth import Smooth
from bitladder.ladder.steps.step import Step
from bitladder.ladder.steps.trial import TrySmoothing
from bitladder.rundir import naive


def steps_of(options: RunOptions, others: Sequence[str] = ()) -> list[Step]:
    """The steps of a run, each after those that it reads; `others` names the files of --compare."""
    rungs = options.rungs
    steps: list[Step] = [Convert(options), Memory(options), MakeBase(options), Measure(options, "base")]
    steps.append(CollectImatrix(options))
    if options.rounds:
        steps.append(CollectMoments(options))
    if options.betters:
        steps += [MakePreset(options, rung) for rung in rungs]
    if options.smooths:
        steps += [Smooth(options), *(TrySmoothing(options, rung) for rung in rungs)]
    if options.plans:
        steps += [
            *prices_of(options),
            *(PlanRung(options, rung) for rung in rungs),
            Candidates(options),
        ]
    if options.betters:
        steps += [Naive(options, rung) for rung in rungs]
    if options.rounds and len(rungs) > 1:
        steps.append(Round(options))
    for rung in rungs:
        steps += [Quantize(options, rung), Measure(options, rung)]
    steps += [Measure(options, name) for name in others]
    if options.bench:
        steps.append(Bench(options, others))
    presets = [naive(rung) for rung in rungs] if options.betters else []
    return [*steps, *(Score(options, label) for label in ("base", *presets, *rungs, *others))]

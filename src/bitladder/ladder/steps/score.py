"""The step that puts together what was measured, timed and planned of a model."""

from typing import Any

from bitladder import evaluate
from bitladder.files import read_arrays, write_json
from bitladder.ladder.context import Run, read_json
from bitladder.ladder.source import about
from bitladder.ladder.steps.step import Product, Step
from bitladder.rundir import NAIVE, naive


class Score(Step):
    """figures, speeds, plan → scores.

    It is a step of its own, so that figures stay valid when only the speeds are measured again.
    """

    verb = "score"
    algorithms = (evaluate.SCORES,)

    @property
    def needs(self) -> tuple[str, ...]:
        """What was measured, timed and planned."""
        options, rung = self.options, self.rung
        needs = [self._measurement]
        if options.bench:
            needs.append("bench")
        if rung:
            needs.append(f"quantize {rung}")
            needs += [f"plan {rung}"] if options.plans else []
            needs += [f"naive {rung}"] if options.betters else []
        return tuple(needs)

    @property
    def _preset(self) -> str | None:
        """The rung whose preset by itself the label stands for, or None."""
        rung = self.label.removesuffix(NAIVE)
        return rung if rung != self.label and rung in self.options.rungs else None

    @property
    def _measurement(self) -> str:
        """The step that measured the model."""
        return f"naive {self._preset}" if self._preset else f"measure {self.label}"

    def decides(self) -> dict[str, Any]:
        """How the rung was made, which its scores say."""
        return {"mode": self.options.mode, "rounding": self.options.refine.rounding.method} if self.rung else {}

    def make(self, run: Run) -> Product:
        """Puts the figures together."""
        label, place = self.label, dict[str, Any]()
        if label in run.others:
            place |= about(run.others[label], run.facts(f"measure {label}")["doubts"])
        if self.rung:
            place |= self._rung_fields(run)
        if self._preset:
            place |= {"role": "naive", "rung": self._preset, "mode": "naive"}
        scores = evaluate.read_document(run.files(self._measurement)[0], evaluate.Scores)
        if self.options.bench:
            place["bench"] = read_json(run.layout.bench).get(label, [])
        out = run.layout.scores(label)
        write_json(out, evaluate.RunScores.of(scores, **place).to_json())
        return Product([out])

    def _rung_fields(self, run: Run) -> dict[str, Any]:
        """How the rung was made, and how it differs from the preset by itself."""
        rung, options = self.label, self.options
        fields: dict[str, Any] = {"smoothed": run.smoothed(rung)}
        if options.plans:
            plan = read_json(run.files(f"plan {rung}")[0])
            fields |= {"role": "rung", "mode": plan["mode"], "predicted_kld": plan["predicted_kld"]}
        if options.rounds:
            fields["rounding"] = options.refine.rounding.method
            fields["tuned"] = bool(run.facts(f"quantize {rung}").get("tuned"))
        if options.betters:
            paired = paired_with_naive(run, rung)
            fields |= {"paired": paired.paired, "texts": paired.texts}
        return fields


def paired_with_naive(run: Run, rung: str) -> evaluate.Scores:
    """The scores of a rung with the paired differences from the preset by itself (negative is better)."""
    this = evaluate.read_document(run.layout.measured(rung), evaluate.Scores)
    preset = evaluate.read_document(run.layout.measured(naive(rung)), evaluate.Scores)
    measured = []
    for label, scores in ((rung, this), (naive(rung), preset)):
        measured.append(evaluate.Measurement(scores, read_arrays(run.layout.tokens(label))))
    return evaluate.with_pair(*measured)

"""How long a run will still take, from how long its work has taken so far.

Each step has an amount: roughly the tokens it decodes, or as many tokens as its other work takes the time of. Amounts
of one kind of step are in proportion to each other; how long a kind really takes is learnt from the steps of that kind
that were done, and until there is one, from all others.
"""

from collections.abc import Mapping, Sequence

from bitladder.ladder.plan import BENCH_REPETITIONS, TASK_CTX, RunOptions, Step
from bitladder.text.texts import Text

# Time per weight, as tokens decoded in the same time: a weight is used once a token. Coarse, and replaced by what is
# seen; i-quants search a codebook for every block.
CONVERT, QUANTIZE, QUANTIZE_IQ, ROUND = 200, 1500, 6000, 30_000
MOMENTS = 4  # a token's gradients, beside its prediction
TUNE = 8  # and a step of tuning
GENERATED = 10  # a generated token takes the time of so many in a prompt
QUESTION = 4 * TASK_CTX // 8  # tokens that a question's choices take
PRICED = 40_000  # prices of all rungs together: hundreds of swaps over a few chunks
PLANNED = 20_000  # a plan, tried and corrected


def amounts(
    steps: Sequence[Step], options: RunOptions, text_tokens: int, calibration_tokens: int, questions: int
) -> dict[str, float]:
    """Each step's amount of work, by its name.

    Parameters: tokens of the text that is measured and of all calibration texts, as far as they are used; questions
    asked of each model.
    """
    decode = float(text_tokens + questions * QUESTION)
    models = 1 + sum(step.kind == "quantize" for step in steps)
    bench = sum(prompt + GENERATED * generated for prompt, generated in options.bench_tests) * BENCH_REPETITIONS
    known: dict[str, float] = {
        "convert": CONVERT,
        "base": text_tokens,
        "imatrix": calibration_tokens,
        "smooth": 2 * CONVERT,
        "trial": 2 * QUANTIZE,
        "moments": MOMENTS * options.moments_chunks * options.n_ctx * len(options.calibration),
        "price": PRICED,
        "plan": PLANNED,
        "measure": decode,
        "bench": bench * models,
    }
    found = {}
    for step in steps:
        made = QUANTIZE_IQ if (step.rung or "").startswith("IQ") else QUANTIZE
        tuned = TUNE * options.tune_chunks * options.n_ctx * len(options.calibration)
        rounded = made if options.rounding == "stock" else ROUND + tuned
        amount = {"quantize": rounded, "naive": made + decode}.get(step.kind, known.get(step.kind, 0))
        if step.name == "measure base":
            amount = questions * QUESTION  # its perplexity is in the base already
        found[step.name] = float(amount)
    return found


def pace_of(
    steps: Sequence[Step], options: RunOptions, text: Text, calibration: Sequence[Text], questions: int
) -> "Pace":
    """The pace of a run, as far as its work can be told beforehand; `questions` are asked of each model."""

    def tokens(texts: Sequence[Text], chunks: int | None) -> int:
        counts = [len(one.text) // 4 for one in texts]  # a token is about four characters
        return sum(min(count, chunks * options.n_ctx) if chunks else count for count in counts)

    scored, used = tokens([text], options.chunks), tokens(calibration, options.imatrix_chunks)
    work = amounts(steps, options, text_tokens=scored, calibration_tokens=used, questions=questions)
    return Pace({step.name: step.kind for step in steps}, work)


class Pace:
    """Times of steps; the clock is the caller's, in seconds. `kinds` and `amounts` are by a step's name."""

    def __init__(self, kinds: Mapping[str, str], amounts: Mapping[str, float]) -> None:
        self._kinds, self._amounts = kinds, amounts
        self._left = dict.fromkeys(kinds)
        self._seen: dict[str, tuple[float, float]] = {}  # kind → amount done, seconds
        self._now: tuple[str, float, float] | None = None  # step under way, when it began, its share done

    def begin(self, step: str, now: float) -> None:
        """A step begins."""
        self._now = (step, now, 0.0)

    def advance(self, share: float) -> None:
        """The step under way is done to this share (0 … 1). What it says goes up only."""
        if self._now is not None:
            self._now = (*self._now[:2], min(1.0, max(share, self._now[2])))

    def end(self, now: float, *, made: bool) -> None:
        """The step under way is over; `made` is False if it was complete from before, which tells nothing of time."""
        if self._now is None:
            return
        step, began, _ = self._now
        self._now = None
        self._left.pop(step, None)
        if made:
            self._add(self._seen, step, self._amounts[step], now - began)

    def left(self, now: float) -> float | None:
        """Seconds until the last step is done; None while nothing has been seen of any work."""
        seen, rest = dict(self._seen), 0.0
        done_now = 0.0
        if self._now is not None:
            step, began, share = self._now
            if share > 0:
                self._add(seen, step, self._amounts[step] * share, now - began)
                done_now = self._amounts[step] * share
        amount, seconds = (sum(part[i] for part in seen.values()) for i in (0, 1))
        if not amount:
            return None
        for step in self._left:
            own_amount, own_seconds = seen.get(self._kinds[step], (0.0, 0.0))
            per = own_seconds / own_amount if own_amount else seconds / amount
            todo = self._amounts[step] - (done_now if self._now and step == self._now[0] else 0.0)
            rest += todo * per
        return rest

    def _add(self, to: dict[str, tuple[float, float]], step: str, amount: float, seconds: float) -> None:
        before = to.get(self._kinds[step], (0.0, 0.0))
        to[self._kinds[step]] = (before[0] + amount, before[1] + seconds)

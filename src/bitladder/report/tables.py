"""The tables of the card and of the HTML report, as cells, and what the figures of each column mean."""

import collections
import dataclasses
import decimal
import math
from collections.abc import Callable, Sequence

from bitladder.evaluate import Figure, Role, RunScores, mixed_pairs
from bitladder.report import best
from bitladder.report.finished_run import FinishedRun, RunModel

# A smaller value is written with a power of ten, because a plain decimal has too many zeros.
SMALLEST_PLAIN = 1e-5


def with_errors(figures: Sequence[Figure | None], scale: float = 1.0) -> list[str]:
    """Figures of a column with their errors, all in one form: with powers of ten if one of them needs them.

    Example:
        >>> with_errors([Figure(value=0.0005118, error=5.4e-06), None])
        ['0.0005118 ± 0.0000054', '–']
    """
    powers = any(figure and 0 < abs(figure.value * scale) < SMALLEST_PLAIN for figure in figures)
    return [with_error(figure, scale, powers=powers) if figure else DASH for figure in figures]


def with_error(figure: Figure, scale: float = 1.0, *, powers: bool | None = None) -> str:
    """A figure with its error as text. Both are multiplied by `scale` (100 for percent).

    Parameters:
        figure: the figure.
        scale: the factor.
        powers: whether it is written with powers of ten; None: only if it is tiny.

    Example:
        >>> with_error(Figure(value=12.3456, error=0.0723))
        '12.346 ± 0.072'
    """
    value, error = figure.value * scale, figure.error * scale
    if powers is None:
        powers = 0 < abs(value) < SMALLEST_PLAIN
    if not math.isfinite(value):
        return str(value)
    if not math.isfinite(error) or error <= 0:
        return f"{value:z.3e}" if powers else significant(value)
    # Rounding can add a digit (0.0996 → 0.10), so the decimal place is that of the rounded error.
    rounded = decimal.Decimal(f"{error:.1e}")
    exponent = rounded.adjusted() - 1
    if powers:
        digits = max(0, _magnitude(value) - exponent)
        return f"{value:z.{digits}e} ± {error:.1e}"
    places = max(0, -exponent)
    return f"{value:z.{places}f} ± {error:.{places}f}"


def significant(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, as a plain decimal unless it is tiny.

    Example:
        >>> significant(0.00051184), significant(12.3456), significant(2.0)
        ('0.0005118', '12.35', '2')
    """
    if 0 < abs(value) < SMALLEST_PLAIN:
        return f"{value:.{digits - 1}e}"
    text = f"{value:z.{max(0, digits - 1 - _magnitude(value))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float, *, least: int = 2, most: int = 5) -> str:
    """A share of 1 in percent, with `least` to `most` decimals, so that its distance from 100 % has two digits.

    Example:
        >>> percent(0.99876)
        '99.88 %'
    """
    distance = abs(1 - share) * 100
    places = least if distance == 0 else min(most, max(least, 1 - _magnitude(distance)))
    return f"{share * 100:.{places}f} %"


def gigabytes(size: int) -> str:
    """A file's size in GB of 10⁹ bytes, with three significant digits and at least two decimals."""
    value = size / 1e9
    return f"{value:.{max(2, 2 - _magnitude(value))}f}"


def _magnitude(value: float) -> int:
    """The power of ten of the first digit; 0 for a value of 0."""
    return math.floor(math.log10(abs(value))) if value else 0


DASH = "–"
GAIN = "KLD − preset's"  # heading of the column
# What follows the name of a model that is no rung of this run. The legend of the tables explains the marks.
MARKS: dict[Role, str] = {"base": " (full precision)", "rung": "", "naive": " ◇", "third-party": " †"}

# What each figure means, in two sentences.
METRICS = {
    "PPL": (
        "Perplexity: the exponential of the mean negative log-likelihood of a token of the text. Lower is better, but "
        "only models with the same tokens can be compared, and only on the same text."
    ),
    "ρPPL": (
        "The correlation, over tokens, of the log-likelihoods under the quant and under the full precision. 100 % "
        "means that both find the same tokens hard and easy."
    ),
    "KLD": (
        "Kullback-Leibler divergence: how far the quant's distribution of the next token is from the full precision's, "
        "in nats, averaged over tokens. It is 0 for an exact copy, and every change of a prediction adds to it, so it "
        "distinguishes quants best."
    ),
    "RMS Δp": (
        "The root of the mean squared change of the probability of the token that follows in the text. It shows by how "
        "many percentage points such a probability typically changes."
    ),
    "Same top token": (
        "The share of positions at which quant and full precision have the same likeliest token. At all other "
        "positions greedy decoding takes another token."
    ),
}
SPEED = (
    "Tokens per second, higher is faster: pp reads a prompt of that many tokens, tg generates that many, pp+tg does "
    "both in turn. The figures hold for the machine on which they were measured."
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Parameters:
        text: what is shown.
        value: the figure that sorts the column; None if it was not measured.
        best: whether the figure is within noise of the best of its column.
    """

    text: str
    value: float | None = None
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """The row of a model: its name with its mark, its role, the name of its file, and the cells."""

    label: str
    role: Role
    file: str
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True)
class ModelTable:
    """The headings of all columns except the first, which names the model, and the rows."""

    heads: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def bold(self) -> bool:
        """Whether a cell is marked as the best."""
        return any(cell.best for line in self.lines for cell in line.cells)

    @property
    def roles(self) -> set[Role]:
        """The roles of its models, which a legend has to explain."""
        return {line.role for line in self.lines}


def label(model: RunModel) -> str:
    """A model's name with its mark."""
    return model.label + MARKS[model.role]


def quality(run: FinishedRun) -> ModelTable:
    """PPL, ρPPL, KLD, RMS Δp and same top token, the full precision first; with presets, the difference from them."""
    columns = [
        _figures(run, "PPL", lambda s: s.ppl, best.perplexity),
        _plain(run, "ρPPL", lambda s: s.rho_ppl, percent),
        _figures(run, "KLD", lambda s: s.kld, best.kld),
        _figures(run, "RMS Δp", _rms, best.independent(_rms), scale=100),
        _figures(run, "Same top token", _same, best.independent(_same), higher=True, scale=100),
    ]
    if run.naive:
        columns.append(_gained(run))
    return _table(run, columns)


def by_text(run: FinishedRun) -> ModelTable | None:
    """KLD on each of several texts, and its difference from the preset's; None for a single text."""
    if not run.texts:
        return None
    columns = []
    for index, text in enumerate(run.texts):
        on_text = run.on(index)
        columns.append(_figures(on_text, f"KLD, {text}", lambda s: s.kld, best.kld))
        if run.naive:
            columns.append((f"{GAIN}, {text}", _gained(on_text)[1]))
    return _table(run, columns)


def mixed(run: FinishedRun) -> list[str]:
    """A sentence for each two files of which one is better on one text and worse on another."""
    runs = [run.on(index) for index in range(len(run.texts))]

    def gaps(this: int, other: int) -> list[Figure]:
        figures = (best.kld(on_text.quants[this].scores, on_text.quants[other].scores) for on_text in runs)
        return [figure for figure in figures if figure]

    sentences = []
    for pair in mixed_pairs([model.scores.bytes for model in run.quants], gaps):
        on_texts = (f"{signed(gap)} on {text}" for gap, text in zip(pair.gaps, run.texts, strict=True))
        this, other = (label(run.quants[place]) for place in (pair.this, pair.other))
        sentences.append(f"KLD of {this} less that of {other}: {', '.join(on_texts)}.")
    return sentences


def tasks(run: FinishedRun) -> ModelTable | None:
    """The accuracy in each task and the average of the five benchmarks, full precision first; None without tasks."""
    names = list(dict.fromkeys(name for model in run.models for name in model.scores.tasks))
    if not names:
        return None
    columns = [_figures(run, name, _accuracy(name), best.task(name), higher=True, scale=100) for name in names]
    if any(model.scores.average() for model in run.models):
        columns.append(_figures(run, "average", RunScores.average, best.tasks_average, higher=True, scale=100))
    return _table(run, columns)


def speed_tests(run: FinishedRun) -> list[str]:
    """The names of the speed tests, in the order in which they were measured."""
    return list(dict.fromkeys(row.test for model in [*run.quants, run.base] for row in model.scores.bench))


def generation_test(run: FinishedRun) -> str | None:
    """The speed test of the table of choices: in a chat the user waits for generated tokens. None without one."""
    tests = [test for test in speed_tests(run) if any(rung.scores.speed(test) for rung in run.rungs)]
    return next((test for test in tests if test.startswith("tg")), None)


def speeds(run: FinishedRun) -> ModelTable | None:
    """Tokens per second of each test; None if no speed was measured."""
    tests = speed_tests(run)
    if not tests:
        return None
    return _table(run, [_figures(run, t, _speed(t), best.independent(_repeated(t)), higher=True) for t in tests])


def sizes(run: FinishedRun) -> ModelTable:
    """Size in GB and bits per weight; with presets by themselves theirs too, and what is saved if something is.

    The full precision is a row if its file belongs to the run.
    """
    lines = []
    heads: tuple[str, ...] = ("Size (GB)", "Bits per weight")
    saves = any(_saved(rung.scores, naive.scores).value for rung in run.rungs if (naive := _preset(run, rung)))
    if run.naive:
        heads += ("Preset's size (GB)", "Preset's bits per weight", *(("Saved",) if saves else ()))
    models = [*run.rungs, *run.others, *([run.base] if run.has_full_file else [])]
    for model in sorted(models, key=lambda model: model.size_order):
        cells = [*_size(model.scores)]
        if run.naive:
            naive = _preset(run, model)
            cells += _size(naive.scores) if naive else [Cell(DASH)] * 2
            if saves:
                cells.append(_saved(model.scores, naive.scores) if naive else Cell(DASH))
        lines.append(Line(label(model), model.role, model.scores.model, tuple(cells)))
    return ModelTable(heads, tuple(lines))


def type_counts(model: RunModel) -> str:
    """The types of a model's matrices in words, the most frequent first: "120 q4_K, 31 q6_K"."""
    if model.recipe is None:
        return DASH
    return count_text(collections.Counter(kind for kind in model.recipe.tensors.values() if kind.lower() != "f32"))


def count_text(counts: "collections.Counter[str] | dict[str, int]") -> str:
    """Numbers of tensors by type, in words."""
    return ", ".join(f"{count} {kind}" for kind, count in collections.Counter(counts).most_common())


_Column = tuple[str, list[Cell]]


def _table(run: FinishedRun, columns: Sequence[_Column]) -> ModelTable:
    """The columns side by side. A model of which nothing was measured has no row."""
    cells = zip(*(column for _, column in columns), strict=True)
    lines = [
        Line(label(model), model.role, model.scores.model, tuple(row))
        for model, row in zip(run.models, cells, strict=True)
        if any(cell.value is not None for cell in row)
    ]
    return ModelTable(tuple(head for head, _ in columns), tuple(lines))


def _figures(
    run: FinishedRun,
    head: str,
    figure: Callable[[RunScores], Figure | None],
    difference: best.Difference,
    *,
    higher: bool = False,
    scale: float = 1.0,
) -> _Column:
    """A column of figures with ±, in percent if `scale` is 100. The full precision is never marked as the best."""
    unit = " %" if scale == 100 else ""
    figures = [figure(model.scores) for model in run.models]
    marks = [False, *best.best(run.quants, difference, higher=higher)]
    return head, [
        Cell(text + unit, value.value * scale, is_best) if value else Cell(DASH)
        for value, text, is_best in zip(figures, with_errors(figures, scale), marks, strict=True)
    ]


def _plain(
    run: FinishedRun, head: str, value: Callable[[RunScores], float | None], text: Callable[[float], str]
) -> _Column:
    """A column of figures without ±. Without an error none can be called the best."""
    values = [value(model.scores) for model in run.models]
    return head, [Cell(DASH) if figure is None else Cell(text(figure), figure) for figure in values]


def _gained(run: FinishedRun) -> _Column:
    """The KLD of each rung less that of its preset."""
    presets = [_preset(run, model) for model in run.models]
    figures = [
        best.kld(model.scores, naive.scores) if naive else None
        for model, naive in zip(run.models, presets, strict=True)
    ]
    return GAIN, [
        Cell(signed(figure, text), figure.value) if figure else Cell(DASH)
        for figure, text in zip(figures, with_errors(figures), strict=True)
    ]


def _preset(run: FinishedRun, model: RunModel) -> RunModel | None:
    """The preset by itself that a rung stands beside."""
    return run.naive.get(model.label) if model.role == "rung" else None


def all_paired(run: FinishedRun) -> bool:
    """Whether every rung was compared with its preset token by token."""
    return all(best.paired_kld(rung.scores, naive.scores) for rung in run.rungs if (naive := _preset(run, rung)))


def signed(figure: Figure, text: str | None = None) -> str:
    """A difference with its sign, as "−0.0123 ± 0.0004"; `text` is the difference in the form of its column."""
    text = text or with_error(figure)
    return f"−{text[1:]}" if text.startswith("-") else f"+{text}"


def _size(scores: RunScores) -> tuple[Cell, Cell]:
    return Cell(gigabytes(scores.bytes), scores.bytes / 1e9), Cell(f"{scores.bpw:.2f}", scores.bpw)


def _saved(this: RunScores, naive: RunScores) -> Cell:
    """The share of the preset's bytes that a rung saves, in percent; 0 if it is less than can be seen."""
    share = round(100 * (1 - this.bytes / naive.bytes), 1)
    return Cell(f"{share:.1f} %".replace("-", "−"), share) if share else Cell("same size", 0.0)


def _rms(scores: RunScores) -> Figure | None:
    return scores.delta_p.rms if scores.delta_p else None


def _same(scores: RunScores) -> Figure | None:
    return scores.same_top_p


def _accuracy(name: str) -> Callable[[RunScores], Figure | None]:
    return lambda scores: scores.tasks[name].accuracy if name in scores.tasks else None


def _speed(test: str) -> Callable[[RunScores], Figure | None]:
    return lambda scores: scores.speed(test)


def _repeated(test: str) -> Callable[[RunScores], Figure | None]:
    """The speed in a test if it was measured more than once. Nobody knows the noise of a single time."""

    def speed(scores: RunScores) -> Figure | None:
        figure = scores.speed(test)
        return figure if figure and figure.error > 0 else None

    return speed

"""The tables of the card and of the HTML report, as cells: a text, the figure behind it, and whether it is the best."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

from bitladder.report import best
from bitladder.report.numbers import Figure, gigabytes, percent, with_error
from bitladder.report.rundir import Measured, Run
from bitladder.report.scores import Role, Scores

DASH = "–"
# Behind the name of what is not a rung of this run; the tables' legend explains them.
MARKS: dict[Role, str] = {"base": " (full precision)", "rung": "", "naive": " ◇", "third-party": " †"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """`value` sorts the column; None is what was not measured. `best`: within noise of the best of its column."""

    text: str
    value: float | None = None
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """A model's row; `label` has its mark, `file` is the name of its GGUF."""

    label: str
    role: Role
    file: str
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """Headings of all columns but the first, which names the model, and the rows."""

    heads: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def roles(self) -> set[Role]:
        """What kinds of model it has, so that a legend need not explain others."""
        return {line.role for line in self.lines}


def label(model: Measured) -> str:
    """A model's name with its mark."""
    return model.label + MARKS[model.role]


def quality(run: Run) -> Table:
    """PPL, ρPPL, KLD, RMS Δp and same top token, the full precision first; with presets the gain over them."""
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


def tasks(run: Run) -> Table | None:
    """Accuracy in each benchmark and their average, the full precision first; None without benchmarks."""
    names = list(dict.fromkeys(name for one in [run.base, *run.quants] for name in one.scores.tasks))
    if not names:
        return None
    columns = [_figures(run, name, _accuracy(name), best.task(name), higher=True, scale=100) for name in names]
    if len(names) > 1:
        columns.append(_figures(run, "average", Scores.average, best.tasks_average, higher=True, scale=100))
    return _table(run, columns)


def speed_tests(run: Run) -> list[str]:
    """The names of the speed tests, in the order in which they were measured."""
    return list(dict.fromkeys(row.test for one in [*run.quants, run.base] for row in one.scores.bench))


def speeds(run: Run) -> Table | None:
    """Tokens per second of each test; None where no speed was measured."""
    tests = speed_tests(run)
    if not tests:
        return None
    return _table(run, [_figures(run, t, _speed(t), best.independent(_speed(t)), higher=True) for t in tests])


def sizes(run: Run) -> Table:
    """Size in GB and bits per weight; where there are presets by themselves, theirs and what is saved."""
    lines = []
    heads: tuple[str, ...] = ("Size (GB)", "Bits per weight")
    if run.naive:
        heads += ("Preset's size (GB)", "Preset's bits per weight", "Saved")
    for one in sorted([*run.rungs, *run.others], key=lambda one: one.size):
        cells = [*_size(one.scores)]
        if run.naive:
            naive = run.naive.get(one.label) if one.role == "rung" else None
            cells += [*_size(naive.scores), _saved(one.scores, naive.scores)] if naive else [Cell(DASH)] * 3
        lines.append(Line(label(one), one.role, one.scores.model, tuple(cells)))
    return Table(heads, tuple(lines))


def type_counts(model: Measured) -> str:
    """The types of a model's matrices in words, the most frequent first: "120 q4_K, 31 q6_K"."""
    if model.recipe is None:
        return DASH
    return count_text(collections.Counter(kind for kind in model.recipe.tensors.values() if kind.lower() != "f32"))


def count_text(counts: "collections.Counter[str] | dict[str, int]") -> str:
    """Counts by type in words."""
    return ", ".join(f"{count} {kind}" for kind, count in collections.Counter(counts).most_common())


_Column = tuple[str, list[Cell]]


def _table(run: Run, columns: Sequence[_Column]) -> Table:
    """The columns side by side, without the rows of models of which none of this was measured."""
    models = [run.base, *run.quants]
    cells = zip(*(column for _, column in columns), strict=True)
    lines = [
        Line(label(one), one.role, one.scores.model, tuple(row))
        for one, row in zip(models, cells, strict=True)
        if any(cell.value is not None for cell in row)
    ]
    return Table(tuple(head for head, _ in columns), tuple(lines))


def _figures(
    run: Run,
    head: str,
    figure: Callable[[Scores], Figure | None],
    difference: best.Difference,
    *,
    higher: bool = False,
    scale: float = 1.0,
) -> _Column:
    """A column of figures with ±, in percent where `scale` is 100; the full precision takes no part in being best."""
    unit = " %" if scale == 100 else ""
    found = [figure(one.scores) for one in [run.base, *run.quants]]
    bests = [False, *best.best(run.quants, difference, higher=higher)]
    return head, [
        Cell(with_error(one, scale) + unit, one.value * scale, is_best) if one else Cell(DASH)
        for one, is_best in zip(found, bests, strict=True)
    ]


def _plain(run: Run, head: str, value: Callable[[Scores], float | None], text: Callable[[float], str]) -> _Column:
    """A column of figures without ±: nothing says which of them are really the best."""
    found: Iterable[float | None] = (value(one.scores) for one in [run.base, *run.quants])
    return head, [Cell(DASH) if one is None else Cell(text(one), one) for one in found]


def _gained(run: Run) -> _Column:
    """What a rung's KLD is above or below its preset's."""
    cells = []
    for one in [run.base, *run.quants]:
        naive = run.naive.get(one.label) if one.role == "rung" else None
        figure = best.kld(one.scores, naive.scores) if naive else None
        cells.append(Cell(signed(figure), figure.value) if figure else Cell(DASH))
    return "KLD − preset's", cells


def all_paired(run: Run) -> bool:
    """Whether every rung was compared with its preset token by token."""
    return all(best.paired_kld(one.scores, run.naive[one.label].scores) for one in run.rungs if one.label in run.naive)


def signed(figure: Figure) -> str:
    """A difference with its sign, as "−0.0123 ± 0.0004"."""
    text = with_error(figure)
    return text.replace("-", "−", 1) if figure.value < 0 else f"+{text}"


def _size(scores: Scores) -> tuple[Cell, Cell]:
    return Cell(gigabytes(scores.bytes), scores.bytes / 1e9), Cell(f"{scores.bpw:.2f}", scores.bpw)


def _saved(this: Scores, naive: Scores) -> Cell:
    share = 100 * (1 - this.bytes / naive.bytes)
    return Cell(f"{share:.1f} %".replace("-", "−"), share)


def _rms(scores: Scores) -> Figure | None:
    return scores.delta_p.rms if scores.delta_p else None


def _same(scores: Scores) -> Figure | None:
    return scores.same_top_p


def _accuracy(name: str) -> Callable[[Scores], Figure | None]:
    return lambda scores: scores.tasks[name].accuracy if name in scores.tasks else None


def _speed(test: str) -> Callable[[Scores], Figure | None]:
    return lambda scores: scores.speed(test)

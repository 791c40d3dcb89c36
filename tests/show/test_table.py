"""The one table of the terminal: no figure is cut at any width, and what is left out is named."""

import ast
import io
import json
import pathlib
import random
import re

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

import bitladder
from bitladder.cli import invoke
from bitladder.evaluate import Figure, Scores
from bitladder.show import score_tables
from bitladder.show.imatrix_tables import FigureColumn
from bitladder.show.score_tables import _pm, eval_tables
from bitladder.show.table import Column, Table

WIDTHS = (60, 80, 120)
FIGURE = re.compile(r"\d[\d.,e+-]*")


def rendered(table, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table, crop=False)
    return console.file.getvalue().splitlines()


def note(lines):
    """The line that names columns without room, which may be wrapped."""
    text = " ".join(line.strip() for line in lines)
    return text[text.index("Not shown in") :] if "Not shown in" in text else ""


def figures_of(text):
    return set(FIGURE.findall(text.partition("Not shown in")[0]))


@pytest.mark.parametrize("width", WIDTHS)
def test_random_tables(width):
    generator = random.Random(width)
    for _ in range(60):
        count = generator.randint(2, 14)
        columns = [Column("name of it", fold=True)] + [
            Column(f"head{place}", right=True, rank=generator.choice([0, 0, 1, 2, 3])) for place in range(1, count)
        ]
        table = Table(columns)
        rows = []
        for row in range(3):
            cells = [f"{generator.uniform(0, 10 ** generator.randint(0, 8)):.4f}" for _ in range(1, count)]
            rows.append([f"a model number {row} 模型", *cells])
            table.add(rows[-1][0], *(Text(cell, "bold") for cell in cells))
        table.rule()
        table.add("all", *["–"] * (count - 1))
        lines = rendered(table, width)
        assert max(map(cell_len, lines)) <= width
        words, left_out = " ".join(lines).split(), note(lines)
        shown = {place for place in range(count) if not place or all(row[place] in words for row in rows)}
        for place in set(range(count)) - shown:
            assert columns[place].rank and columns[place].head in left_out
        if len(shown) < count:  # the one that was left out last would have no room
            last = min(set(range(count)) - shown, key=lambda place: (columns[place].rank, place))
            widths = [max(map(len, (columns[place].head, *(row[place] for row in rows)))) for place in range(count)]
            assert sum(widths[place] + 2 for place in shown - {0}) + len("number") + widths[last] + 2 > width


def test_a_column_for_each_model_goes_on_below():
    table = Table([Column("type"), *(Column(f"file-{number}") for number in range(9))])
    table.add("attn_v", *(f"8 × q{number}_K" for number in range(9)))
    lines = rendered(table, 60)
    assert [line.split()[0] for line in lines if "q" in line] == ["attn_v"] * 2
    assert [word for line in lines for word in line.split() if word.startswith("file-")] == [
        f"file-{number}" for number in range(9)
    ]
    assert note(lines) == ""


@pytest.mark.parametrize("width", WIDTHS[:2])
def test_long_names_of_models_as_headings_take_several_lines(width):
    names = [f"Some-Extraordinarily-Long-Model-Name-Instruct-Distill-v2.5-2026-Q{number}_K_M.gguf" for number in (3, 4)]
    table = Table([Column("", fold=True), *(Column(name, right=True) for name in names)])
    table.add("continuation, 6 questions, chance 25.0 %", "66.67 ± 21.08 %", "50.00 ± 22.36 %")
    lines = rendered(table, width)
    assert max(map(cell_len, lines)) <= width
    heads = [table.partition("─")[0].splitlines() for table in "\n".join(lines).split("\n\n")]
    columns = [column for head in heads for column in zip(*(line.split() for line in head), strict=True)]
    assert ["".join(column) for column in columns] == names
    assert {"66.67 ± 21.08 %", "50.00 ± 22.36 %"} == set(re.findall(r"[\d.]+ ± [\d.]+ %", "\n".join(lines)))


def test_all_tables_are_of_this_kind():
    """Only what stays on the screen while a run works is drawn by rich itself."""
    source = pathlib.Path(bitladder.__file__).parent
    users = [
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "rich.table"
    ]
    assert users == ["show/ladder_tables.py"]


def test_eval_at_all_widths(small_run):
    """Both tables of three models: every figure of the wide table, and no other, is in the narrow ones."""
    documents = [json.loads((small_run / "scores" / f"{name}.json").read_text()) for name in ("Q4_K_M", "Q8_0")]
    known = Scores.model_fields.keys()
    models = [Scores.model_validate({key: value for key, value in d.items() if key in known}) for d in documents]
    models += [scores.model_copy(update={"model": f"another-{scores.model}"}) for scores in models]
    for _, table in eval_tables(models):
        wide = figures_of(" ".join(rendered(table, 400)))
        assert len(wide) > 20
        for width in WIDTHS:
            lines = rendered(table, width)
            assert figures_of(" ".join(lines)) == wide
            assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize(
    "words",
    [
        ["show", "RUN", "--no-plot"],
        ["stats", "RUN/imatrix.gguf"],
        ["stats", "RUN/imatrix.gguf", "--by", "layer"],
        ["stats", "RUN/imatrix.gguf", "RUN/imatrix.gguf", "--by", "kind"],
        ["recipe", "show", "QUANT"],
        ["recipe", "diff", "QUANT", "MODEL"],
        ["quantize", "Q4_K_M", "-m", "MODEL", "--imatrix", "RUN/imatrix.gguf", "--dry-run"],
        ["push", "RUN", "someone/Tiny-GGUF", "--dry-run"],
    ],
    ids=lambda words: " ".join(word for word in words if word.islower()),
)
def test_commands_at_all_widths(words, small_run, tiny_gguf, capsys, monkeypatch):
    quant = next(small_run.glob("*-Q4_K_M.gguf"))
    places = {"RUN": str(small_run), "QUANT": str(quant), "MODEL": str(tiny_gguf)}
    words = [re.sub("RUN|QUANT|MODEL", lambda match: places[match[0]], word) for word in words]
    shown = {}
    for width in (*WIDTHS, 400):
        monkeypatch.setenv("COLUMNS", str(width))
        assert invoke([*words, "-q"]) == 0
        shown[width] = capsys.readouterr().out.splitlines()
    wide = shown.pop(400)
    heads = wide[next(number for number, line in enumerate(wide) if line.startswith("──")) - 1].split()
    for width, lines in shown.items():
        text = " ".join(lines)
        assert figures_of(text) <= figures_of(" ".join(wide))
        assert all(head in text.split() or head in note(lines) for head in heads)
        # Lines outside tables are for the terminal to wrap.
        assert all(cell_len(line) <= width for line in lines if line not in wide)


@pytest.mark.parametrize("width", [24, 28, 40, 60])
def test_counts_of_types_are_not_broken(width):
    table = Table([Column("kind"), Column("types", fold=True)])
    counts = [f"{count} × {kind}" for count, kind in ((27, "q5_K"), (113, "iq4_xs"), (1, "iq3_s"), (2, "q8_0"))]
    table.add("ffn_down", Text(", ".join(counts), "green"))
    lines = rendered(table, width)[2:]
    assert max(map(cell_len, lines)) <= width
    pieces = [piece for line in lines for piece in line.removeprefix("ffn_down").strip(" ,").split(", ")]
    assert pieces == counts


def test_a_file_against_itself_has_no_negative_zero():
    """The last bits of its sums differ, and no more."""
    nothing, noise = Figure(value=-1e-9, error=0.0), Figure(value=-1.2e-5, error=0.004)
    assert score_tables._ratio(nothing) == "+0.00 ± 0.00 %"
    assert score_tables._gap(noise) == "+0.0000 ± 0.0040"
    assert score_tables._gap(Figure(value=-0.02, error=0.004)) == "-0.0200 ± 0.0040"
    assert FigureColumn("change", "Change", 2, percent=True, scale="signed").cell(-0.0) == "+0.00%"
    for sign in ("", "+"):
        assert _pm(nothing, 4, 100, " %", sign) == f"{sign}0.0000 ± 0.0000 %"

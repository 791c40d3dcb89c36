"""Tokens per second: which tests are run, in which order, what is timed, and rows as llama-bench prints them."""

import contextlib
import csv
import io
import json
import pathlib

import numpy as np
import pytest
from click.testing import CliRunner

from bitladder.cli import invoke
from bitladder.cli.evaluate import bench_command
from bitladder.engine import Context
from bitladder.errors import BitladderError, UsageError
from bitladder.evaluate import SpeedError, bench, speed
from bitladder.evaluate.speed_tests import SpeedOptions, SpeedRow, SpeedTest, choose_tests, numbers
from bitladder.show.speed_tables import columns, fields, render

ONCE, TWICE = SpeedOptions(1, threads=1), SpeedOptions(2, threads=1)
PP10 = SpeedTest(10, 0)


def row(samples=(200_000_000, 250_000_000, 160_000_000), test=PP10, model="a.gguf", **options):
    return SpeedRow(
        model=model,
        model_type="llama 1B Q4_K - Medium",
        size=3 << 29,
        n_params=1_230_000_000,
        test=test,
        options=SpeedOptions(**options),
        threads=2,
        backend="CPU",
        cpu="a processor",
        gpu="",
        test_time="2026-01-01T00:00:00Z",
        samples_ns=samples,
    )


@pytest.fixture
def damaged(tiny_gguf, tmp_path):
    """A model file that ends in the middle of its tensors."""
    path = tmp_path / "damaged.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-1000])
    return path


def test_lists_and_ranges():
    assert numbers("-p", ["1,8", "3-5", "16-64+16", "16-200*2"]) == [1, 8, 3, 4, 5, 16, 32, 48, 64, 16, 32, 64, 128]
    for wrong in ("", "x", "-1", "8-4", "1,", "4-8*1", "0-4*2", "1.5"):
        with pytest.raises(UsageError, match="^-p "):
            numbers("-p", [wrong])


def test_choosing_tests():
    chosen = choose_tests(["64", "128"], ["0"], ["64,16", "0,8"], ["0", "256"])
    names = ["pp64", "pp128", "pp64+tg16", "tg8"]
    assert [test.name for test in chosen] == names + [f"{name} @ d256" for name in names]
    with pytest.raises(UsageError, match="nothing to measure: -p and -n are 0"):
        choose_tests(["0"], ["0"], [])
    with pytest.raises(UsageError, match="-pg '64': give two numbers"):
        choose_tests(["64"], ["0"], ["64"])
    for wrong in ((0, 0), (-1, 5)):
        with pytest.raises(UsageError):
            SpeedTest(*wrong)


def test_mean_and_deviation():
    made = row()
    assert made.samples_ts == pytest.approx([50, 40, 62.5])
    assert made.mean == pytest.approx(np.mean([50, 40, 62.5]))  # of the speeds, not of the times
    assert made.stddev == pytest.approx(np.std([50, 40, 62.5], ddof=1))
    kept = made.bench_row()
    assert kept.tokens_per_second.error == pytest.approx(kept.stddev / 3**0.5)
    assert (kept.test, kept.n_prompt, kept.n_gen, kept.threads, kept.repetitions) == ("pp10", 10, 0, 2, 3)
    assert row(samples=(5,)).stddev == 0


def test_models_take_turns(tiny_gguf, tmp_path, monkeypatch):
    other = tmp_path / "other.gguf"
    other.symlink_to(tiny_gguf)
    order = []

    class Recorded(speed._Run):
        def warm_up(self):
            order.append((self._model.path.name[0], self._test.name, "warm"))

        def sample(self, repetition):
            order.append((self._model.path.name[0], self._test.name, repetition))
            return 1000 + len(order)

    monkeypatch.setattr(speed, "_Run", Recorded)
    rows = bench([tiny_gguf, other], [SpeedTest(8), SpeedTest(0, 2)], TWICE)
    expected = [(model, test, step) for test in ("pp8", "tg2") for step in ("warm", 0, 1) for model in ("t", "o")]
    assert order == expected
    assert [(one.model, one.test.name) for one in rows] == [
        (path.name, test) for path in (tiny_gguf, other) for test in ("pp8", "tg2")
    ]
    assert rows[0].samples_ns == (1003, 1005)
    order.clear()
    bench([tiny_gguf], [SpeedTest(8)], SpeedOptions(1, threads=1, warmup=False))
    assert order == [("t", "pp8", 0)]


def test_the_bar_counts_what_tests_take(tiny_gguf, tmp_path, monkeypatch):
    """A generated token takes as long as ten of a prompt. A bar of repetitions alone was at 75 % after a tenth of the
    time, and so was the time left of a run."""

    class Silent(speed._Run):
        warm_up = sample = lambda self, *_: 1

    class Counting:
        def __init__(self):
            self.total, self.steps = 0.0, []

        @contextlib.contextmanager
        def task(self, label, total):
            del label
            self.total = total
            yield self

        def advance(self, amount=1):
            self.steps.append(amount)

        def note(self, text):
            del text

    monkeypatch.setattr(speed, "_Run", Silent)
    counting = Counting()
    bench([tiny_gguf], [SpeedTest(512), SpeedTest(0, 128), SpeedTest(1024, 1024, 100)], TWICE, progress=counting)
    long = 100 + 1024 + 10 * 1024
    assert counting.steps == [512, 512, 512, 10, 1280, 1280, 1024 + 10, long, long]
    assert sum(counting.steps) == counting.total


def test_models_that_do_not_fit_together_are_measured_one_after_another(tiny_gguf, tmp_path, monkeypatch):
    other = tmp_path / "other.gguf"
    other.symlink_to(tiny_gguf)
    loaded, heard = [], []

    class Watched(speed.Model):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            loaded.append(+1)

        def close(self):
            super().close()
            loaded.append(-1)

    monkeypatch.setattr(speed, "Model", Watched)
    monkeypatch.setattr(speed, "main_memory", lambda: 2 * tiny_gguf.stat().st_size)
    progress = speed.SILENT
    monkeypatch.setattr(type(progress), "warn", lambda self, text: heard.append(text))
    assert len(bench([tiny_gguf, other], [SpeedTest(4)], ONCE, progress)) == 2
    assert loaded == [1, -1, 1, -1]
    assert len(heard) == 1 and "do not fit into memory together" in heard[0]


def test_what_is_decoded_and_what_is_timed(tiny_gguf, monkeypatch):
    calls = []
    decode, wait = Context.advance, Context.synchronize

    def advance(self, tokens):
        calls.append(tuple(tokens))
        decode(self, tokens)

    def synchronize(self):
        calls.append("wait")
        wait(self)

    clock = iter(range(100))

    def now():
        calls.append("clock")
        return next(clock)

    monkeypatch.setattr(Context, "advance", advance)
    monkeypatch.setattr(Context, "synchronize", synchronize)
    monkeypatch.setattr(speed.time, "perf_counter_ns", now)
    options = SpeedOptions(2, threads=1, n_batch=32)
    (found,) = bench([tiny_gguf], [SpeedTest(40, 3, 6)], options)

    def shape(part):
        return [len(call) if isinstance(call, tuple) else call for call in part]

    once = [6, "wait", "clock", 32, 8, "wait", 1, "wait", 1, "wait", 1, "wait", "clock"]
    assert shape(calls) == [32, 8, "wait", 1, "wait", *once, *once]
    assert found.samples_ns == (1, 1)
    first, second = (
        [token for call in calls[start : start + 13] if isinstance(call, tuple) for token in call] for start in (5, 18)
    )
    assert first != second  # other tokens in every repetition …
    calls.clear()
    bench([tiny_gguf], [SpeedTest(40, 3, 6)], options)
    again = [token for call in calls[5:18] if isinstance(call, tuple) for token in call]
    assert again == first  # … but the same for every model


def test_bos_comes_first_where_the_vocabulary_asks_for_it(tiny_gguf):
    with speed.Model(tiny_gguf) as model, speed.ThreadPool(1) as pool:
        run = speed._Run(model, SpeedTest(4), ONCE, 1, pool)
        random = np.random.default_rng(1)
        model.add_bos, model.bos = True, 7
        with_bos = run._tokens(random, 5)
        model.add_bos = False
        without = run._tokens(np.random.default_rng(1), 5)
        assert with_bos[0] == 7 != without[0]
        assert np.array_equal(with_bos[1:], without[1:])
        assert run._tokens(random, 0).size == 0
        run.close()


def test_a_model_that_fails_does_not_take_the_others_along(tiny_gguf, damaged):
    with pytest.raises(SpeedError, match=r"^1 of 2 models could not be measured: damaged\.gguf: ") as caught:
        bench([damaged, tiny_gguf], [SpeedTest(8), SpeedTest(0, 2)], ONCE)
    assert [one.test.name for one in caught.value.rows] == ["pp8", "tg2"]
    assert {one.model for one in caught.value.rows} == {tiny_gguf.name}


def test_a_model_that_fails_half_way_keeps_what_was_measured(tiny_gguf, monkeypatch):
    def sample(self, repetition):
        if self._test.n_gen and repetition == 1:
            raise BitladderError("decoding failed")
        return 1000

    monkeypatch.setattr(speed._Run, "sample", sample)
    with pytest.raises(SpeedError, match="decoding failed") as caught:
        bench([tiny_gguf], [SpeedTest(8), SpeedTest(0, 2), SpeedTest(4)], SpeedOptions(3, threads=1))
    assert [(one.test.name, len(one.samples_ns)) for one in caught.value.rows] == [("pp8", 3)]


def test_nothing_to_do(tiny_gguf):
    for models, tests in (([], [SpeedTest(8)]), ([tiny_gguf], [])):
        with pytest.raises(UsageError, match="nothing to measure"):
            bench(models, tests)
    with pytest.raises(BitladderError, match=r"no such model file: absent\.gguf"):
        bench([tiny_gguf, pathlib.Path("absent.gguf")], [SpeedTest(8)])
    for wrong in ({"repetitions": 0}, {"threads": 0}, {"n_batch": 0}, {"flash_attn": "maybe"}):
        with pytest.raises(UsageError):
            SpeedOptions(**wrong)


def test_tables():
    heads, cells = columns([row(), row(test=SpeedTest(0, 5, 7))])
    assert heads == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert cells[0] == ["llama 1B Q4_K - Medium", "1.50 GiB", "1.23 B", "CPU", "2", "pp10", "50.83 ± 11.27"]
    assert cells[1][5] == "tg5 @ d7"
    heads, _ = columns([row(), row(model="b.gguf", n_ubatch=64, flash_attn="on")])
    assert heads == ["model", "file", "size", "params", "backend", "threads", "n_ubatch", "fa", "test", "t/s"]
    (line,) = csv.DictReader(io.StringIO(render([row()], "csv")))
    (data,) = json.loads(render([row()], "json"))
    assert json.loads(render([row()], "jsonl")) == data
    assert {name: str(value) for name, value in data.items() if name in line} == line
    assert data["samples_ns"] == [200_000_000, 250_000_000, 160_000_000]


def test_command(tiny_gguf, damaged, tmp_path):
    common = ["-m", str(tiny_gguf), "-p", "8", "-n", "2", "-pg", "4,2", "-r", "2", "-t", "1", "-q"]
    out = tmp_path / "rows.csv"
    done = CliRunner().invoke(bench_command, [*common, "--json", "-o", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    data = json.loads(done.stdout)
    assert [(one["n_prompt"], one["n_gen"], len(one["samples_ns"])) for one in data] == [
        (8, 0, 2),
        (0, 2, 2),
        (4, 2, 2),
    ]
    assert [float(line["avg_ts"]) for line in csv.DictReader(out.open())] == [one["avg_ts"] for one in data]
    assert str(tiny_gguf.parent) not in done.stdout
    plain = CliRunner().invoke(bench_command, common, catch_exceptions=False)
    assert "pp4+tg2" in plain.stdout and "±" in plain.stdout


def test_command_with_one_damaged_model(tiny_gguf, damaged, capsys):
    arguments = ["bench", "-m", str(damaged), "-m", str(tiny_gguf), "-p", "8", "-n", "0", "-r", "1", "-t", "1", "-q"]
    assert invoke([*arguments, "--format", "md"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("pp8") == 1
    assert captured.err.count("\n") == 1 and "damaged.gguf" in captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-p", "0", "-n", "0"], 2, "nothing to measure"),
        (["-pg", "512"], 2, "-pg '512'"),
        (["-p", "many"], 2, "-p 'many'"),
        (["-r", "0"], 2, "-r"),
        (["-o", "md"], 2, "--format md"),
        (["-fa", "perhaps"], 2, "-fa"),
        (["-m", "absent.gguf"], 2, "absent.gguf: no such file"),
    ],
)
def test_wrong_options_are_one_line(arguments, code, message, tiny_gguf, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(["bench", "-m", str(tiny_gguf), *arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and not captured.out
    assert not list(tmp_path.iterdir())


def test_rows_of_llama_bench(tiny_gguf, tools):
    options = ["-p", "4-16*2", "-n", "2,3", "-pg", "8,2", "-d", "0,4", "-r", 1, "-t", 1]
    theirs = json.loads(tools.run("llama-bench", "-m", tiny_gguf, *options, "-o", "json"))
    tests = choose_tests(["4-16*2"], ["2,3"], ["8,2"], ["0,4"])
    ours = [fields(one) for one in bench([tiny_gguf], tests, ONCE)]
    same = set(ours[0]) - {"repetitions", "model_filename", "test_time", "build_commit"}
    same = {name for name in same if not name.endswith(("_ns", "_ts"))}
    assert len(same) > 10
    assert [{name: one[name] for name in same} for one in ours] == [
        {name: one[name] for name in same} for one in theirs
    ]
    assert set(ours[0]) - set(theirs[0]) == {"repetitions"}


def test_markdown_of_llama_bench(tiny_gguf, tools):
    def cells(text):
        lines = [line for line in text.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    theirs = cells(tools.run("llama-bench", "-m", tiny_gguf, "-p", 8, "-n", 2, "-r", 1, "-t", 1))
    ours = cells(render(bench([tiny_gguf], [SpeedTest(8), SpeedTest(0, 2)], ONCE), "md"))
    assert ours[0] == theirs[0]
    assert [line[:-1] for line in ours[2:]] == [line[:-1] for line in theirs[2:]]

"""Every option that a step reads, and every algorithm that it uses, is in its key.

The run is real and small. Reading a field of any options is noticed while a step works, and so is the way into each
algorithm; both are compared with what the step says of itself.
"""

import contextlib
import dataclasses

import pytest
from kills import tiny_run
from plain_options import plain_options

from bitladder.convert import convert
from bitladder.engine import Decoding
from bitladder.evaluate import MeasureOptions, read_scores
from bitladder.gguf import GgufFile
from bitladder.keys import recorded, versions_of
from bitladder.ladder import RunOptions
from bitladder.ladder import run as run_ladder
from bitladder.ladder.context import Run
from bitladder.options import Options, table
from bitladder.plan import FeedbackOptions, PlanDecoding, PlanOptions, PriceOptions
from bitladder.recipe import read_recipe
from bitladder.rundir import Layout, naive

# What a step may read though it is in no key.
ELSEWHERE = {
    ("RunOptions", "rungs"): "which steps there are",
    ("RunOptions", "model"): "its content is in the key",
    ("RunOptions", "converter"): "its content is in the key",
    ("RunOptions", "out"): "a path",
    ("RunOptions", "bench"): "whether the speeds are read, which are in the key",
    ("RunOptions", "smooth"): "whether the smoothed model is read, which is in the key",
    ("RunOptions", "tasks"): "the content of the tasks is in the key",
    ("RunOptions", "imatrix_chunks"): "the reading is in the key",
    ("RunOptions", "expert_coverage"): "the reading is in the key",
    ("RunOptions", "bench_repetitions"): "the options of the speed tests are in the key",
}


DECODING_CLASSES = (Decoding, MeasureOptions, PlanDecoding)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Steps of a whole run of a model of one layer, each with the fields and the algorithms that it used."""
    folder = tmp_path_factory.mktemp("keys")
    model = folder / "model.gguf"
    convert(tiny_run(folder, folder / "ladder").model, model)
    steps = {}
    reads: set[tuple[str, str, str]] | None = None
    get = object.__getattribute__

    def noticing(self, name):
        value = get(self, name)
        if reads is not None and not name.startswith("_") and name in {field.name for field in table(type(self))}:
            reads.add((type(self).__name__, name, "" if isinstance(value, Options) else repr(value)))
        return value

    do = Run.do

    def noting(self, step, **more):
        nonlocal reads
        make = step.make

        def made(run):
            nonlocal reads
            reads = set()
            with recorded() as algorithms:
                product = make(run)
            steps[step.name] = (step, reads, algorithms)
            reads = None
            return product

        step.make = made
        do(self, step, **more)

    options = plain_options(
        model=str(model),
        out=folder / "ladder",
        rungs=("Q3_K_S",),
        mode="quality",
        method="feedback",
        smooth=True,
        n_ctx=64,
        chunks=2,
        imatrix_chunks=2,
        moments_chunks=4,
        tune_chunks=2,
        tasks="continuation:pydoc:test",
        task_count=4,
        bench_tests=((8, 0),),
        bench_repetitions=1,
        **QUICK,
    )
    with contextlib.ExitStack() as patches:
        monkeypatch = patches.enter_context(pytest.MonkeyPatch.context())
        monkeypatch.setattr(Options, "__getattribute__", noticing)
        monkeypatch.setattr(Run, "do", noting)
        run_ladder(options)
    return steps


# Little effort in everything: what is tested is what is read.
QUICK = {
    "planning": PlanOptions(
        decoding=PlanDecoding(n_ctx=64),
        prices=PriceOptions(probe_tokens=500, check_pairs=3),
        feedback=FeedbackOptions(chunks=2, rounds=1, random_recipes=1, exchanges=1),
        bpw_below=0.5,
        bpw_above=0.5,
    ),
    "guard_chunks": 1,
    "trial_chunks": 1,
    "tune_guard_chunks": 1,
}


def keyed(step):
    """The fields of options that are in the key of a step, and the values that are in it by field."""
    fields, values = set(), set()

    def add(value):
        if isinstance(value, Options):
            cls = type(value)
            values.update(repr(getattr(value, field.name)) for field in table(cls) if not field.nested)
            whole = cls.deciding is not Options.deciding  # it says by itself what of it decides
            names = value.deciding().keys()
            fields.update(
                (cls.__name__, field.name)
                for field in table(cls)
                if whole or field.name in names or not field.option.decides
            )
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                add(getattr(value, field.name))

    for name, value in step.decides().items():
        fields.add(("RunOptions", name))
        values.add(repr(value))
        for part in value if isinstance(value, (list, tuple)) else (value,):
            add(part)
    if step.verb in ("smooth", "score"):  # whether there are moments, which are in the key; and a word in the scores
        fields.add(("RoundingOptions", "method"))
    return fields, values


# Steps make options of decoding of their own. Such a value is in the key, under whatever name, or it is the default,
# for which the version of the algorithm stands: the run has other values than the defaults.
DECODINGS = {cls.__name__: {field.name: repr(field.default) for field in table(cls)} for cls in DECODING_CLASSES}
# Other values of these: a step derives them from what is in its key, or its algorithm sets them.
DERIVED = {
    **{(verb, "threads"): "half of them for each of two contexts" for verb in ("base", "measure", "naive")},
    ("memory", "n_ctx"): "the algorithm asks for contexts of its own",
    ("bench", "n_ctx"): "as many tokens as the test has",
    ("bench", "threads"): "as many as the machine has",
    ("measure", "n_ctx"): "as many tokens as the questions have",
    ("naive", "n_ctx"): "as many tokens as the questions have",
    ("preset", "n_ctx"): "that of the importance matrix, whose content has it",
    ("smooth", "n_ctx"): "the algorithm decodes chunks of random tokens",
    ("smooth", "n_batch"): "the algorithm decodes chunks of random tokens",
    ("price", "n_ctx"): "the engine decodes a few tokens to find the tensors",
    ("price", "chunks"): "the chunks of all measurements of a plan",
    **{(verb, "n_ctx"): "half of the run's" for verb in ("trial", "quantize")},
    **{(verb, "unscored"): "a share of the chunk" for verb in ("trial", "quantize")},
}


def every_class(cls):
    """All subclasses."""
    return {cls}.union(*map(every_class, cls.__subclasses__()))


def test_every_kind_of_step_was_seen(seen):
    verbs = {step.verb for step, _, _ in seen.values()}
    assert verbs == {
        "convert", "memory", "base", "measure", "imatrix", "moments", "smooth", "trial", "price", "plan", "candidates",
        "preset", "naive", "quantize", "bench", "score",
    }  # fmt: skip


def test_every_option_that_a_step_reads_is_in_its_key(seen):
    nested = {(cls.__name__, field.name) for cls in every_class(Options) for field in table(cls) if field.nested}
    neutral = {(RunOptions.__name__, field.name) for field in table(RunOptions) if not field.option.decides}
    missing = {}
    for name, (step, reads, _) in seen.items():
        fields, values = keyed(step)
        excused = fields | nested | neutral | ELSEWHERE.keys()
        left = sorted(
            (cls, field, value)
            for cls, field, value in reads
            if (cls, field) not in excused
            and not (cls in DECODINGS and (value in values or value == DECODINGS[cls][field]))
            and (step.verb, field) not in DERIVED
        )
        if left:
            missing[name] = left
    assert not missing, str(missing)


def test_every_algorithm_that_a_step_uses_is_in_its_key(seen):
    missing = {
        name: sorted(algorithms - versions_of(*step.algorithms).keys())
        for name, (step, _, algorithms) in seen.items()
        if algorithms - versions_of(*step.algorithms).keys()
    }
    assert missing == {}


def test_a_rung_of_other_types_takes_turns_with_its_preset(seen):
    layout = Layout(seen["bench"][0].options.out)
    rung, preset = (read_scores(layout.scores(label)) for label in ("Q3_K_S", naive("Q3_K_S")))
    own, plain = (read_recipe(layout.recipe(label)).tensors for label in ("Q3_K_S", naive("Q3_K_S")))
    assert preset.role == "naive" and preset.rung == "Q3_K_S" and preset.model == rung.model
    assert own != plain and [row.test for row in rung.bench] == [row.test for row in preset.bench] == ["pp8"]
    assert preset.bench[0].tokens_per_second != rung.bench[0].tokens_per_second
    with GgufFile(layout.preset("Q3_K_S")) as file:
        assert {name: file.tensors[name].type.name for name in plain} == plain

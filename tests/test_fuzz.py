"""The parsers that are fuzzed (`make fuzz`) keep their rule: on files that they take, and on some mutations of each."""

import random
import shutil

import pytest
from fuzz import documents, parsers, rule
from fuzz.mutations import mutate

PARSERS = {parser.name: parser for parser in (*parsers.ALL, *documents.ALL)}
MUTATIONS = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory, report_run):
    folder = tmp_path_factory.mktemp("fuzz")
    documents.checkpoints(folder)
    shutil.copytree(report_run, folder / documents.RUN)
    documents.finish(folder / documents.RUN)
    return rule.Place(folder, folder)


@pytest.mark.parametrize("name", PARSERS)
def test_parsers_take_or_refuse(name, place, tmp_path, monkeypatch):
    monkeypatch.setattr(rule, "BYTES", 1 << 50)  # other tests have used memory in this process
    parser, here = PARSERS[name], rule.Place(place.prepared, tmp_path / "files")
    here.scratch.mkdir()
    seeds = parser.inputs(here)
    assert {parser.split(seed)[0] for seed in seeds} <= set(parser.names)
    for seed in seeds:
        if parser.split(seed)[0] == "words":  # each is a word of one of several grammars
            continue
        assert rule.apply(parser, here, seed), parser.split(seed)
    rng = random.Random(name)
    taken = 0
    for _ in range(MUTATIONS):
        seed = rng.choice(seeds)
        taken += rule.apply(parser, here, seed[:1] + mutate(seed[1:], rng))
    assert taken < MUTATIONS or name in ("card", "text")


def test_the_rule_is_kept_by_nobody_who_breaks_it(tmp_path, monkeypatch):
    def loops(place, name, data):
        while True:
            pass

    def fails(place, name, data):
        raise KeyError(name)

    monkeypatch.setattr(rule, "SECONDS", 0.05)
    place = rule.Place(tmp_path, tmp_path)
    with pytest.raises(rule.RuleError, match="s of the CPU"):
        rule.apply(rule.Parser("x", loops, lambda place: [], ("f",)), place, b"\0")
    with pytest.raises(KeyError) as caught:
        rule.apply(rule.Parser("x", fails, lambda place: [], ("f",)), place, b"\0")
    assert rule.signature(caught.value).startswith("KeyError-test_fuzz-")

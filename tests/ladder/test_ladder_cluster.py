"""A run on several machines: the same bytes as on one, whatever dies."""

import contextlib
import json
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import kills
import pytest
from dask_cluster import KINDS, dask_cluster

from bitladder.errors import BitladderError
from bitladder.ladder import run, spread
from bitladder.machines import Heard, Machines, wait_for
from bitladder.report import write_card, write_report
from bitladder.rundir import load_manifest
from bitladder.text import builtin_text

JOURNAL = "measured.jsonl"


def options_of(folder, name, **more):
    """Two rungs, so that tensors are rounded for both, two calibration texts, so that each is read on a machine, and a
    benchmark; tuning does not repeat byte by byte."""
    options = kills.tiny_run(folder, folder / name / "ladder")
    other = folder / "other.txt"
    other.write_text(builtin_text("calibration")[8_000:14_000])
    options = options.replace(calibration=(*options.calibration, str(other)))
    tasks = {"tasks": f"continuation:{folder / 'text.txt'}", "task_count": 4, "task_ctx": 256}
    return options.replace(tune_chunks=0, rungs=("Q4_K_S", "Q3_K_M"), **tasks, **more)


def made(options, progress=None):
    """The files of a run, but for what differs from one run to the next."""
    run(options, progress=progress or Heard())
    write_card(options.out)
    write_report(options.out)
    files = kills.contents(options.out)
    del files["ladder.json"]  # in the order in which steps were complete
    return {name: whole_lines(data) if name.endswith(JOURNAL) else data for name, data in files.items()}


def whole_lines(journal):
    """Lines of a journal, sorted. A worker that dies can leave half a line, or one that is measured again."""
    lines = set()
    for line in journal.splitlines():
        with contextlib.suppress(ValueError):
            lines.add(json.dumps(json.loads(line), sort_keys=True))
    return "\n".join(sorted(lines)).encode()


def steps(folder):
    """What the manifest says of each step, but for the time."""
    return {name: step.model_dump(exclude={"seconds"}) for name, step in load_manifest(folder).steps.items()}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    return folder, made(options_of(folder, "local"))


def assert_same(local, options, files):
    folder, ours = local
    assert files.keys() == ours.keys()
    assert [name for name in files if files[name] != ours[name]] == []
    assert steps(options.out) == steps(folder / "local" / "ladder")


@pytest.mark.parametrize(
    ("kinds", "share"),
    [
        ({"price-render", "quantize-make"}, False),
        ({"moments-collect_text", "round-render"}, True),
        pytest.param(KINDS, False, marks=pytest.mark.slow),
        pytest.param(KINDS, True, marks=pytest.mark.slow),
    ],
    ids=["some", "some-share", "all", "all-share"],
)
def test_workers_that_die_cost_time_only(local, kinds, share, request):
    pytest.importorskip("distributed")
    name = request.node.callspec.id
    with dask_cluster(local[0] / name / "dask", kinds) as (scheduler, to_come):
        objects = local[0] / name / "objects"
        options = options_of(local[0], name, cluster=scheduler, share=f"file://{objects}" if share else None)
        files = made(options)
        assert not share or list(objects.iterdir()) == []  # they were there, and are gone
        assert list(to_come.iterdir()) == []
        assert_same(local, options, files)
        assert "cluster" not in (options.out / "README.md").read_text()
        assert run(options.replace(cluster=None, share=None)).made == ()


@contextlib.contextmanager
def one_thread(monkeypatch, share=None):
    """Any executor will do: here one thread, which is given what a worker gets."""
    with ThreadPoolExecutor(1) as pool:

        @contextlib.contextmanager
        def machines(*_):
            yield Machines(pool, 1, share=share)

        monkeypatch.setattr(sys.modules["bitladder.ladder.run"], "machines_of", machines)
        yield pool
        pool.submit(spread.close_kept).result()


@pytest.fixture
def threads(monkeypatch):
    with one_thread(monkeypatch) as pool:
        yield pool


def test_the_order_of_steps_changes_no_byte(local, threads):
    options = options_of(local[0], "threads")
    assert_same(local, options, made(options))
    assert run(options).made == ()


def test_machines_without_a_common_disk_exchange_files(local, monkeypatch, tmp_path):
    """What works elsewhere has neither the run directory nor the model, and writes the same bytes."""
    folder, there = local[0], set[pathlib.Path]()
    opened = spread._open

    def watched(state):
        there.add(state.folder)
        assert not state.folder.is_relative_to(folder)
        return opened(state)

    monkeypatch.setattr(spread, "_open", watched)
    options = options_of(folder, "exchange")
    with one_thread(monkeypatch, f"file://{tmp_path}/objects"):
        assert_same(local, options, made(options))
        assert run(options).made == ()
        (place,) = there
        full = options.out / load_manifest(options.out).steps["convert"].outputs[0].path
        again = options.replace(model=str(full), out=folder / "of-gguf" / "ladder", mode="naive", method="stock")
        run(again)  # a MODEL that is a GGUF goes along
        assert next(place.rglob(f".inputs/*/{full.name}")).is_file()
    assert not place.exists()


def test_an_error_of_a_step_ends_the_run_and_what_is_complete_stays(local, threads, monkeypatch):
    def fail(*_, **__):
        raise BitladderError("the disk is full")

    options = options_of(local[0], "error").replace(mode="naive", method="stock")
    with monkeypatch.context() as patch:
        patch.setattr("bitladder.calibrate.collect_imatrix", fail)
        with pytest.raises(BitladderError, match="the disk is full"):
            run(options)
    assert "convert" not in run(options).made


def test_a_file_that_is_not_seen_is_named(tmp_path):
    with pytest.raises(BitladderError, match=r"moments\.gguf was written by another machine"):
        wait_for([tmp_path / "moments.gguf"], seconds=0)

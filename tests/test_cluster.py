"""A Dask cluster: what is refused before any work, and in what words."""

import sys

import pytest

from bitladder import cluster
from bitladder.cli import invoke
from bitladder.errors import BitladderError, UsageError
from bitladder.machines import Heard


def test_without_dask_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError, match=r"pip install 'bitladder\[cluster\]'"), cluster.connected("x", tmp_path):
        pass


@pytest.fixture(scope="module")
def workers():
    """The address of two workers that are threads of this process."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0, protocol="tcp://"
    ) as local:
        yield local


def failing(*_):
    raise BitladderError("no such tensor")


def test_tasks_run_and_errors_stay_themselves(workers, tmp_path):
    heard = Heard()
    with cluster.connected(workers.scheduler_address, tmp_path, progress=heard) as machines:
        assert machines.count == 2 and machines.threads >= 1
        futures = [machines.executor.submit(divmod, 17, number) for number in (2, 3)]
        assert [future.result() for future in futures] == [(8, 1), (5, 2)]
        with pytest.raises(BitladderError, match="no such tensor"):
            machines.executor.submit(failing).result()
        assert list(tmp_path.glob(".cluster-*.tmp"))
    assert not heard.remarks and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"llama_cpp_commit": "other"}}, "has llama_cpp_commit other and not"),
        ({"versions": {"torch": "none"}}, "has torch none and not"),
        ({"lacks": [0]}, "does not see the run directory"),
        ({"lacks": [1]}, r"does not see .*model\.gguf"),
    ],
)
def test_a_worker_that_is_not_fit_is_refused(workers, tmp_path, monkeypatch, change, words):
    describe = cluster.describe

    def other(sees):
        said = describe(sees)
        said["versions"] |= change.get("versions", {})
        return said | {"lacks": [sees[place] for place in change.get("lacks", ()) if sees]}

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(cluster, "describe", other)
    (tmp_path / "model.gguf").touch()
    files = [tmp_path / "model.gguf"]
    versions = cluster.installed() | {"torch": "2.0"}
    monkeypatch.setattr(cluster, "installed", lambda: dict(versions))
    with pytest.raises(BitladderError, match=words), cluster.connected(workers.scheduler_address, tmp_path, files):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_worker_that_joins_later_is_checked_too(workers, tmp_path, monkeypatch):
    with cluster.connected(workers.scheduler_address, tmp_path) as machines:
        next(tmp_path.glob(".cluster-*.tmp")).unlink()
        with pytest.raises(BitladderError, match="does not see the run directory"):
            machines.executor.submit(divmod, 1, 1).result()


def test_another_processor_is_warned_of(workers, tmp_path, monkeypatch):
    said = iter(("theirs", "theirs", "ours"))
    monkeypatch.setattr(cluster, "processors", lambda _: next(said))
    heard = Heard()
    with cluster.connected(workers.scheduler_address, tmp_path, progress=heard):
        pass
    assert heard.remarks[0][0] == "warn" and "another processor" in heard.remarks[0][1]


def test_workers_of_several_tasks_at_once_are_refused(tmp_path):
    distributed = pytest.importorskip("distributed")
    several = {"processes": False, "n_workers": 1, "threads_per_worker": 2, "dashboard_address": ":0"}
    with (
        distributed.LocalCluster(**several, protocol="tcp://") as local,
        pytest.raises(BitladderError, match="--nthreads 1"),
        cluster.connected(local.scheduler_address, tmp_path),
    ):
        pass


def test_where_nobody_answers_one_line_says_so(tiny_gguf, tmp_path, monkeypatch, capsys):
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "CONNECT", 0.5)
    out = tmp_path / "ladder"
    for address, words in (
        ("tcp://127.0.0.1:1", "no Dask scheduler answers there"),
        ("nonsense:", "--cluster nonsense:"),
    ):
        command = ["run", str(tiny_gguf), "--out", str(out), "--cluster", address, "--no-bench", "-q"]
        assert invoke(command) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
        assert not out.exists()


def test_tasks_that_kill_every_worker_are_told_in_one_line():
    scheduler = pytest.importorskip("distributed.scheduler")

    class Last:
        address = "tcp://10.0.0.2:1"

    error = cluster._in_words(scheduler.KilledWorker("task", Last(), 3))
    assert isinstance(error, BitladderError) and "tcp://10.0.0.2:1" in str(error)


def test_workers_must_reach_the_objects(workers, tmp_path, monkeypatch):
    objects = tmp_path / "objects"
    with cluster.connected(workers.scheduler_address, tmp_path, share=f"file://{objects}/") as machines:
        (own,) = objects.iterdir()
        assert machines.share == f"file://{own}" and (own / "mark").is_file()
        assert machines.executor.submit(divmod, 17, 2).result() == (8, 1)
    assert list(objects.iterdir()) == []
    monkeypatch.setattr(cluster, "reaches", lambda _: False)
    with (
        pytest.raises(BitladderError, match=rf"the worker .* does not reach --share file://{objects}; give it access"),
        cluster.connected(workers.scheduler_address, tmp_path, share=f"file://{objects}"),
    ):
        pass
    assert list(objects.iterdir()) == []

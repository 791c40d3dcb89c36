"""Keys: what decides a result changes them, and nothing else does."""

import dataclasses
import pathlib

import pytest

from bitladder.engine import Decoding
from bitladder.keys import Algorithm, key_of, recorded, settled, versions_of

INNER = Algorithm("inner", ("first", "another kernel"))
OUTER = Algorithm("outer", ("first",), uses=(INNER,))


@dataclasses.dataclass(frozen=True)
class Plain:
    passes: int = 6
    damping: float = 0.1


def test_the_version_is_the_number_of_changes_and_reaches_what_uses_it():
    assert OUTER.versions() == {"inner": 2, "outer": 1}
    assert versions_of(OUTER, Algorithm("alone", ("first",))) == {"alone": 1, "inner": 2, "outer": 1}


def test_recorded_notices_each_entry_even_if_it_fails():
    @INNER.entry
    def work(value: int) -> float:
        return 1 / value

    with recorded() as names:
        assert work(2) == 0.5
        with pytest.raises(ZeroDivisionError):
            work(0)
    assert names == {"inner"}
    work(1)
    assert names == {"inner"}


def test_every_field_of_a_dataclass_is_in_the_key():
    keys = {key_of({"rounding": one}) for one in (Plain(), Plain(passes=2), Plain(damping=0.2))}
    assert len(keys) == 3


def test_threads_and_batches_decide_nothing_but_the_context_does():
    same = Decoding(threads=1, n_batch=64, n_ubatch=32, gpu_layers=0)
    assert key_of({"decoding": Decoding()}) == key_of({"decoding": same})
    assert key_of({"decoding": Decoding()}) != key_of({"decoding": Decoding(n_ctx=256)})
    assert key_of({"decoding": Decoding()}) != key_of({"decoding": Decoding(gpu_layers=1)})


@pytest.mark.parametrize("value", [pathlib.Path("model.gguf"), object(), b"bytes"])
def test_what_is_no_value_is_refused(value):
    with pytest.raises(TypeError):
        settled({"x": [value]})


def test_nan_is_no_key():
    with pytest.raises(ValueError, match="JSON"):
        key_of({"x": float("nan")})


def test_keys_do_not_depend_on_order():
    assert key_of({"a": 1, "b": {"c": 2, "d": 3}}) == key_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": "1"})

"""A recipe swapped into a loaded model against the file that holds it, and one measure for all who measure recipes."""

import pytest
from calibrated import calibrate

from bitladder import evaluate as ev
from bitladder.calibrate import read_imatrix
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile
from bitladder.keys import key_of
from bitladder.plan import FeedbackOptions, PlanDecoding, PlanInputs, Planner, PlanOptions
from bitladder.quantize import QuantizeOptions, quantize
from bitladder.refine import GuardOptions
from bitladder.refine.round.guard import Guard
from bitladder.text import builtin_text, load_text
from bitladder.trial import Renderer, SwappedModel, kept_base, measurement_inputs

SETTINGS = ev.MeasureOptions(n_ctx=64, chunks=3, threads=1)


@pytest.fixture(scope="module")
def prepared(tiny_gguf, tmp_path_factory):
    """An imatrix of the embedded model, and a text."""
    folder = calibrate(tiny_gguf, tmp_path_factory.mktemp("swapped"))
    (folder / "text.txt").write_text(builtin_text("test")[:30_000])
    return folder


def importance(folder, file):
    entries = read_imatrix(folder / "imatrix.gguf").entries
    return {name: entry.means() for name, entry in entries.items() if name in file.tensors}


def test_a_swapped_recipe_is_the_quantized_file(tiny_gguf, prepared, tmp_path):
    text = load_text(str(prepared / "text.txt"))
    with (
        ev.load_or_compute_base(tiny_gguf, text, SETTINGS, path=tmp_path / "base") as base,
        GgufFile(tiny_gguf) as file,
    ):
        renderer = Renderer(file, importance(prepared, file), threads=1)
        with SwappedModel(base, renderer, SETTINGS) as swapped:
            names = [name for name, tensor in file.tensors.items() if tensor.type.name == "f16"]
            before = swapped.kld({}).mean()
            for types in (dict.fromkeys(names, "q4_0"), {"token_embd.weight": "q4_0"}):
                measured = swapped.kld(types).mean()
                whole = {name: types.get(name, tensor.type.name) for name, tensor in file.tensors.items()}
                out = tmp_path / "q.gguf"
                imatrix = prepared / "imatrix.gguf"
                quantize(tiny_gguf, out, QuantizeOptions("Q8_0", types=whole), imatrix=imatrix, threads=1)
                real = ev.measure(out, text, SETTINGS, base=base).scores.kld.value
                assert measured == pytest.approx(real, rel=0.03)
                assert measured > 20 * before
            assert swapped.kld({}).mean() == before


def test_a_decision_scores_all_tokens_but_the_first(tiny_gguf, prepared, tmp_path):
    """The tokens of the second half have the same KLD, whether those before them are scored too."""
    text, quant = load_text(str(prepared / "text.txt")), tmp_path / "q.gguf"
    quantize(tiny_gguf, quant, "Q4_0", threads=1)
    klds = {}
    for settings in (SETTINGS, ev.decision_settings(SETTINGS.replace(n_ctx=128), 3)):
        with kept_base(tmp_path, tiny_gguf, text, settings) as base:
            klds[settings.unscored] = ev.measure(quant, text, settings, base=base).arrays["kld"].reshape(3, -1)
            with pytest.raises(BitladderError, match="other tokens of a chunk scored"):
                ev.measure(quant, text, settings.replace(unscored=1), base=base)
    assert klds[None].shape == (3, 31) and klds[4].shape == (3, 59)
    assert (klds[4][:, -31:] == klds[None]).all()


def test_the_guard_measures_what_the_planner_measures(tiny_gguf, prepared, tmp_path):
    """The same recipe on the same text has the same KLD, whoever measures it."""
    decoding, text = PlanDecoding(n_ctx=128, threads=1), load_text(str(prepared / "text.txt"))
    options = PlanOptions(decoding=decoding, feedback=FeedbackOptions(chunks=4))
    inputs = PlanInputs(tiny_gguf, prepared / "imatrix.gguf", [text], work=tmp_path)
    with Planner(inputs, options) as planner:
        preset = planner.subject.preset("Q5_K_S")
        planned = planner.measured_kld(preset)
        types = {name: preset.types[name] for name in planner.subject.tensors}
        renderer, tried = planner.renderer, GuardOptions(guard_chunks=4, negligible=0)  # to the last chunk
        with Guard(planner.base, renderer, renderer, types, tried, decoding) as guard:
            report = guard.run([])
    assert report.before.value == pytest.approx(planned, rel=1e-12)
    assert report.tokens == 4 * 119


def test_the_context_of_measurements_changes_with_each_input(tiny_gguf, prepared, tmp_path):
    text = load_text(str(prepared / "text.txt"))
    with (
        ev.load_or_compute_base(tiny_gguf, text, SETTINGS, path=tmp_path / "base") as base,
        GgufFile(tiny_gguf) as file,
    ):
        weighted, plain = Renderer(file, importance(prepared, file), threads=1), Renderer(file, {}, threads=1)
        keys = [key_of(measurement_inputs(base, renderer, SETTINGS)) for renderer in (weighted, plain)]
        # Inputs of swapped weights are rounded on the CPU only.
        keys.append(key_of(measurement_inputs(base, weighted, SETTINGS.replace(gpu_layers=99))))
        keys.append(key_of(measurement_inputs(base, weighted, SETTINGS.replace(n_ctx=128))))
        assert len(set(keys)) == 4
        assert key_of(measurement_inputs(base, weighted, SETTINGS.replace(threads=2, chunks=1))) == keys[0]


@pytest.mark.parametrize("place", [-1, -5000, 3000])
def test_a_damaged_base_is_made_again(tiny_gguf, prepared, tmp_path, place):
    """One byte of a prediction would change every figure that is compared with it."""
    text = load_text(str(prepared / "text.txt"))
    kept_base(tmp_path, tiny_gguf, text, SETTINGS).close()
    (path,) = tmp_path.glob("*.base")
    whole, made = path.read_bytes(), path.stat().st_ino
    kept_base(tmp_path, tiny_gguf, text, SETTINGS).close()
    assert path.stat().st_ino == made
    damaged = bytearray(whole)
    damaged[place] ^= 1
    path.write_bytes(damaged)
    kept_base(tmp_path, tiny_gguf, text, SETTINGS).close()
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]

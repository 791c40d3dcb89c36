"""The options of llama-quantize, one command line for both: types, bytes and metadata."""

import os
import pathlib

import pytest
from llama_cpp_tools import Tools
from quantize_reference import make_imatrix, make_model, reference, same_metadata, same_tensors

from bitladder.cli import invoke
from bitladder.engine import all_types, storable
from bitladder.gguf import GgufFile
from bitladder.recipe import recipe_sha256

TWQ = r"attn_v=q6_k"
LWQ = r"\.([0-9]|1[01257]|31)\.attn_k=q4_k"


@pytest.fixture(scope="module")
def maybe_tools():
    folder = os.environ.get("LLAMA_CPP_TOOLS")
    return Tools(pathlib.Path(folder)) if folder else None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with model.gguf, tied.gguf, imatrix.gguf, q8.gguf (a quantized model) and types.txt."""
    folder = tmp_path_factory.mktemp("options")
    make_imatrix(make_model(folder, num_hidden_layers=5), folder / "imatrix.gguf")
    (folder / "t").mkdir()
    make_model(folder / "t", tie_word_embeddings=True).rename(folder / "tied.gguf")
    assert invoke(["quantize", "-q", "-m", f"{folder}/model.gguf", "-o", f"{folder}/q8.gguf", "Q8_0"]) == 0
    (folder / "types.txt").write_text(r"blk\.0\.attn_k=q8_0 ffn_up=iq4_nl" + "\n\nattn=Q5_K\n")
    return folder


# (source, options): {} stands for the folder.
SETS = [
    ("model", f"--tensor-type {TWQ} Q3_K_S"),
    ("model", f"--tensor-type {LWQ} Q3_K_S"),
    ("model", f"--tensor-type {TWQ} --tensor-type {LWQ} --imatrix {{}}/imatrix.gguf IQ3_S"),
    ("model", "--tensor-type attn_v=q8_0 Q4_K_M"),
    ("model", r"--tensor-type blk\.1\.attn_v=q4_0 Q4_K_M"),  # shifts the counting of the others
    ("model", "--tensor-type attn=q5_k --tensor-type attn_v=q8_0 Q4_K_S"),
    ("model", "--tensor-type attn_v=q8_0 --tensor-type attn=q5_k Q4_K_S"),
    ("model", "--tensor-type ATTN_V=Q8_0 Q4_0"),
    ("model", r"--tensor-type ^blk\.[0-1]\.ffn_(up|gate)\.weight$=iq4_xs Q6_K"),
    ("model", r"--tensor-type ffn_(?!down)=q6_k Q2_K"),
    ("model", "--tensor-type .*=q4_1 Q8_0"),
    ("model", "--tensor-type token_embd=q4_k --tensor-type ^output\\.weight=q5_k Q8_0"),
    ("model", "--tensor-type ffn_down=q4_k Q8_0"),
    ("model", "--tensor-type ffn_down=iq3_s --tensor-type attn_output=f16 --imatrix {}/imatrix.gguf Q4_K_M"),
    ("model", "--tensor-type attn_q=bf16 --tensor-type attn_k=f32 Q5_0"),
    ("model", "--tensor-type attn_v=q8_0 F16"),
    ("model", "--tensor-type-file {}/types.txt Q4_K_M"),
    ("model", "--tensor-type attn_v=q4_0 --tensor-type-file {}/types.txt --tensor-type ffn_gate=q2_k Q4_K_M"),
    ("model", "--output-tensor-type q8_0 Q4_K_M"),
    ("model", "--output-tensor-type f16 --token-embedding-type q3_k Q4_K_M"),
    ("model", "--token-embedding-type iq4_xs --tensor-type token_embd=q8_0 Q5_K_M"),
    ("model", "--token-embedding-type q8_0 BF16"),
    ("tied", "--output-tensor-type q4_0 Q4_K_M"),
    ("tied", "--output-tensor-type q4_0 --token-embedding-type q5_0 Q4_K_M"),
    ("tied", "--output-tensor-type q4_0 --pure Q4_K_M"),
    ("tied", "--leave-output-tensor Q4_K_M"),
    ("model", "--pure Q4_K_M"),
    ("model", "--pure --tensor-type attn_v=q8_0 Q3_K_M"),
    ("model", "--pure --imatrix {}/imatrix.gguf IQ3_XXS"),
    ("model", "--leave-output-tensor Q4_K_M"),
    ("model", "--leave-output-tensor --output-tensor-type q4_0 --tensor-type output=q4_0 Q5_1"),
    ("q8", "--allow-requantize Q4_K_M"),
    ("q8", "--allow-requantize --leave-output-tensor --tensor-type attn_v=f16 Q3_K_M"),
    ("q8", "COPY"),
    ("model", "COPY"),
    ("model", "--imatrix {}/imatrix.gguf --include-weights attn_v --include-weights ffn Q3_K_M"),
    ("model", "--imatrix {}/imatrix.gguf --exclude-weights attn_v --exclude-weights blk.1. Q3_K_M"),
    ("model", "--imatrix {}/imatrix.gguf --exclude-weights weight Q4_0"),
    ("model", "--imatrix {}/imatrix.gguf --exclude-weights ffn_down --tensor-type attn_q=iq2_xxs IQ3_M"),
    ("model", "--imatrix {}/imatrix.gguf Q2_K_S"),
    ("model", "--override-kv llama.context_length=int:99 --override-kv general.name=str:x Q4_K_M"),
    ("model", "--override-kv a.b=int:-5 --override-kv a.c=bool:true --override-kv a.d=float:1e-3 Q8_0"),
    ("model", "--override-kv llama.attention.head_count_kv=int:4 Q2_K"),  # changes what the preset does
    ("model", "--prune-layers 1 Q4_K_M"),
    ("model", r"--prune-layers 0,2 --imatrix {}/imatrix.gguf --tensor-type blk\.1\.attn_q=q8_0 IQ3_S"),
    ("model", "12"),
    ("model", "--imatrix {}/imatrix.gguf Q4_0"),
    ("model", "MXFP4_MOE"),
    ("model", "--pure Q2_0"),
    ("model", "TQ1_0"),
]


@pytest.mark.parametrize(("source", "options"), SETS, ids=[" ".join(one) for one in SETS])
def test_equals_llama_quantize(source, options, place, maybe_tools, tmp_path):
    arguments = [part.replace("{}", str(place)) for part in options.split()]
    model, ours = place / f"{source}.gguf", tmp_path / "ours.gguf"
    assert invoke(["quantize", "-q", "-m", str(model), "-o", str(ours), *arguments]) == 0
    theirs = reference(maybe_tools, model, tmp_path / "theirs.gguf", arguments)
    same_tensors(ours, theirs)
    if maybe_tools is not None:
        same_metadata(ours, theirs)
    with GgufFile(ours) as file:
        types = {name: tensor.type.name for name, tensor in file.tensors.items()}
        assert file.get("bitladder.recipe.sha256") == recipe_sha256(types)


TYPES = [kind.name for kind in all_types().values() if storable(kind)]
TABLES = {"iq1_m", "iq1_s", "iq2_s", "iq2_xs"}  # the library prepares these for many seconds


@pytest.mark.parametrize(
    "kinds",
    [[kind for kind in TYPES if kind not in TABLES], pytest.param(sorted(TABLES), marks=pytest.mark.slow)],
    ids=["most", "the rest"],
)
def test_every_type_of_the_library(kinds, place, maybe_tools, tmp_path):
    """Ternary types, MXFP4, NVFP4 and whatever else there is, each for a tensor of its own."""
    options = ["--imatrix", str(place / "imatrix.gguf"), "Q6_K"]
    with GgufFile(place / "model.gguf") as file:
        names = [n for n, t in file.tensors.items() if n.startswith("blk.") and t.shape[0] == 256 and len(t.shape) == 2]
    wanted = dict(zip(names, kinds, strict=False))
    assert len(wanted) == len(kinds)
    for name, kind in wanted.items():
        options[:0] = ["--tensor-type", f"{name}={kind}"]
    ours = tmp_path / "ours.gguf"
    assert invoke(["quantize", "-q", "-m", str(place / "model.gguf"), "-o", str(ours), *options]) == 0
    same_tensors(ours, reference(maybe_tools, place / "model.gguf", tmp_path / "theirs.gguf", options))
    with GgufFile(ours) as file:
        assert {name: file.tensors[name].type.name for name in wanted} == wanted


def test_the_list_of_types_is_the_library_s():
    assert {"tq1_0", "mxfp4", "nvfp4", "q1_0", "q2_0", "f32", "bf16", "iq4_nl"} <= set(TYPES)
    assert not {"q8_1", "q8_K", "i32", "f64"} & set(TYPES)


def test_splits_are_kept_and_made(place, maybe_tools, tmp_path):
    """Kept as llama-quantize keeps them, with the types it then gives; a limit of size is ours alone."""
    arguments = ["-q", "-m", str(place / "model.gguf"), "-o", str(tmp_path / "split.gguf"), "--split-max-size", "1M"]
    assert invoke(["quantize", *arguments, "COPY"]) == 0
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) > 2
    assert invoke(["quantize", "-q", "-m", str(place / "model.gguf"), "-o", str(tmp_path / "one.gguf"), "COPY"]) == 0
    same_tensors(parts[0], tmp_path / "one.gguf")
    (tmp_path / "kept").mkdir()
    arguments = ["-q", "-m", str(parts[0]), "-o", str(tmp_path / "kept" / "ours.gguf"), "--keep-split"]
    assert invoke(["quantize", *arguments, "--tensor-type", r"1\.attn_v=q8_0", "Q4_K_M"]) == 0
    ours = sorted((tmp_path / "kept").iterdir())
    assert [path.name for path in ours] == [path.name.replace("split", "ours") for path in parts]
    if maybe_tools is not None:
        theirs = tmp_path / "kept" / "theirs.gguf"
        options = ["--keep-split", "--tensor-type", r"1\.attn_v=q8_0"]
        maybe_tools.run("llama-quantize", *options, parts[0], theirs, "Q4_K_M")
        same_tensors(ours[0], theirs.with_name(ours[0].name.replace("ours", "theirs")))
        same_metadata(ours[0], theirs.with_name(ours[0].name.replace("ours", "theirs")))

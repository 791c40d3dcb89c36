"""What the model card says of a run, and what it leaves out."""

import json
import re

import gguf
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from report_card_run import MEASURED, RUNGS, TEXT, change_manifest, change_step, rewrite, table
from transformers.utils.chat_template_utils import render_jinja_template

from bitladder.cli import invoke
from bitladder.errors import BitladderError
from bitladder.evaluate import Figure
from bitladder.evaluate.tasks.load import task_meanings, task_names
from bitladder.report import gigabytes, percent, render_card, with_error, write_card
from bitladder.report.publish import record_repository
from bitladder.report.tables import METRICS, signed
from bitladder.rundir import load_manifest

EVIL = (
    "Evil\x1b[2J\x07\u202e|`<script>alert(1)</script> <img src=x onerror=y> [click](http://phish.test) "
    "![i](http://track.test/p) https://bare.test www.bare.test &lt;b&gt; ``` \n# heading\n---\n"
)


def test_the_front_matter_is_what_the_hub_reads(run_dir):
    data = ModelCard(render_card(run_dir)).data
    assert (data.base_model, data.base_model_relation) == ("org/X", "quantized")
    assert (data.license, data.language) == ("apache-2.0", ["en", "no"])
    assert (data.pipeline_tag, data.library_name) == ("text-generation", "gguf")
    assert data.tags == ["gguf", "quantized", "imatrix", "llama.cpp", "bitladder"]
    assert data.quantized_by == "someone"


def test_what_is_not_known_is_left_out(run_dir):
    change_manifest(run_dir, model_id=None, quantized_by=None)
    card = render_card(run_dir)
    data = ModelCard(card).data.to_dict()
    assert not {"base_model", "base_model_relation", "quantized_by"} & data.keys()
    assert "None" not in card


def test_one_row_per_rung_from_small_to_large(run_dir):
    card = render_card(run_dir)
    by_size = ["IQ3_S", "Q4_K_M", "IQ4_NL", "Q8_0"]
    full = ["F16 (full precision)", "[X-F16.gguf](X-F16.gguf)", "16.00", "16.00"]
    assert [row[0] for row in table(card, "Files")] == [*by_size, full[0]]
    assert table(card, "Files")[-1] == full
    assert table(card, "Files")[0] == ["IQ3_S", "[X-IQ3_S.gguf](X-IQ3_S.gguf)", "3.66", "3.70"]
    rows = table(card, "Quality")
    assert rows[0] == ["F16 (full precision)", "9.123 ± 0.065", "–", "–", "–", "–"]
    assert [row[0] for row in rows[1:]] == by_size


def test_the_numbers_are_those_of_the_scores(run_dir):
    rows = {row[0]: row for row in table(render_card(run_dir), "Quality")}
    assert rows["Q4_K_M"][1:5] == ["9.200 ± 0.066", "99.51 %", "0.02345 ± 0.00034", "3.420 ± 0.068 %"]
    for rung, (_, _, kld, rms, _) in MEASURED.items():
        value, error = map(float, rows[rung][3].strip("*").split(" ± "))
        assert value == pytest.approx(kld[0], abs=kld[1] / 10)
        assert error == pytest.approx(kld[1], rel=0.05)
        assert float(rows[rung][4].strip("*").split()[0]) == pytest.approx(rms * 100, rel=0.01)


def test_how_it_was_made_is_said(run_dir):
    card = render_card(run_dir)
    for said in ("wiki.test.raw", "ee" * 32, "40 chunks", "10,200 tokens", "abc1234", "c.txt", "cc" * 32, "dd" * 32,
                 "8,000,000,000 weights",
                 "bitladder run org/X --out out", "WikiText", "llama.cpp", "X \\| Instruct"):  # fmt: skip
        assert said in card
    assert "Python Software Foundation" not in card
    assert str(run_dir) not in card


def test_a_measurement_on_the_calibration_text_says_so(run_dir):
    assert "computed on the same text" not in render_card(run_dir)
    for path in (run_dir / "recipes").iterdir():
        path.write_text(path.read_text().replace("cc" * 32, "ee" * 32))
    assert "computed on the same text" in render_card(run_dir)


def test_the_card_is_written_only_if_it_differs(run_dir):
    assert write_card(run_dir)
    before = (run_dir / "README.md").stat().st_mtime_ns
    assert not write_card(run_dir)
    assert (run_dir / "README.md").stat().st_mtime_ns == before


def test_an_unfinished_run_has_no_card(run_dir, tmp_path_factory):
    change_manifest(run_dir, complete=False)
    with pytest.raises(BitladderError, match="not finished. Continue it with: bitladder run org/X --out out"):
        render_card(run_dir)
    with pytest.raises(BitladderError, match="not a run directory"):
        render_card(tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": None}, r"Q8_0\.json: sha256: "),
        ({"perplexity": 1.0}, r"Q8_0\.json: perplexity: "),
        ({"smoothed": "yes"}, r"Q8_0\.json: smoothed: "),
        ({"mode": "best"}, r"Q8_0\.json: mode: "),
        ({"kld": {"value": "0.1", "error": 0.1}}, r"Q8_0\.json: kld\."),
        ({"text": None}, r"Q8_0\.json: text: "),
    ],
)
def test_a_wrong_score_is_one_line_that_names_file_and_key(run_dir, change, message):
    rewrite(run_dir, "Q8_0", **change)
    with pytest.raises(BitladderError, match=message) as caught:
        render_card(run_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3456, 0.0723, "12.346 ± 0.072"),
        (9.1234, 0.0996, "9.12 ± 0.10"),
        (1234.5, 67.8, "1234 ± 68"),
        (1234.5, 678.9, "1234 ± 679"),
        (0.02345, 0.00034, "0.02345 ± 0.00034"),
        (0.00012345, 0.0000012, "0.0001234 ± 0.0000012"),
        (0.0000012345, 0.000000012, "1.234e-06 ± 1.2e-08"),
        (0.0, 0.0012, "0.0000 ± 0.0012"),
        (0.5, 0.0, "0.5"),
    ],
)
def test_an_error_has_two_digits_and_the_value_ends_where_it_does(value, error, text):
    assert with_error(Figure(value=value, error=error)) == text


def test_shares_and_sizes():
    shares = {0.9531: "95.31 %", 0.99876: "99.88 %", 0.999987: "99.9987 %", 1.0: "100.00 %"}
    assert {share: percent(share) for share in shares} == shares
    sizes = {4_920_000_000: "4.92", 49_200_000_000: "49.20", 12_300_000: "0.0123"}
    assert {size: gigabytes(size) for size in sizes} == sizes


def test_the_data_sets_of_the_calibration_are_named(run_dir):
    assert "datasets" not in ModelCard(render_card(run_dir)).data.to_dict()
    change_manifest(run_dir, datasets=["org/texts"])
    path = run_dir / "ladder.json"
    path.write_text(path.read_text().replace('"c.txt"', '"wiki.train.raw"'))
    assert ModelCard(render_card(run_dir)).data.datasets == ["org/texts", "Salesforce/wikitext"]


def test_every_metric_is_explained_in_two_sentences():
    meanings = task_meanings()
    assert set(meanings) == set(task_names())
    for text in (*METRICS.values(), *meanings.values()):
        assert len(re.findall(r"\.(?:\s|$)", text)) == 2, text


def test_names_of_strangers_are_nothing_but_text(run_dir):
    """Judged by a renderer of Markdown: no HTML, no link, no heading but the card's own."""
    plain = render_card(run_dir)
    path = run_dir / "ladder.json"
    value = json.loads(path.read_text())
    value["run"]["command"] = f"bitladder run '{EVIL}' --out x"
    facts = value["steps"]["convert"]["facts"]
    facts["general"] |= {"name": EVIL, "license": EVIL, "license.name": EVIL}
    facts["architecture"] = EVIL
    for text in value["steps"]["imatrix"]["facts"].get("texts", []):
        text["name"] = EVIL
    path.write_text(json.dumps(value))
    base = json.loads((run_dir / "scores" / "base.json").read_text())
    base["text"]["name"] = EVIL
    (run_dir / "scores" / "base.json").write_text(json.dumps(base))
    card = render_card(run_dir)
    assert not [letter for letter in card if (ord(letter) < 32 and letter != "\n") or 127 <= ord(letter) < 160]
    assert "\u202e" not in card
    front, body = card.split("\n---\n", 1)
    assert yaml.safe_load(front.removeprefix("---\n"))["license"]

    def seen(text):
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        flat = [inner for token in tokens for inner in [token, *(token.children or [])]]
        return (
            [token.content for token in flat if token.type in ("html_block", "html_inline", "image")],
            {token.attrs["href"] for token in flat if token.type == "link_open"},
            sum(token.type == "heading_open" for token in tokens),
            sum(token.type == "fence" for token in tokens),
            [token.content for token in flat if token.type == "text"],
        )

    html, links, headings, fences, texts = seen(body)
    _, links_before, headings_before, fences_before, _ = seen(plain.split("\n---\n", 1)[1])
    assert not html and links <= links_before and (headings, fences) == (headings_before, fences_before)
    # Programs that link bare addresses find none.
    assert not any(address in text for text in texts for address in ("https://bare", "http://phish", "www.bare"))


def test_a_card_that_gets_a_repository_is_written_and_says_so(run_dir, capsys):
    write_card(run_dir)
    assert invoke(["card", str(run_dir), "--repo", "me/X-GGUF"]) == 0
    assert f"{run_dir / 'README.md'}: written" in capsys.readouterr().out
    assert invoke(["card", str(run_dir), "--repo", "me/X-GGUF"]) == 0
    assert f"{run_dir / 'README.md'}: unchanged" in capsys.readouterr().out


def test_a_repository_is_named_for_the_ladder_before_and_for_the_run_that_extends_it(run_dir):
    manifest = load_manifest(run_dir)
    manifest.before, manifest.run = manifest.run, manifest.run.model_copy(update={"rungs": (*RUNGS, "Q6_K")})
    manifest.save(run_dir)
    record_repository(run_dir, "me/X-GGUF")
    manifest = load_manifest(run_dir)
    assert (manifest.run.repo, manifest.before.repo) == ("me/X-GGUF", "me/X-GGUF")
    assert (manifest.run.rungs, manifest.before.rungs) == ((*RUNGS, "Q6_K"), RUNGS)


def test_no_zero_is_negative():
    tiny = Figure(value=-0.0000102, error=0.0021)
    assert with_error(tiny) == "0.0000 ± 0.0021" and with_error(Figure(value=-0.0, error=0.0)) == "0"
    assert signed(tiny) == "+0.0000 ± 0.0021"
    assert signed(Figure(value=-0.0123, error=0.0004)) == "−0.01230 ± 0.00040"


def test_commands_and_links_name_the_repository_if_it_is_known(run_dir):
    card = render_card(run_dir)
    assert "llama-server -m X-Q4_K_M.gguf\nllama-cli -m X-Q4_K_M.gguf\n" in card and "-hf" not in card
    change_manifest(run_dir, repo="me/X-GGUF")
    card = render_card(run_dir)
    for line in (
        "llama-server -hf me/X-GGUF:Q4_K_M", "llama-cli -hf me/X-GGUF:Q4_K_M", "ollama run hf.co/me/X-GGUF:Q4_K_M",
        "lms get https://huggingface.co/me/X-GGUF@q4_k_m", "hf download me/X-GGUF X-Q4_K_M.gguf --local-dir .",
    ):  # fmt: skip
        assert f"\n{line}\n" in card
    for rung in RUNGS:
        assert f"(https://huggingface.co/me/X-GGUF/resolve/main/X-{rung}.gguf?download=true)" in card


def test_built_in_texts_are_warned_of(run_dir):
    assert "built-in" not in render_card(run_dir)
    change_step(run_dir, "imatrix", texts=[{"name": "pydoc:calibration", "sha256": "cc"}])
    assert "These quants were calibrated on Python's language reference, which" in " ".join(
        render_card(run_dir).split()
    )
    for name in ("base", *RUNGS):
        rewrite(run_dir, name, text=TEXT | {"name": "pydoc:test"})
    card = " ".join(render_card(run_dir).replace("\n> ", "\n").split())
    assert "These quants were calibrated on, and measured with, Python's language reference" in card
    assert "Compare the figures with each other only" in card


def test_the_prompt_format_is_that_of_the_template_in_the_file(run_dir):
    template = (
        "{{ bos_token }}{% for m in messages %}```{{ m.role }}\n{{ m.content }}```\n{% endfor %}"
        "{% if add_generation_prompt %}```assistant{% endif %}"
    )
    writer = gguf.GGUFWriter(run_dir / "X-F16.gguf", "llama")
    writer.add_chat_template(template)
    writer.add_token_list(["<unk>", "<s>"])
    writer.add_bos_token_id(1)
    writer.add_tensor("a", np.zeros(32, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    messages = [{"role": "system", "content": "{system_prompt}"}, {"role": "user", "content": "{prompt}"}]
    [expected], _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )
    fences = [token.content for token in MarkdownIt().parse(render_card(run_dir)) if token.type == "fence"]
    assert expected + "\n" in fences

"""Conversations: read, rendered in a model's own template as transformers renders them, and scored by answers."""

import json
import shutil

import numpy as np
import pytest
import tiny_models
from plain_options import plain_options

from bitladder import evaluate as ev
from bitladder.cli import invoke
from bitladder.convert import convert
from bitladder.engine import Model
from bitladder.errors import BitladderError, UsageError
from bitladder.ladder import run
from bitladder.rundir import load_manifest
from bitladder.text import chat, load_text, text_chunks

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "bos, blanks and a break": (
        "{{ bos_token }}\n{%- for m in messages %}\n    {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
        "[{{ m.role | upper }}] {{ m.content | trim }}{{ eos_token }}\n{%- if loop.index > 3 %}{% break %}{% endif %}"
        "\n{%- endfor %}\n"
    ),
    "tools and macros": (
        "{% macro say(m) %}{{ m.content }}{% if m.tags is defined %}{{ m.tags | tojson }}{% endif %}|{% endmacro %}"
        "{% set ns = namespace(n=0) %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ say(m) }}{% endfor %}"
    ),
}
TALKS = [
    [{"role": "user", "content": " Which colour is the fox? 🙂"}, {"role": "assistant", "content": "a"}],
    [
        {"role": "system", "content": "Answer in Spanish."},
        {"role": "user", "content": "What is comido by the murciélago?"},
        {"role": "assistant", "content": "cardillo y kiwi\n\n  y más"},
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "user assistant <extra> Zwölf Boxkämpfer"},
    ],
] * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model for chat with its tokenizer, a quant, and conversations."""
    made = tmp_path_factory.mktemp("chat")
    tokenizer = tiny_models.train_byte_level(made / "model", vocab_size=370)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(made / "model")
    tiny_models.llama(made / "model", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    convert(made / "model", made / "model.gguf", outtype="f16")
    (made / "chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    return made


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")


@pytest.mark.parametrize("name", TEMPLATES)
def test_renderings_are_those_of_transformers(name, tokenizer, folder):
    records = [{"messages": talk, "tools": [{"name": "é<>&'"}]} for talk in TALKS[:2]]
    records[0]["messages"] = [{**message, "tags": ["ä", 1]} for message in TALKS[0]]
    path = folder / "some.jsonl"
    conversations = chat.read_conversations(path, "\n".join(map(json.dumps, records)).encode())
    template = chat.ChatTemplate("x.gguf", TEMPLATES[name], "<s>", "<|im_end|>", (), adds_bos=False)
    rendered, _ = template.render(conversations)
    assert rendered == [
        tokenizer.apply_chat_template(
            record["messages"], tools=record["tools"], chat_template=TEMPLATES[name], tokenize=False
        )
        for record in records
    ]


def test_tokens_and_answers_are_those_of_transformers(tokenizer, folder):
    text = load_text(str(folder / "chat.jsonl"), folder / "model.gguf", assistant_only=True)
    expected = [
        tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True) for talk in TALKS
    ]
    ids = np.concatenate([talk["input_ids"] for talk in expected])
    mask = np.concatenate([talk["assistant_masks"] for talk in expected]).astype(bool)
    with Model(folder / "model.gguf", vocab_only=True) as model:
        chunks = text_chunks(model, text, 64)
    # The vocabulary asks for BOS, which the tokenizer puts before the text.
    size = chunks.tokens.size - 1
    assert chunks.tokens[0, 0] == tokenizer.bos_token_id
    assert np.array_equal(chunks.tokens.ravel()[1:], ids[:size])
    assert np.array_equal(chunks.answers.ravel()[1:], mask[:size]) and 0.1 < mask.mean() < 0.6


def test_only_answers_are_scored(folder, tmp_path, capsys):
    model, base = folder / "model.gguf", tmp_path / "model.base"
    settings = ev.MeasureOptions(n_ctx=64, threads=1)
    only = load_text(str(folder / "chat.jsonl"), model, assistant_only=True)
    every = load_text(str(folder / "chat.jsonl"), model)
    assert every.sha256 == only.sha256 and every.answers is None
    ev.make_base(model, every, base, settings)
    with ev.open_base(base, only, settings, ev.identify(model)) as opened:
        whole, answers = (ev.measure(model, text, settings, base=opened) for text in (every, only))
        of_base = ev.measure_base(opened, only, settings)
    with Model(model, vocab_only=True) as vocabulary:
        flags = text_chunks(vocabulary, only, 64).counted
    for name in ("nll", "nll_base", "kld", "delta_p", "same_top"):
        assert np.array_equal(answers.arrays[name], whole.arrays[name][flags.ravel()])
    assert answers.scores.tokens_scored == flags.sum() < whole.scores.tokens_scored
    assert np.log(answers.scores.ppl.value) == pytest.approx(whole.arrays["nll"][flags.ravel()].mean())
    assert of_base.scores.ppl.value == pytest.approx(answers.scores.ppl_base.value)
    pair = ev.compare_pair(answers, answers)
    assert (pair.per, pair.kld.value, pair.kld.error) == ("chunk", 0, 0)
    words = ["eval", "-m", model, "-f", folder / "chat.jsonl", "-c", 64, "-t", 1, "--assistant-only", "--json", "-q"]
    assert invoke([str(word) for word in [*words, "--no-cache"]]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_scored"] == flags.sum()


def test_a_run_renders_when_the_model_is_converted(folder, tmp_path):
    files = (str(folder / "chat.jsonl"),)
    options = plain_options(
        model=str(folder / "model"), out=tmp_path / "run", rungs=("Q8_0",), texts=files, calibration=files,
        n_ctx=64, assistant_only=True, bench=False, threads=1,
    )  # fmt: skip
    result = run(options)
    text = load_text(files[0], folder / "model.gguf", assistant_only=True)
    for scores in result.scores:
        assert scores["text"] == {"name": "chat.jsonl", "sha256": text.sha256}
    settings = ev.MeasureOptions(n_ctx=64, threads=1, chunks=options.chunks)
    expected = ev.measure(tmp_path / "run" / result.scores[0]["model"], text, settings)
    assert result.scores[0]["tokens_scored"] == expected.scores.tokens_scored
    assert result.scores[0]["ppl"]["value"] == pytest.approx(expected.scores.ppl.value, rel=1e-4)
    assert load_manifest(options.out).steps["imatrix"].facts["texts"][0]["sha256"] == text.sha256
    assert not run(options).made
    again = run(options.replace(assistant_only=False)).made
    assert {"measure base", "measure Q8_0"} <= set(again) and "base" not in again and "imatrix" not in again


HOSTILE = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "does not end",
    "{{ 9 ** (9 ** 9) }}": "does not end",
    "{{ 'x' * 99999999999 }}": "too much memory",
    "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}": "more than",
    "{{ ().__class__.__bases__[0].__subclasses__() }}": "SecurityError",
    "{{ cycler.__init__.__globals__.os.popen('touch pwned') }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself",
    "{{ raise_exception('roles must\nalternate') }}": "roles must alternate",
    "{% if %}": "TemplateSyntaxError",
    "{% include '/etc/passwd' %}": "fails",
}


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_template_ends_in_one_line(source, folder, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1)
    template = chat.ChatTemplate("x.gguf", source, "<s>", "</s>", (), adds_bos=False)
    conversations = (chat.Conversation("chat.jsonl, line 3", tuple(TALKS[0])),)
    with pytest.raises(BitladderError, match=r"the chat template of x\.gguf fails") as caught:
        template.render(conversations)
    assert HOSTILE[source] in str(caught.value) and "\n" not in str(caught.value)


SAME = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
FORMS = {
    "a.jsonl": [json.dumps({"messages": SAME}), json.dumps({"conversations": SHARED}), json.dumps(SAME)],
    "b.json": [json.dumps(SAME)],
    "c.json": [json.dumps([{"conversation": SHARED}, {"messages": SAME}])],
    "d.json": [json.dumps([SAME, SHARED])],
    "e.json": [json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, SAME[1]]})],
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_conversations(name, tmp_path):
    found = chat.read_conversations(tmp_path / name, "\n".join(FORMS[name]).encode())
    assert {conversation.messages for conversation in map(_plain, found)} == {tuple(map(tuple, map(dict.items, SAME)))}


def _plain(conversation):
    return chat.Conversation("", tuple(tuple(message.items()) for message in conversation.messages))


def test_parquet_and_a_system_message(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"system": "Be brief.", "conversations": SHARED, "id": 1}, {"system": "", "conversations": SHARED, "id": 2}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    text = load_text(str(tmp_path / "x.parquet"))
    first, second = text.conversations
    assert [message["role"] for message in first.messages] == ["system", "user", "assistant"]
    assert second.messages == SAME


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "prose"}', "x.jsonl, line 1: no conversation"),
        ("x.jsonl", "prose", "x.jsonl, line 1: not JSON"),
        ("x.json", '[{"messages": [{"role": "user"}, 3]}]', "message 2: not an object"),
        ("x.json", '[{"messages": [{"role": 1, "content": "a"}]}]', "must be text"),
        ("x.jsonl", "[]", "no conversation"),
    ],
)
def test_what_is_no_conversation(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(BitladderError, match=message):
        load_text(str(tmp_path / name))


def test_what_cannot_be_rendered_or_scored(folder, tmp_path, capsys):
    import gguf

    plain = tmp_path / "plain.gguf"
    reader = gguf.GGUFReader(folder / "model.gguf")
    assert "tokenizer.chat_template" in reader.fields
    data = (folder / "model.gguf").read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_templatx")
    plain.write_bytes(data)
    assert invoke(["imatrix", "-m", str(plain), "-f", str(folder / "chat.jsonl"), "-o", str(tmp_path / "i.gguf")]) == 1
    assert "plain.gguf has no chat template" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--assistant-only needs conversations"):
        load_text("pydoc:test", plain, assistant_only=True)
    shouting = chat.ChatTemplate(
        "x.gguf", "{% for m in messages %}{{ m.content | upper }}{% endfor %}", "", "", (), adds_bos=False
    )
    with pytest.raises(BitladderError, match="line 3: the chat template of x.gguf changes an answer"):
        chat.rendered_text((chat.Conversation("line 3", tuple(TALKS[0])),), shouting, answers=True)
    assert not (tmp_path / "i.gguf").exists()


def test_a_checkpoint_without_a_template_is_refused_before_work(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    for path in (tmp_path / "model").glob("chat_template*"):
        path.unlink()
    config = tmp_path / "model" / "tokenizer_config.json"
    values = json.loads(config.read_text())
    values.pop("chat_template", None)
    config.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"chat\.jsonl holds conversations, but model has no chat template"):
        run(plain_options(model=str(tmp_path / "model"), out=tmp_path / "run", texts=(str(folder / "chat.jsonl"),)))
    assert not (tmp_path / "run").exists()

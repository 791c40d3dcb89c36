"""Options that do nothing beside others are named in a warning; those that work, and defaults, are not."""

import pytest

from bitladder.cli import invoke


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        (
            "quantize Q4_0 -m MODEL -o OUT --moments TEXT --guard TEXT",
            "--moments and --guard have no effect with --rounding stock, which is the default",
        ),
        ("quantize Q4_0 -m MODEL --dry-run --effort high", "--effort has no effect with --rounding stock"),
        ("imatrix -o OUT --in-file TEXT --chunks 3 -m MODEL", "--model and --chunks have no effect without -f"),
        ("calibrate -o OUT --in-file TEXT --no-spread", "--no-spread has no effect without -f"),
        ("calibrate -m MODEL -f gone -o OUT --process-output", "--process-output has no effect without --imatrix"),
        ("plan -m MODEL -f gone --like Q4_K_M --context 9", "--context has no effect without --vram"),
        ("plan -m MODEL -f gone --suggest-prune --like Q4_K_M", "--like has no effect with --suggest-prune"),
        ("plan -m MODEL -f gone --like Q4_0 --sensitivity TEXT --prices forward", "--prices has no effect with --sens"),
        ("smooth -m MODEL --imatrix TEXT -o OUT --trial-chunks 2", "--trial-chunks has no effect without -f"),
        ("tune TEXT -m MODEL -f gone -o OUT --guard none --tune-guard-chunks 2", "--tune-guard-chunks has no effect"),
        ("eval -m TEXT --base-file OUT", "--base-file has no effect without --base"),
        ("eval -m TEXT --tasks arc:gone --chunks 3", "--chunks has no effect without -f or --base"),
        ("eval -m TEXT --task-count 3", "--task-count has no effect without --tasks"),
        ("run gone.gguf --out OUT --task-count 3", "--task-count has no effect without --tasks"),
        ("tasks --task-count 3", "--task-count has no effect without NAME"),
        ("show FOLDER --no-plot --width 80", "--width has no effect with --no-plot"),
        ("doctor MODEL --outtype f16", "which is a GGUF already"),
        ("convert gone -o OUT --native --trust-remote-code", "--trust-remote-code has no effect with --native"),
        (
            "estimate gone.gguf --rounding stock --tune-chunks 4 --moments-chunks 2 --guard-chunks 2",
            "--moments-chunks, --guard-chunks and --tune-chunks have no effect with --rounding stock",
        ),
        ("run gone.gguf --out OUT --no-smooth --no-order", "--no-order has no effect without --smooth"),
        ("run gone.gguf --out OUT --share s3://bucket/x", "--share has no effect without --cluster"),
        ("run gone.gguf --out OUT --tune-rate 0.001", "--tune-rate has no effect without --tune-chunks"),
    ],
)
def test_an_option_that_does_nothing_is_named(line, warning, tiny_gguf, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no model")
    names = {"MODEL": str(tiny_gguf), "TEXT": "text.txt", "OUT": "out", "FOLDER": "."}
    invoke([names.get(word, word) for word in line.split()])
    error = capsys.readouterr().err
    assert warning in error and error.count("no effect") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    "line",
    [
        "quantize Q4_0 -m MODEL --dry-run -t 1",
        "quantize Q4_0 -m MODEL -o OUT --rounding best --guard none",
        "run gone.gguf --out OUT --rounding stock --tune-chunks 0",
        "run gone.gguf --out OUT --tune-chunks 4 --tune-rate 0.001 --moments-chunks 2 --trial-chunks 2",
        "eval -m gone.gguf --noise-chunks 0",
        "imatrix -o OUT --in-file gone.gguf -c 64",
        "plan -m MODEL -f gone --suggest-prune --chunks 2 -c 64 -t 1",
    ],
)
def test_an_option_that_works_is_not(line, tiny_gguf, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke([{"MODEL": str(tiny_gguf), "OUT": "out"}.get(word, word) for word in line.split()])
    assert "no effect" not in capsys.readouterr().err

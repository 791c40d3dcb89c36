"""What is said of progress where nobody watches."""

import time

from bitladder.show import Output


def test_a_log_gets_a_line_a_minute(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Output().progress.task("tune", 8) as bar:
        for step in range(4):
            now[0] += 40
            bar.note(f"KLD {step}")
            bar.advance()
    assert capsys.readouterr().err.splitlines() == [
        "tune",
        "tune: 25% after 1 min, KLD 1",
        "tune: 50% after 3 min, KLD 3",
    ]


def test_quiet_says_nothing_of_progress(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Output(quiet=True).progress.task("tune", 2) as bar:
        now[0] = 100
        bar.advance()
    assert capsys.readouterr().err == ""

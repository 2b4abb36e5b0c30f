"""Lines about what a process is doing while it prints nothing else."""

import time

import pytest

from cogds.process import logs
from cogds.process.activity import activity, reporter
from cogds.process.progress import progress_bar


@pytest.fixture
def started():
    """Reports after 0.2 s of silence instead of 10."""
    reporter.start(quiet_s=0.2, tick_s=0.02)
    yield
    reporter.stop()


@pytest.mark.usefixtures("started")
def test_silence_is_broken_by_what_is_being_done(capsys):
    parts = iter(range(1, 100))
    with activity("outside"), activity(lambda: f"part {next(parts)}"):
        time.sleep(0.55)
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in printed] == ["part 1", "part 2"]
    assert all(line.endswith(" s so far") for line in printed)


@pytest.mark.usefixtures("started")
def test_other_output_restarts_the_clock(capsys):
    with activity("working"):
        for _ in range(8):
            time.sleep(0.08)
            logs.logging.getLogger("cogds").info("line")
    assert "working" not in capsys.readouterr().out


@pytest.mark.usefixtures("started")
def test_a_bar_that_moves_is_output_and_one_that_hangs_is_not(capsys, monkeypatch):
    monkeypatch.setattr("cogds.process.progress.is_terminal", lambda _: True)
    with activity("working"), progress_bar("reading", "file", 8, leave=False) as bar:
        for _ in range(8):
            time.sleep(0.08)
            bar.mininterval = 0
            bar.update()
        assert "working" not in capsys.readouterr().out
        time.sleep(0.4)
        assert "working" in capsys.readouterr().out


@pytest.mark.usefixtures("started")
def test_nothing_is_printed_without_an_activity(capsys):
    time.sleep(0.3)
    assert capsys.readouterr().out == ""

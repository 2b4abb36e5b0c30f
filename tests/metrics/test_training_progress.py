import io
import sys

import pytest

from cogds.metrics.training_progress import TrainingProgress, scalars_text
from cogds.process.logs import RESULT, configure_logging

SCALARS = {"train/loss": 0.12345, "perf/step_s": 2.0, "perf/tokens_per_s": 45104.4}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_scalars_are_shown_with_their_units():
    assert scalars_text(SCALARS) == "loss 0.1235  2.00 s/step  45,104 tokens/s"
    assert scalars_text({"train/loss": 1.0, "perf/step_s": 0.0316}) == "loss 1.0000  32 ms/step"


def show_steps(*, use_bar):
    progress = TrainingProgress(2, 10, use_bar=use_bar)
    for step in range(3, 11):
        progress.update(step, SCALARS)
    progress.close()


@pytest.mark.parametrize("stream, use_bar", [(io.StringIO, True), (Terminal, False)])
def test_a_log_has_at_least_the_first_and_the_last_step(monkeypatch, capsys, stream, use_bar):
    monkeypatch.setattr(sys, "stderr", stream())
    show_steps(use_bar=use_bar)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/10" for step in range(3, 11)]
    assert all("loss 0.1235" in line and line.endswith(" left") for line in lines)
    assert sys.stderr.getvalue() == ""


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    show_steps(use_bar=True)
    drawn = sys.stderr.getvalue().split("\r")
    assert "3/10 |" in drawn[1]
    assert "10/10 |" in drawn[-1]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_shows_nothing(monkeypatch, capsys, stream):
    configure_logging(0, RESULT)
    monkeypatch.setattr(sys, "stderr", stream())
    show_steps(use_bar=True)
    assert capsys.readouterr().out == sys.stderr.getvalue() == ""


def test_a_log_of_many_fast_steps_has_a_line_for_every_20th_of_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = TrainingProgress(0, 400, use_bar=True)
    for step in range(1, 401):
        progress.update(step, SCALARS)
    progress.close()
    steps = [int(line.split()[1].partition("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert steps == [1, *range(20, 401, 20)]


def test_the_time_left_does_not_count_what_came_before_the_first_step(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    now = [1000.0]
    progress = TrainingProgress(0, 10, use_bar=True)
    progress._bar._time = lambda: now[0]
    progress._bar.start_t = progress._bar.last_print_t = now[0]
    now[0] += 3600  # of evaluation
    progress.update(1, SCALARS)
    progress.close()
    assert capsys.readouterr().out.splitlines()[0].endswith("  00:18 left")

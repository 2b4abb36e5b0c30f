import io
import logging
import sys

import pytest

from cogds.process import progress
from cogds.process.logs import RESULT, configure_logging
from cogds.process.progress import is_terminal, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "stream, job, expected", [(Terminal(), None, True), (Terminal(), "7", False), (io.StringIO(), None, False)]
)
def test_under_slurm_every_stream_is_a_log(monkeypatch, stream, job, expected):
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    else:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert is_terminal(stream) is expected


def test_on_a_terminal_the_bar_moves(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    for _ in progress_bar("reading", "file", 3, items=range(3)):
        pass
    drawn = sys.stderr.getvalue().split("\r")
    assert "0/3" in drawn[1]
    assert "3/3" in drawn[-1]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("interval_s, lines", [(0.0, ["1/2", "2/2"]), (60.0, [])])
def test_a_log_gets_a_line_each_interval(monkeypatch, capsys, interval_s, lines):
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", interval_s)
    bar = progress_bar("reading", "file", 2)
    bar.delay = interval_s
    bar.update()
    bar.update()
    bar.close()
    printed = capsys.readouterr()
    counts = dict.fromkeys(line.split()[1].rstrip(",") for line in printed.out.splitlines())  # the last may come twice
    assert [count for count in counts if count != "0/2"] == lines
    assert printed.err == ""


@pytest.mark.parametrize("rank, level, show", [(0, RESULT, True), (1, logging.INFO, True), (0, logging.INFO, False)])
@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_there_is_no_bar_with_quiet_and_on_other_ranks(monkeypatch, capsys, rank, level, show, stream):
    configure_logging(rank, level)
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(progress_bar("reading", "file", 3, show, items=range(3))) == [0, 1, 2]
    assert sys.stderr.getvalue() == capsys.readouterr().out == ""

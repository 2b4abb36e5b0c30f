import io
import sys

import pytest

from cogds.process.progress import progress


@pytest.mark.parametrize("is_terminal, num_lines", [(True, 4), (False, 2)])
def test_a_log_is_not_flooded(monkeypatch, is_terminal, num_lines):
    """A line at the beginning and one at the end; on a terminal each step is drawn."""
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    bar = progress("reading", "file", 1000)
    for _ in range(1000):
        bar.mininterval = 0 if is_terminal else bar.mininterval
        bar.update()
    bar.close()
    drawn = [line for line in stream.getvalue().split("\r") if line.strip()]
    assert len(drawn) >= num_lines if is_terminal else len(drawn) == num_lines
    assert "1000/1000" in drawn[-1]


def test_nothing_is_said_where_it_is_not_shown(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress("reading", "file", 3, shown=False, items=range(3))) == [0, 1, 2]
    assert stream.getvalue() == ""

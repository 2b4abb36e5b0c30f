import io
import sys

import pytest

from cogds.metrics import progress_line as module
from cogds.metrics.progress_line import BAR, LINES, QUIET, Ticker, progress_text

SCALARS = {"train/loss": 0.12345, "perf/step_s": 2.0, "perf/tokens_per_s": 45104.4}


def test_the_line():
    assert progress_text(SCALARS, 3723.4) == "loss 0.1235  2.00 s/step  45,104 tokens/s  1:02:03 left"
    assert progress_text({"train/loss": 1.0, "perf/step_s": 0.0316}, 0) == "loss 1.0000  32 ms/step"


@pytest.mark.parametrize("style", [QUIET, LINES, BAR])
def test_what_is_said(monkeypatch, capsys, style):
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream)
    ticker = Ticker(2, 10, style)
    for step in range(3, 11):
        now[0] += 6
        ticker.step(step, SCALARS)
    ticker.close()
    lines = capsys.readouterr().out.splitlines()
    if style == LINES:
        assert [line.split()[1] for line in lines] == ["4/10", "6/10", "8/10", "10/10"]
        assert lines[0] == "step 4/10  loss 0.1235  2.00 s/step  45,104 tokens/s  0:00:12 left"
        assert "left" not in lines[-1]
    else:
        assert lines == []
    drawn = stream.getvalue()
    assert ("10/10 |" in drawn and "loss 0.1235" in drawn) if style == BAR else drawn == ""

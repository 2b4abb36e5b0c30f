"""Motion and duplicates in the report."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from cogds.report.analysis import make_report
from cogds.report.quality import HARDLY_MOVES, ClipQuality, clip_quality
from cogds.report.text import short_report
from tests.report.test_report import GOOD, ROWS, no_frame, no_plots, page_of, printed, setup, table

__all__ = ["no_plots"]  # a fixture


def clips(**columns):
    """A table of clips of which the fourth is not trained."""
    whole = table(ROWS[:5])
    for name, values in columns.items():
        index = whole.table.column_names.index(name)
        column = pa.array(values, whole.table.schema.field(name).type)
        whole = dataclasses.replace(whole, table=whole.table.set_column(index, name, column))
    return dataclasses.replace(whole, buckets=np.array([0, 1, 1, -1, 1]))


def quality(**columns):
    made = clips(**columns)
    return clip_quality(made.table, pa.array(made.buckets >= 0))


def test_only_trained_clips_with_a_score_count():
    assert quality() == ClipQuality()
    still = HARDLY_MOVES / 2
    assert quality(motion=[0.1, still, None, 0.0, 0.3]) == ClipQuality(
        num_scored=3, median_motion=pytest.approx(0.1), num_still=1
    )


def test_copies_have_the_same_bytes_and_range():
    digest = [b"a" * 16, b"a" * 16, b"b" * 16, b"a" * 16, b"a" * 16]
    assert quality(digest=digest).num_copies == 2
    assert quality(digest=digest, start_s=[0.0, 1.0, 0.0, 0.0, 2.0]).num_copies == 0
    assert quality(digest=[None] * 5).num_copies == 0
    assert quality(duplicate_of=["a.mp4", None, None, "a.mp4", "a.mp4"]).num_near_duplicates == 2


@pytest.mark.usefixtures("no_plots")
def test_the_report_shows_and_warns():
    digest = [b"a" * 16, b"a" * 16, b"b" * 16, b"c" * 16, b"d" * 16]
    bad = clips(motion=[0.1, 0.001, None, 0.0, 0.3], digest=digest, duplicate_of=[None, None, "a.mp4", None, None])
    report = make_report(bad, setup(), GOOD)
    for text in (printed(report), page_of(report, bad, no_frame)):
        assert "Median motion 0.100" in text
        assert "1 near duplicate" in text
    for text in (printed(report), page_of(report, bad, no_frame), short_report(report)):
        assert "1 clip hardly moving" in text
        assert "1 clip with the same content" in text
    plain = make_report(table(ROWS), setup(), GOOD)
    for text in (printed(plain), page_of(plain, table(ROWS), no_frame)):
        assert "otion" not in text
        assert "same content" not in text

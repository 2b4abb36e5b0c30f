"""Cuts in drawn pictures."""

import numpy as np
import pytest

from cogds.prepare.cuts import CutDetector
from tests.prepare.films import scene


def cuts(frames, threshold=3.0):
    detector = CutDetector(threshold)
    for picture in frames:
        detector.add(picture)
    return detector.cuts()


@pytest.mark.parametrize("lengths", [[20, 20], [1, 20], [2, 20], [3, 20], [20, 1], [20, 2], [20, 3], [12, 3, 12]])
def test_hard_cuts_are_found_at_any_place(lengths):
    frames = np.concatenate([scene(number, length) for number, length in enumerate(lengths)])
    assert cuts(frames) == np.cumsum(lengths)[:-1].tolist()


@pytest.mark.parametrize("speed", [0.0, 1.0, 4.0, 12.0])
def test_movement_is_no_cut(speed):
    assert [cut for cut in cuts(scene(1, 40, speed)) if 2 < cut < 38] == []


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
def test_very_short_videos_have_no_cuts(num_frames):
    assert cuts(scene(1, num_frames)) == []


def test_a_lower_threshold_finds_more():
    before, after = scene(1, 20, 3.0), scene(2, 20, 3.0)
    frames = np.concatenate([before, (0.75 * before[-1] + 0.25 * after).astype(np.uint8)])
    assert cuts(frames, 30.0) == []
    assert cuts(frames, 1.5) == [20]

"""Grids of videos have even sides, as H.264 requires, and every frame in its place."""

import numpy as np

from cogds.videos.image_grid import GAP, LABEL_HEIGHT, add_label, evenly_spaced_frames, make_grid, shrink


def video(num_frames, height, width, level):
    return np.full((num_frames, height, width, 3), level, np.uint8)


def test_a_grid_has_every_video_in_its_place_and_is_as_long_as_the_longest():
    moving = np.stack([video(1, 16, 32, 10 * n)[0] for n in range(3)])
    grid = make_grid([[moving, video(1, 8, 16, 200)], [video(2, 16, 16, 90)]])
    assert grid.shape == (3, 16 + GAP + 16, 32 + GAP + 16, 3)
    assert [frame[0, 0, 0] for frame in grid] == [0, 10, 20]
    assert (grid[:, :8, 32 + GAP :] == 200).all()
    assert (grid[:, 16 + GAP :, :16] == 90).all()


def test_both_sides_are_even():
    assert make_grid([[video(1, 15, 17, 0)]]).shape == (1, 16, 18, 3)
    assert shrink(video(2, 90, 160, 0), 33).shape == (2, 18, 32, 3)
    assert shrink(video(2, 90, 160, 0), 160).shape == (2, 90, 160, 3)


def test_frames_are_spread_from_the_first_to_the_last():
    clip = np.arange(17, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 1, 3), np.uint8)
    assert [int(frame[0, 0, 0]) for frame in evenly_spaced_frames(clip, 5)] == [0, 4, 8, 12, 16]
    assert len(evenly_spaced_frames(clip, 100)) == 17


def test_a_label_is_above_every_frame():
    labeled = add_label(video(3, 20, 120, 0), "step 500")
    assert labeled.shape == (3, 20 + LABEL_HEIGHT, 120, 3)
    assert (labeled[:, LABEL_HEIGHT:] == 0).all()
    assert labeled[0, :LABEL_HEIGHT].max() > 200
    assert (labeled[0, :LABEL_HEIGHT] == labeled[2, :LABEL_HEIGHT]).all()

"""Videos beside one another: sizes that H.264 takes, every frame where it belongs."""

import numpy as np

from cogds.videos.image_grid import BAR_HEIGHT, GAP, evenly, grid, labelled, shrunk


def video(num_frames, height, width, level):
    return np.full((num_frames, height, width, 3), level, np.uint8)


def test_a_grid_holds_every_video_at_its_place_and_waits_for_the_longest():
    moving = np.stack([video(1, 16, 32, 10 * n)[0] for n in range(3)])
    made = grid([[moving, video(1, 8, 16, 200)], [video(2, 16, 16, 90)]])
    assert made.shape == (3, 16 + GAP + 16, 32 + GAP + 16, 3)
    assert [frame[0, 0, 0] for frame in made] == [0, 10, 20]
    assert (made[:, :8, 32 + GAP :] == 200).all()
    assert (made[:, 16 + GAP :, :16] == 90).all()


def test_both_sides_are_even():
    assert grid([[video(1, 15, 17, 0)]]).shape == (1, 16, 18, 3)
    assert shrunk(video(2, 90, 160, 0), 33).shape == (2, 18, 32, 3)
    assert shrunk(video(2, 90, 160, 0), 160).shape == (2, 90, 160, 3)


def test_frames_are_spread_from_the_first_to_the_last():
    clip = np.arange(17, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 1, 3), np.uint8)
    assert [int(frame[0, 0, 0]) for frame in evenly(clip, 5)] == [0, 4, 8, 12, 16]
    assert len(evenly(clip, 100)) == 17


def test_a_label_stands_above_every_frame():
    made = labelled(video(3, 20, 120, 0), "step 500")
    assert made.shape == (3, 20 + BAR_HEIGHT, 120, 3)
    assert (made[:, BAR_HEIGHT:] == 0).all()
    assert made[0, :BAR_HEIGHT].max() > 200
    assert (made[0, :BAR_HEIGHT] == made[2, :BAR_HEIGHT]).all()

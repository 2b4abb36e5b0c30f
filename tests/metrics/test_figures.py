import numpy as np

from cogds.metrics.figures import COLORS, bar_chart, contact_sheet


def count(pixels, color):
    return int((np.abs(pixels.astype(int) - color).sum(axis=2) == 0).sum())


def test_bars_are_as_long_as_their_shares():
    pixels = bar_chart("What", ["81x768x1360", "1x64x64"], [("clips", [0.75, 0.25]), ("cost", [0.5, 0.0])])
    legend = count(bar_chart("What", [], [("clips", []), ("cost", [])]), COLORS[0])
    clips, cost = (count(pixels, color) - legend for color in COLORS[:2])
    assert clips > 0
    assert abs(clips / cost - 2) < 0.02  # (0.75 + 0.25) / 0.5
    assert count(pixels, COLORS[2]) == 0


def test_nothing_to_draw_is_drawn():
    assert bar_chart("What", ["a"], [("clips", [0.0])]).dtype == np.uint8


def test_every_picture_is_on_the_sheet_in_its_own_shape():
    tall, wide = np.full((96, 64, 3), (255, 0, 0), np.uint8), np.full((64, 128, 3), (0, 0, 255), np.uint8)
    sheet = contact_sheet([tall, wide, tall], ["a red thing", "blue\n" * 40, ""], num_columns=2)
    assert count(sheet, (255, 0, 0)) == 2 * 256 * 384
    assert count(sheet, (0, 0, 255)) == 256 * 128
    ink = (sheet.astype(int).sum(axis=2) < 200).sum()
    assert 200 < ink < sheet.shape[0] * sheet.shape[1] / 10  # a caption of forty lines is cut

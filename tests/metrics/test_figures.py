import numpy as np
import pytest
from matplotlib.colors import to_rgb

from cogds.metrics.figures import (
    BLUE,
    CELL,
    ORANGE,
    contact_sheet,
    draw_bars,
    new_figure,
    plot_style,
    share_chart,
    to_svg,
)


def count(pixels, color):
    return int((np.abs(pixels.astype(int) - color).sum(axis=2) == 0).sum())


def rgb(name):
    return [round(255 * part) for part in to_rgb(name)]


def test_bars_are_as_long_as_their_shares():
    with plot_style():
        axes = new_figure(4, 2).subplots()
        draw_bars(axes, ["81x768x1360", "1x64x64"], [("clips", [0.75, 0.25], BLUE), ("cost", [0.5, 0.0], ORANGE)])
    assert [[bar.get_width() for bar in bars] for bars in axes.containers] == [[0.75, 0.25], [0.5, 0.0]]
    first, second = axes.containers[0]
    assert axes.transData.transform((0, first.get_y()))[1] > axes.transData.transform((0, second.get_y()))[1]


def test_areas_of_a_share_chart_are_proportional():
    pixels = share_chart("Shares", ["81x768x1360", "1x64x64"], [("clips", [0.75, 0.25]), ("cost", [0.5, 0.0])])
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    # (0.75 + 0.25) / 0.5, apart from the legend
    assert count(pixels, rgb(BLUE)) / count(pixels, rgb(ORANGE)) == pytest.approx(2, rel=0.1)
    assert count(pixels, (255, 255, 255)) > pixels.shape[0] * pixels.shape[1] / 3


def test_a_chart_of_zeros_is_drawn():
    assert share_chart("Shares", ["a"], [("clips", [0.0])]).dtype == np.uint8


def test_an_svg_contains_no_metadata_and_no_unescaped_label():
    with plot_style():
        figure = new_figure(2, 1)
        figure.subplots().plot([0, 1])
        svg = to_svg(figure, 'a "label" <b>')
    assert svg.startswith("<svg role=")
    assert "currentColor" in svg
    assert not any(text in svg for text in ("<metadata", "<b>", "<?xml", "matplotlib.org"))


def test_a_contact_sheet_keeps_the_shape_of_every_picture():
    tall, wide = np.full((96, 64, 3), (255, 0, 0), np.uint8), np.full((64, 128, 3), (0, 0, 255), np.uint8)
    sheet = contact_sheet([tall, wide, tall], ["a red thing", "blue\n" * 40, ""], num_columns=2)
    assert count(sheet, (255, 0, 0)) == 2 * CELL * CELL * 3 // 2
    assert count(sheet, (0, 0, 255)) == CELL * CELL // 2
    ink = (sheet.astype(int).sum(axis=2) < 200).sum()
    assert 200 < ink < sheet.shape[0] * sheet.shape[1] / 10  # a caption of 40 lines is truncated

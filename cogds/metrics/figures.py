"""Plots (matplotlib) and contact sheets (Pillow), for TensorBoard and for the report page.

with plot_style():
    figure = new_figure(6.4, 3)
    draw_bars(figure.subplots(), ["81x768x1360"], [("clips", [12])])
    pixels = to_pixels(figure)  # or to_svg(figure, "Clips by bucket.")
"""

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from cogds.metrics.fonts import Writer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Readable on white and on black.
BLUE, ORANGE, GREEN, GRAY = "#3b82c4", "#e0812b", "#5aa05a", "#8a8f98"
PURPLE, PALE_ORANGE = "#7a6bb5", "#f0b27a"
# In an SVG, this color is replaced by that of the page's text.
INK = "#010203"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # keep text as text: small files, sharp, and accessible to screen readers
    "font.family": ["sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

BACKGROUND, TEXT_COLOR = (255, 255, 255), (40, 40, 40)
# Of a contact sheet, in pixels. TensorBoard shows it at half of this size.
GAP = 12
CELL = 360  # width of a picture
FONT_SIZE = 24
MAX_CAPTION_LINES = 6


@contextmanager
def plot_style() -> Iterator[None]:
    """Use the common style for figures created and converted inside."""
    import matplotlib  # imported here because it takes a second

    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this size in inches, without global state and without a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_bars(
    axes: "Axes", labels: Sequence[str], series: Sequence[tuple[str, Sequence[float], str]], label_format: str = ""
) -> None:
    """Draw horizontal bars: one group per label, top to bottom.

    series: (name, a value per label, color); label_format: of the value beside each bar, such as `%.1f`.
    """
    thickness = 0.8 / len(series)
    for index, (name, values, color) in enumerate(series):
        offset = (index - (len(series) - 1) / 2) * thickness
        bars = axes.barh(np.arange(len(labels)) + offset, values, thickness, color=color, label=name)
        if label_format:
            axes.bar_label(bars, fmt=label_format, padding=3, fontsize=9)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()


def to_svg(figure: "Figure", label: str) -> str:
    """Convert to an `<svg>` element for inlining in a page. label: a description, unique within the page."""
    import matplotlib

    buffer = io.StringIO()
    # Metadata would contain a date and addresses.
    no_metadata: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Names such as `figure_1` occur in every plot, and nothing refers to them.
    svg = re.sub(r' id="[A-Za-z]+[A-Za-z0-9.]*_\d+"', "", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def to_pixels(figure: "Figure") -> np.ndarray:
    """Convert to pixels, uint8 [H, W, 3], on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def share_chart(title: str, labels: Sequence[str], series: Sequence[tuple[str, Sequence[float]]]) -> np.ndarray:
    """Draw shares in [0, 1] as bars, one group per label: uint8 [H, W, 3]. series: (name, a value per label)."""
    with plot_style():
        figure = new_figure(7, 1.2 + 0.2 * len(series) * max(1, len(labels)))
        axes = figure.subplots()
        colors = (BLUE, ORANGE, GREEN, GRAY)
        percents = [(name, [100 * value for value in values]) for name, values in series]
        draw_bars(axes, labels, [(*bars, color) for bars, color in zip(percents, colors)], "%.1f%%")
        axes.set(title=title, xlabel="share [%]")
        axes.margins(x=0.12)
        figure.legend(loc="outside lower center", ncols=len(series), frameon=False)
        return to_pixels(figure)


def contact_sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], num_columns: int = 2) -> np.ndarray:
    """Arrange pictures, uint8 [H, W, 3] of any sizes, in a grid with a caption under each: uint8 [H, W, 3]."""
    writer = Writer(FONT_SIZE)
    texts = [writer.wrap(caption, CELL, MAX_CAPTION_LINES) for caption in captions]
    cells = []
    for picture in pictures:
        image = Image.fromarray(picture)
        cells.append(image.resize((CELL, max(1, round(CELL * image.height / image.width))), Image.Resampling.LANCZOS))
    num_columns = min(num_columns, len(cells))
    rows = [range(start, min(start + num_columns, len(cells))) for start in range(0, len(cells), num_columns)]
    heights = [max(cells[n].height + writer.line_height * len(texts[n]) for n in row) + 2 * GAP for row in rows]
    sheet = Image.new("RGB", (num_columns * (CELL + GAP) + GAP, sum(heights) + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for row, height in zip(rows, heights):
        for column, n in enumerate(row):
            x = GAP + column * (CELL + GAP)
            sheet.paste(cells[n], (x, top))
            for number, line in enumerate(texts[n], 1):
                writer.draw(draw, (x, top + cells[n].height + number * writer.line_height), line, TEXT_COLOR)
        top += height
    return np.asarray(sheet)

"""Charts and contact sheets drawn with Pillow, as pixels uint8 [H, W, 3]."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK, FAINT = (255, 255, 255), (40, 40, 40), (225, 225, 225)
COLORS = ((59, 130, 196), (224, 129, 43), (90, 160, 90))
FONT_SIZE = 15
LINE = 20  # height of a line of text, pixels
GAP = 12
CELL = 256  # width of an image in a contact sheet, pixels
MAX_CAPTION_LINES = 4


def bar_chart(title: str, labels: Sequence[str], series: Sequence[tuple[str, Sequence[float]]]) -> np.ndarray:
    """Draw shares (0 to 1) as horizontal bars: a group per label, with a bar of each series."""
    font = ImageFont.load_default(FONT_SIZE)
    left = max([round(font.getlength(label)) for label in labels], default=0) + 2 * GAP
    length, bar = 480, 14
    group = bar * len(series) + GAP
    height = 3 * LINE + 2 * GAP + group * len(labels)
    image = Image.new("RGB", (left + length + 80, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, INK, font)
    x = left
    for (name, _), color in zip(series, COLORS):
        draw.rectangle((x, GAP + LINE + 6, x + bar, GAP + LINE + 6 + bar), color)
        draw.text((x + bar + 6, GAP + LINE + 3), name, INK, font)
        x += bar + 6 + round(font.getlength(name)) + 2 * GAP
    most = max([value for _, values in series for value in values], default=0) or 1.0
    for row, label in enumerate(labels):
        y = 3 * LINE + GAP + row * group
        draw.text((GAP, y + (group - GAP - LINE) // 2), label, INK, font)
        for (_, values), color in zip(series, COLORS):
            end = left + round(length * values[row] / most)
            draw.rectangle((left, y, left + length, y + bar - 3), FAINT)
            draw.rectangle((left, y, end, y + bar - 3), color)
            draw.text((left + length + 8, y - 4), f"{100 * values[row]:.1f}%", INK, font)
            y += bar
    return np.asarray(image)


def contact_sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], num_columns: int = 4) -> np.ndarray:
    """Draw images, uint8 [H, W, 3] of any sizes, in a grid, each with its caption below."""
    font = ImageFont.load_default(FONT_SIZE)
    per_line = CELL // 8
    texts = [textwrap.wrap(caption, per_line)[: MAX_CAPTION_LINES + 1] or [""] for caption in captions]
    texts = [[*t[: MAX_CAPTION_LINES - 1], t[MAX_CAPTION_LINES - 1][:-1] + "…"] if len(t) > MAX_CAPTION_LINES else t
             for t in texts]  # fmt: skip
    cells = []
    for picture in pictures:
        image = Image.fromarray(picture)
        cells.append(image.resize((CELL, max(1, round(CELL * image.height / image.width))), Image.Resampling.LANCZOS))
    num_columns = min(num_columns, len(cells))
    rows = [range(start, min(start + num_columns, len(cells))) for start in range(0, len(cells), num_columns)]
    heights = [max(cells[n].height + LINE * len(texts[n]) for n in row) + 2 * GAP for row in rows]
    sheet = Image.new("RGB", (num_columns * (CELL + GAP) + GAP, sum(heights) + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for row, height in zip(rows, heights):
        for column, n in enumerate(row):
            x = GAP + column * (CELL + GAP)
            sheet.paste(cells[n], (x, top))
            for line, text in enumerate(texts[n]):
                draw.text((x, top + cells[n].height + 4 + line * LINE), text, INK, font)
        top += height
    return np.asarray(sheet)

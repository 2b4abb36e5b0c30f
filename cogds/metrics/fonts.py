"""Text in images, in any script for which there is a font. Pillow's own font has only Latin letters.

text = Writer(FONT_SIZE)
lines = text.wrap("a caption, 一个标题", width=360, max_lines=4)
text.draw(ImageDraw.Draw(image), (8, 8), lines[0], (40, 40, 40))

A character is drawn in the first font that has it: matplotlib's DejaVu Sans, the font of `pip install 'cogds[fonts]'`
(Chinese, Japanese, Korean), and then the fonts of the system. A character that no font has is drawn as a box, and a
warning says so once.
"""

import functools
import importlib.util
import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageDraw, ImageFont

logger = logging.getLogger(__name__)

CJK_PACKAGE = "noto_cjk_sans_otc"
# Lines may break between any two of these.
_IDEOGRAPHS = "\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef\U00020000-\U0003ffff"
_WORDS = re.compile(rf"\s+|[{_IDEOGRAPHS}]|[^\s{_IDEOGRAPHS}]+")
_NO_CHARACTER = "\U0010ffff"  # no font has it, so it is drawn as the box of a missing character
ELLIPSIS = "…"


@functools.cache
def font_files() -> tuple[Path, ...]:
    """Return the files of all fonts, in the order in which they are tried."""
    import matplotlib
    from matplotlib import font_manager

    files = [Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"]
    if spec := importlib.util.find_spec(CJK_PACKAGE):
        files += sorted(Path(str(spec.origin)).parent.glob("*.tt[cf]"))
    # Of the system's fonts, plain ones come first.
    system = map(Path, font_manager.findSystemFonts())
    return (*files, *sorted(system, key=lambda file: ("Regular" not in file.stem, "Sans" not in file.stem, file)))


@functools.cache
def _open(file: Path, size: int) -> ImageFont.FreeTypeFont | None:
    """Return a font, or None if it has no outlines or is damaged."""
    try:
        font = ImageFont.truetype(str(file), size)
        font.getmask(_NO_CHARACTER)
    except OSError:
        return None
    return font


@functools.cache
def _has(font: ImageFont.FreeTypeFont, char: str) -> bool:
    return bytes(font.getmask(char)) != bytes(font.getmask(_NO_CHARACTER))


@functools.cache
def _find_font(size: int, char: str) -> ImageFont.FreeTypeFont | None:
    """Return the first font that has a character, or None."""
    fonts = (_open(file, size) for file in font_files())
    return next((font for font in fonts if font is not None and _has(font, char)), None)


@functools.cache
def _warn() -> None:
    """Warn once."""
    logger.warning(
        "captions: no font has some of their characters, so TensorBoard's images lack them. For Chinese, Japanese and "
        "Korean, run pip install 'cogds[fonts]', or else install a font. The Text tab has them."
    )


class Writer:
    """Draws and measures lines of text at one size, in pixels."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.line_height = round(1.35 * size)

    def draw(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], line: str, color: tuple[int, ...]) -> None:
        """Draw one line. place: left and baseline of the line [px]."""
        x, y = place
        for font, part in self._runs(line):
            draw.text((x, y), part, fill=color, font=font, anchor="ls")
            x += font.getlength(part)

    def width(self, line: str) -> float:
        """Return the width of a line [px]."""
        return sum(font.getlength(part) for font, part in self._runs(line))

    def wrap(self, text: str, width: float, max_lines: int) -> list[str]:
        """Break a text into lines of at most `width` pixels. The last line ends in an ellipsis if there is more."""
        lines = [""]
        for word in _WORDS.findall(text):
            word = " " if word.isspace() else word
            for part in [word] if self.width(word) <= width else word:
                if self.width(lines[-1] + part) <= width:
                    lines[-1] += part
                else:
                    lines.append(part.lstrip())
        lines = [line.strip() for line in lines]
        if len(lines) <= max_lines:
            return lines
        last = lines[max_lines - 1]
        while last and self.width(last + ELLIPSIS) > width:
            last = last[:-1]
        return [*lines[: max_lines - 1], last.rstrip() + ELLIPSIS]

    def _runs(self, line: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        """Split a line into parts with one font each. Spaces and marks belong to the part before them."""
        fonts: list[ImageFont.FreeTypeFont] = []
        for char in line:
            keeps = fonts and (char.isspace() or _has(fonts[-1], char))
            fonts.append(fonts[-1] if keeps else self._font(char))
        for font, pairs in itertools.groupby(zip(fonts, line), key=lambda pair: pair[0]):
            yield font, "".join(char for _, char in pairs)

    def _font(self, char: str) -> ImageFont.FreeTypeFont:
        if font := _find_font(self._size, " " if char.isspace() else char):
            return font
        _warn()
        font = _open(font_files()[0], self._size)
        assert font is not None
        return font

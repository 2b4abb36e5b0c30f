"""Text in images: every script that a font covers is drawn, and lines fit."""

import logging

import numpy as np
import pytest
from PIL import Image, ImageDraw

import cogds.metrics.fonts
from cogds.metrics.fonts import ELLIPSIS, Writer, font_files

CHINESE, JAPANESE, KOREAN = "一个红色的圆", "青い四角が右へ", "빨간 삼각형"
TEXTS = ("red circle, 12 %", "Красный круг", "κόκκινος κύκλος", "دائرة حمراء", CHINESE, JAPANESE, KOREAN)


def drawn(text, size=24):
    image = Image.new("L", (400, 40), 255)
    Writer(size).draw(ImageDraw.Draw(image), (0, 30), text, (0,))
    return np.asarray(image)


@pytest.mark.parametrize("text", TEXTS)
def test_characters_of_a_script_are_drawn_and_are_not_boxes(text, caplog):
    letters = sorted(set(text) - set(" ,12%"))
    pictures = {drawn(letter).tobytes() for letter in letters}
    assert len(pictures) == len(letters)
    assert not caplog.records
    assert drawn("\U0010ffff").tobytes() not in pictures


def test_a_script_without_a_font_is_a_warning_once(caplog, monkeypatch):
    for function in ("_find_font", "_warn"):
        getattr(cogds.metrics.fonts, function).cache_clear()
    monkeypatch.setattr(cogds.metrics.fonts, "font_files", lambda: font_files()[:1])
    with caplog.at_level(logging.WARNING):
        drawn(CHINESE)
        drawn(KOREAN)
    assert len(caplog.records) == 1
    assert "cogds[fonts]" in caplog.text
    cogds.metrics.fonts._find_font.cache_clear()


@pytest.mark.parametrize("text", [*TEXTS, "a" * 200, CHINESE * 20 + " red " + KOREAN * 9, "", "one\n two  three"])
def test_lines_fit_and_nothing_is_lost(text):
    writer = Writer(24)
    lines = writer.wrap(text, 200, 99)
    assert all(writer.width(line) <= 200 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_a_long_text_ends_in_an_ellipsis():
    lines = Writer(24).wrap(CHINESE * 20, 200, 3)
    assert len(lines) == 3
    assert lines[-1].endswith(ELLIPSIS)
    assert Writer(24).width(lines[-1]) <= 200


def test_parts_in_different_fonts_do_not_overlap():
    mixed = drawn("ab" + CHINESE[:2] + "cd")
    ink = (mixed < 128).any(axis=0)
    start = round(Writer(24).width("ab"))
    assert ink[:start].any()
    assert ink[start + 48 :].any()
    assert Writer(24).width("ab" + CHINESE[:2]) == pytest.approx(start + 2 * 24, abs=2)

import pytest

from cogds.formatting import counted, duration, gigabytes, magnitude, number, percent


def test_nouns_are_singular_or_plural():
    assert [counted(num, "clip") for num in (0, 1, 2, 12_000)] == ["0 clips", "1 clip", "2 clips", "12,000 clips"]
    assert [counted(num, "entry") for num in (1, 2)] == ["1 entry", "2 entries"]


@pytest.mark.parametrize(
    "value, text",
    [
        (percent(0), "0%"), (percent(0.004), "<1%"), (percent(0.154), "15%"), (gigabytes(2.5e9), "2.5 GB"),
        (gigabytes(26e6), "26 MB"), (gigabytes(4e5), "400 kB"), (gigabytes(0), "0 MB"), (gigabytes(3), "3 bytes"),
        (gigabytes(4.6e14), "460.0 TB"),
        (duration(3.21), "3.2 s"), (duration(90), "90 s"), (duration(7200), "2.0 h"),
    ],
)  # fmt: skip
def test_units(value, text):
    assert value == text


def test_counts():
    assert [magnitude(value) for value in (5_571_594_880, 132_120_576, 2016, 7)] == ["5.57 B", "132.1 M", "2.0 k", "7"]
    assert [number(value) for value in (0.5, 12.0, 12.34, 1234.5)] == ["0.5", "12", "12.3", "1,234"]

"""Numbers and units as text."""

from collections.abc import Mapping


def counted(value: float, noun: str) -> str:
    """Return `1 clip`, `12,000 clips`, `4.5 steps` or `2 entries`. noun: a regular one, in the singular."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    text = number(value)
    return f"{text} {noun if text == '1' else plural}"


def percent(share: float) -> str:
    """Return a share as a percentage: 0 is `0%`, and anything below 1% is `<1%`."""
    return "0%" if share <= 0 else "<1%" if share < 0.01 else f"{100 * share:.0f}%"


def gigabytes(size: float) -> str:
    """Return bytes as GB (10^9 bytes), or as TB, MB, kB or bytes if that is closer."""
    if size >= 1e12:
        return f"{size / 1e12:,.1f} TB"
    if size >= 1e9:
        return f"{size / 1e9:,.1f} GB"
    if 0 < size < 1e3:
        return f"{size:.0f} bytes"
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 or not size else f"{size / 1e3:,.0f} kB"


def duration(seconds: float) -> str:
    """Return seconds in the unit that fits."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s" if seconds < 10 else f"{seconds:,.0f} s"


def number(value: float) -> str:
    """Return a number with thousands separators, and with one decimal below 100 if it has any."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


def magnitude(value: float) -> str:
    """Return a number of parameters: `5.57 B`, `132.1 M`, `40.3 k`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}" if unit == "B" else f"{value / size:.1f} {unit}"
    return f"{value:.0f}"


def counts(numbers: Mapping[str, int]) -> str:
    """`3 x .md file, 1 x hidden file`: the largest numbers first."""
    pairs = sorted(numbers.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{number:,} x {noun}" for noun, number in pairs)

"""Which parts of a clip are trained where it is longer than its bucket."""

from cogds.core.permutation import keyed_hash

MODES = ("first", "random", "uniform", "all")


def window_starts(
    mode: str, num_windows: int, num_frames_available: int, bucket_frames: int, fps: float, key: tuple[int, ...]
) -> tuple[float, ...]:
    """Seconds after the beginning of a clip's range at which its windows start, rising, all on the grid of 1 / fps.

    num_frames_available: frames of the range at fps (`video.num_frames_at`); a window is bucket_frames long.
    first: the beginning. random: one, drawn from the key, the same every time. uniform: num_windows (0: one) from the
    first possible place to the last, a single one in the middle; fewer where there are not so many places. all: one
    after the other without overlap, as many as fit, at most num_windows (0: no limit). Only random uses the key.
    Raises ValueError where no window fits, or the mode is unknown.
    """
    num_places = num_frames_available - bucket_frames + 1
    if num_places < 1 or bucket_frames < 1 or fps <= 0 or num_windows < 0:
        raise ValueError(f"no window of {bucket_frames} frames in {num_frames_available} at {fps} fps")
    if mode == "first":
        firsts = [0]
    elif mode == "random":
        firsts = [keyed_hash("cogds.windows", *key) % num_places]
    elif mode == "uniform":
        firsts = _spread(min(max(1, num_windows), num_places), num_places - 1)
    elif mode == "all":
        firsts = list(range(0, num_places, bucket_frames))[: num_windows or None]
    else:
        raise ValueError(f"mode is {mode!r}, not one of {', '.join(MODES)}")
    return tuple(first / fps for first in firsts)


def _spread(count: int, last: int) -> list[int]:
    """count whole numbers from 0 to last, evenly; count <= last + 1, so rounding makes no two of them equal."""
    if count == 1:
        return [last // 2]
    return [(2 * i * last + count - 1) // (2 * (count - 1)) for i in range(count)]

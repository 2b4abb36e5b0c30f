"""Windows: the parts of a clip that are trained if it is longer than its bucket."""

from cogds.core.permutation import keyed_hash

MODES = ("first", "random", "uniform", "all")


def window_starts(
    mode: str, num_windows: int, num_frames_available: int, bucket_frames: int, fps: float, key: tuple[int, ...]
) -> tuple[float, ...]:
    """Return the start times of a clip's windows, in seconds from the start of its range, ascending, in steps of 1/fps.

    Args:
        mode:
            first: one window, at the start.
            random: one window, at a position drawn from the key, which is the same every time.
            uniform: num_windows (0: one) windows, evenly spaced from the first possible position to the last, or one
                in the middle. Fewer if there are fewer positions.
            all: consecutive windows without overlap, as many as fit, at most num_windows (0: no limit).
        num_frames_available: frames of the range at fps (`video.num_frames_at`).
        bucket_frames: length of a window.
        key: used by random only.

    Raises:
        ValueError: no window fits, or the mode is unknown.
    """
    num_positions = num_frames_available - bucket_frames + 1
    if num_positions < 1 or bucket_frames < 1 or fps <= 0 or num_windows < 0:
        raise ValueError(f"no window of {bucket_frames} frames fits into {num_frames_available} frames at {fps} fps")
    if mode == "first":
        firsts = [0]
    elif mode == "random":
        firsts = [keyed_hash("cogds.windows", *key) % num_positions]
    elif mode == "uniform":
        firsts = _spread_evenly(min(max(1, num_windows), num_positions), num_positions - 1)
    elif mode == "all":
        firsts = list(range(0, num_positions, bucket_frames))[: num_windows or None]
    else:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    return tuple(first / fps for first in firsts)


def _spread_evenly(count: int, last: int) -> list[int]:
    """`count` distinct integers, evenly spaced from 0 to last. Requires count <= last + 1."""
    if count == 1:
        return [last // 2]
    return [(2 * i * last + count - 1) // (2 * (count - 1)) for i in range(count)]

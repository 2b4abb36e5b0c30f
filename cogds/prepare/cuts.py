"""Cuts between scenes, found by PySceneDetect's adaptive detector in frames that cogds decodes.

PySceneDetect's own readers number frames by the mean frame rate and do not know edit lists. Here a cut is the index of
a frame whose time cogds knows, so no clip of a scene contains a frame of the next one.
"""

import numpy as np
from scenedetect import AdaptiveDetector, FrameTimecode

# Frames before and after a frame whose mean change its own change is compared with.
WINDOW = 2


class CutDetector:
    """Finds hard cuts.

    Args:
        threshold: a frame begins a scene if it changes this many times as much as its neighbors do.
    """

    def __init__(self, threshold: float) -> None:
        self._detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=0, window_width=WINDOW)
        self._num_processed, self._last = 0, np.empty(0, np.uint8)
        self._cuts: list[int] = []

    def add(self, picture: np.ndarray) -> None:
        """Add the next frame: uint8 [H, W, 3] in RGB, all of one size."""
        self._last = np.ascontiguousarray(picture[..., ::-1])  # OpenCV's order
        # The detector needs WINDOW neighbors on both sides. With the first and last frame repeated, it sees cuts at the
        # ends too. It is more sensitive there, which may cost two frames, but leaves no foreign frame in a scene.
        self._process(1 if self._num_processed else 1 + WINDOW)

    def cuts(self) -> list[int]:
        """Indices of the frames that begin a scene, except for the first, after all frames were added."""
        self._process(WINDOW)
        return self._cuts

    def _process(self, num_times: int) -> None:
        for _ in range(num_times):
            timecode = FrameTimecode(self._num_processed, fps=1.0)  # only a number to get back
            self._cuts += [cut.frame_num - WINDOW for cut in self._detector.process_frame(timecode, self._last)]
            self._num_processed += 1

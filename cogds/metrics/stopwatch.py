"""Timers for a step and its phases. They never wait for the GPU."""

import itertools
import time

import torch


class Stopwatch:
    """Measures the seconds between readings."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last reading."""
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed


class PhaseTimer:
    """Measures the seconds of a step by phase. Each phase ends when the next one begins.

    On a GPU, CUDA events measure when the GPU runs each phase. They are read one step later, so that nothing waits for
    the GPU. On a CPU, the host's clock measures the phases.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._previous_marks: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self, name: str) -> None:
        """Begin a phase. "" begins time that belongs to no phase."""
        if not self._is_gpu:
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def lap(self) -> dict[str, float]:
        """End the step and return its phases in seconds: on a GPU, those of the step before, or {} if unknown."""
        self.begin("")
        marks = self._previous_marks if self._is_gpu else self._marks
        self._previous_marks, self._marks = self._marks, []
        end = marks[-1][1] if marks else 0.0
        if not isinstance(end, float) and not end.query():
            return {}
        seconds: dict[str, float] = {}
        for (name, start), (_, stop) in itertools.pairwise(marks):
            if name:
                seconds[name] = seconds.get(name, 0.0) + _seconds_between(start, stop)
        return seconds


def _seconds_between(start: "float | torch.cuda.Event", stop: "float | torch.cuda.Event") -> float:
    if isinstance(start, float) or isinstance(stop, float):
        return float(stop) - float(start)  # type: ignore[arg-type]
    return start.elapsed_time(stop) / 1e3

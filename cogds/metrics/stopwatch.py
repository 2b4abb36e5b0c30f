"""Where the time of a step goes, found without waiting for a GPU."""

import itertools
import time

import torch


class Stopwatch:
    """Seconds since the last reading."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed


class Phases:
    """Seconds of a step by phase: each begins where another ends.

    On a GPU the phases are those of its own queue, between events that are read one step late, when they have long
    happened: nothing is waited for. On a CPU they are the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._before: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self, name: str) -> None:
        """What comes from here on belongs to this phase; "" to none."""
        if not self._on_gpu:
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def lap(self) -> dict[str, float]:
        """The step is over: its phases, or, on a GPU, those of the step before; {} where there was none yet."""
        self.begin("")
        self._before, self._marks, marks = self._marks, [], self._before if self._on_gpu else self._marks
        end = marks[-1][1] if marks else 0.0
        if not isinstance(end, float) and not end.query():
            return {}
        found: dict[str, float] = {}
        for (name, start), (_, stop) in itertools.pairwise(marks):
            if name:
                found[name] = found.get(name, 0.0) + _between(start, stop)
        return found


def _between(start: "float | torch.cuda.Event", stop: "float | torch.cuda.Event") -> float:
    if isinstance(start, float) or isinstance(stop, float):
        return float(stop) - float(start)  # type: ignore[arg-type]
    return start.elapsed_time(stop) / 1e3

import torch

from cogds.metrics import stopwatch
from cogds.metrics.stopwatch import PhaseTimer


def test_phases_of_a_step_add_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    phases = PhaseTimer(torch.device("cpu"))
    assert phases.lap() == {}
    for name, seconds in (("inputs", 1.0), ("forward", 2.0), ("backward", 4.0), ("forward", 8.0), ("", 16.0)):
        phases.begin(name)
        now[0] += seconds
    assert phases.lap() == {"inputs": 1.0, "forward": 10.0, "backward": 4.0}
    assert phases.lap() == {}


class Event:
    """A stand-in for a CUDA event. queue_s: time of the GPU; done: whether the GPU has reached all events."""

    queue_s, done = 0.0, True

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.queue_s

    def query(self):
        return Event.done

    def elapsed_time(self, other):
        assert Event.done, "this would wait for the GPU"
        return 1e3 * (other.at - self.at)


def test_phases_on_a_gpu_are_read_one_step_late_without_waiting(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    phases = PhaseTimer(torch.device("cuda"))

    def step(seconds):
        phases.begin("forward")
        Event.queue_s += seconds
        return phases.lap()

    assert step(1.0) == {}
    assert step(2.0) == {"forward": 1.0}
    Event.done = False
    assert step(3.0) == {}
    Event.done = True
    assert step(4.0) == {"forward": 3.0}

"""What is done beside training: its memory is its own. (Training itself is tested by real runs, in tests/dist.)"""

from types import SimpleNamespace

import pytest
import torch

from cogds.runtime.world import World
from cogds.training.loop import Occasion, meet


@pytest.fixture
def gpu(monkeypatch):
    """A GPU's allocator: what is held now, and the peak since it was restarted, in bytes."""
    memory = SimpleNamespace(held=4e9, peak=9e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: memory.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: setattr(memory, "peak", memory.held))
    monkeypatch.setattr(World, "device", torch.device("cuda", 0))
    return memory


def occasions(memory, *peaks):
    def act(peak):
        return lambda _: setattr(memory, "peak", max(memory.peak, peak))

    return [Occasion(f"doing {peak}", 1, act(peak)) for peak in peaks]


def noted(due):
    notes, watched = [], []
    monitor = SimpleNamespace(note=lambda step, scalars: notes.append((step, scalars)))
    meet(due, 5, SimpleNamespace(watch=lambda say: watched.append(say())), monitor, World(0, 1, 0, 1))
    return notes, watched


def test_the_peak_of_an_occasion_is_noted_and_is_not_trainings(gpu):
    notes, watched = noted(occasions(gpu, 6e9, 5e9))
    assert notes == [(5, {"occasion/peak_memory_gb": 6.0})]  # not the 9 of training before it
    assert gpu.peak == 4e9
    assert watched == ["doing 6000000000.0 after step 5", "doing 5000000000.0 after step 5"]


def test_where_nothing_is_due_nothing_is_noted(gpu):
    assert noted([]) == ([], [])
    assert gpu.peak == 9e9


def test_a_cpu_has_no_peak_of_its_own_to_note():
    assert noted([Occasion("doing", 1, lambda _: None)])[0] == []

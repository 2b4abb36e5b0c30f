"""Measurements of a step that depend on the other ranks or on earlier steps."""

import math
from types import SimpleNamespace

import pytest
import torch

import cogds.train.step_meter
from cogds.core.mixture import Mixture
from cogds.distributed.world import World
from cogds.train.step_meter import StepMeter
from tests.published_model import LORA, TRANSFORMER


@pytest.fixture
def meter(monkeypatch):
    """`meter(stage, sequence_size)`: the meter of a run with one tiny bucket, on the last of four ranks."""
    monkeypatch.setattr(cogds.train.step_meter, "num_tokens", lambda *_: 32)

    def make(stage=2, sequence_size=1):
        run = SimpleNamespace(
            world=World(3, 4, 3, 4, sequence_size), buckets=("bucket",), model=SimpleNamespace(
                geometry=None, num_layers=2, hidden_size=32
            ),
            cfg=SimpleNamespace(
                trains_lora=True, metrics=SimpleNamespace(norms_every=None), train=SimpleNamespace(precision="bf16")
            ),
            job=SimpleNamespace(memory=SimpleNamespace(transformer=TRANSFORMER, trained=LORA)),
            plan=SimpleNamespace(coverage=lambda _: (0,)), data=SimpleNamespace(mixture=Mixture(((1,),), (1.0,), 0)),
        )  # fmt: skip
        engine = SimpleNamespace(module=torch.nn.Module(), zero_optimization_stage=lambda: stage)
        return StepMeter(run, engine)

    return make


def step(meter):
    meter.begin("forward")
    meter.begin("optimizer")
    return meter.finish_step(0, [], wait_s=0.5)[1]


def test_busy_time_is_measured_only_if_no_rank_waits_for_another(meter):
    assert 0.5 <= step(meter()).busy_s < math.inf
    assert math.isnan(step(meter(stage=3)).busy_s)
    assert math.isnan(step(meter(sequence_size=2)).busy_s)


def test_the_peak_memory_is_that_of_all_steps_even_if_the_allocators_peak_is_reset(meter, monkeypatch):
    peaks = iter([7.0, 3.0, 8.0])
    monkeypatch.setattr(cogds.train.step_meter, "peak_memory_bytes", lambda _: next(peaks))
    same_meter = meter()
    assert [step(same_meter).device_bytes for _ in range(3)] == [7.0, 7.0, 8.0]

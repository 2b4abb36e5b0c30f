import argparse

import pytest

from cogds.distributed.world import World
from cogds.preflight.job import load_checked_job
from cogds.preflight.machine import look_disk
from tests.conftest import ROOT


@pytest.fixture
def job(tiny_model, tmp_path):
    def load(name, world=World(0, 1, 0, 1), *more):  # noqa: B008 (frozen)
        words = [f"model.path={tiny_model}", f"data.path={tmp_path}", "data.buckets=[9x64x96]", *more]
        args = argparse.Namespace(
            config=None, deepspeed=str(ROOT / f"ds_configs/{name}.json"), overrides=words, is_demo=False
        )
        return load_checked_job(args, world)

    return load


def test_weights_that_wait_on_the_host_are_counted_as_torch_pins_them(job):
    alone = job("zero3_offload", World(0, 1, 0, 1), "train.precision=bf16")
    plain = 2 * alone.memory.transformer.num_parameters
    assert plain < alone.offloaded_bytes < 2 * plain
    shared = job("zero3_offload", World(0, 2, 0, 2), "train.precision=bf16").offloaded_bytes
    assert shared == pytest.approx(alone.offloaded_bytes / 2, rel=0.01)
    alone.ds_config["zero_optimization"]["offload_param"]["pin_memory"] = False
    del alone.__dict__["offloaded_bytes"]
    assert alone.offloaded_bytes == plain
    assert job("zero3").offloaded_bytes == job("zero2").offloaded_bytes == 0


def test_weights_and_activations_that_wait_on_the_host_are_there_at_once(job):
    one = job("zero3_offload", World(0, 1, 0, 1), "train.activation_checkpointing=full+offload")
    needed = look_disk(one)["disk"]["memory"][2]
    assert needed == one.offloaded_bytes + one.pinned_bytes
    assert min(one.offloaded_bytes, one.pinned_bytes) > 0


def test_activations_that_wait_on_the_host(job):
    assert job("zero2").pinned_bytes == 0
    assert job("zero2", World(0, 1, 0, 1), "train.activation_checkpointing=full+offload").pinned_bytes > 0

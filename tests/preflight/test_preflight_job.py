"""The host memory that a job needs, and the data that it reads."""

import argparse

import pytest
import torch

from cogds.distributed.world import World
from cogds.preflight.machine import inspect_disk
from cogds.preflight.preflight_job import load_preflight_job
from cogds.preflight.trial_step import reserve_on_the_fly
from tests.conftest import ROOT
from tests.jobs import ALONE

OFFLOAD_ACTIVATIONS = "train.activation_checkpointing=full+offload"


@pytest.fixture
def load(tiny_model, tmp_path):
    """`load(name, *overrides, world)`: a job with a DeepSpeed config of ds_configs/."""

    def load(ds_name, *overrides, world=ALONE):
        overrides = [f"model.path={tiny_model}", f"data.path={tmp_path}", "data.buckets=[9x64x96]", *overrides]
        args = argparse.Namespace(config=None, deepspeed=str(ROOT / f"ds_configs/{ds_name}.json"), overrides=overrides)
        return load_preflight_job(args, world)

    return load


def test_offloaded_weights_are_counted_without_the_rounding_of_pinned_memory(load):
    job = load("zero3_offload", "train.precision=bf16")
    assert job.offloaded_bytes == 2 * job.memory.transformer.num_parameters
    half = load("zero3_offload", "train.precision=bf16", world=World(0, 2, 0, 2)).offloaded_bytes
    assert half == pytest.approx(job.offloaded_bytes / 2, rel=0.01)
    assert load("zero3").offloaded_bytes == load("zero2").offloaded_bytes == 0


def test_offloaded_weights_and_activations_add_up(load):
    job = load("zero3_offload", OFFLOAD_ACTIVATIONS)
    _, _, needed = inspect_disk(job)["disk"]["memory"]
    optimizer = job.memory.offloaded_optimizer_bytes
    assert needed == job.offloaded_bytes + job.pinned_bytes + optimizer
    assert min(job.offloaded_bytes, job.pinned_bytes, optimizer) > 0
    assert load("zero3").memory.offloaded_optimizer_bytes == 0


def test_activations_are_pinned_only_if_they_are_offloaded(load):
    assert load("zero2").pinned_bytes == 0
    assert load("zero2", OFFLOAD_ACTIVATIONS).pinned_bytes > 0


def test_the_trial_step_reserves_what_encoding_on_the_fly_needs(load):
    def reserved(mode, device):
        return len(reserve_on_the_fly(load("zero2", f"data.encode={mode}").estimates[0], torch.device(device)))

    assert reserved("on_the_fly", "meta") > 0
    assert reserved("on_the_fly", "cpu") == reserved("cached", "meta") == 0


def test_all_data_that_the_run_reads_is_checked(load, tmp_path):
    job = load("zero2", "data.root=/videos", "eval.path=/clips")
    assert job.data_paths == {"data.path": str(tmp_path), "data.root": "/videos", "eval.path": "/clips"}
    sets = load("zero2", "data.path=", "data.sets=[{path: /a}, {path: /b, root: s3://bucket}]").data_paths
    assert sets == {"data.sets[0].path": "/a", "data.sets[1].path": "/b", "data.sets[1].root": "s3://bucket"}

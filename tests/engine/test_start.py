"""Weights that ZeRO-3 offloads are pinned in one piece."""

import contextlib
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import zero_wrapper_for_fp_tensor_constructor
from diffusers import CogVideoXTransformer3DModel

from cogds.distributed.deepspeed_internals import merge_offloaded_weights
from cogds.engine import start
from cogds.errors import UserError
from cogds.model.load import find_model
from tests.jobs import make_job

CUDA = torch.device("cuda")


def module_with_partitions(*partitions):
    """A module whose parameters have these partitions, as `zero.Init` leaves them."""
    module = torch.nn.Module()
    for number, partition in enumerate(partitions):
        parameter = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        parameter.ds_tensor = partition
        partition.ds_numel = partition.numel()
        module.register_parameter(f"p{number}", parameter)
    return module


def test_frozen_weights_in_host_memory_are_merged():
    values = [torch.arange(1.0, 4), torch.arange(5).bfloat16(), torch.arange(33.0)]
    on_gpu, trained = torch.empty(4, device="meta"), torch.ones(2)
    module = module_with_partitions(*(value.clone() for value in values), on_gpu, trained)
    module.p4.requires_grad_(True)
    address = trained.data_ptr()
    partitions = [parameter.ds_tensor for parameter in module.parameters()]
    buffer = merge_offloaded_weights(module)
    assert [parameter.ds_tensor for parameter in module.parameters()] == partitions  # the same objects
    for partition, value in zip(partitions, values):
        assert torch.equal(partition, value)
        assert (partition.dtype, partition.ds_numel) == (value.dtype, value.numel())
        assert partition.untyped_storage().data_ptr() == buffer.bytes.data_ptr()
        assert partition.data_ptr() % 64 == 0
    assert buffer.num_bytes < 3 * 4096
    assert (on_gpu.device.type, trained.data_ptr()) == ("meta", address)
    assert merge_offloaded_weights(module_with_partitions(on_gpu)) is None


@pytest.fixture
def build(tiny_model, monkeypatch):
    """`build(pin, device)`: the config of `zero.Init` and the transformer. pin: what the buffer does to pin itself."""

    def build(pin, device=CUDA, **offload_param):
        job = make_job(f"model.path={tiny_model}", "data.path=unused", deepspeed="zero3_offload")
        job.ds_config["zero_optimization"]["offload_param"] |= offload_param
        configs = []

        def init(config_dict_or_path):
            configs.append(config_dict_or_path["zero_optimization"]["offload_param"])
            return contextlib.nullcontext()

        monkeypatch.setattr(deepspeed.zero, "Init", init)
        monkeypatch.setattr(start, "merge_offloaded_weights", lambda _: SimpleNamespace(pin=pin))
        transformer = start.build_for_stage(find_model(str(tiny_model)), torch.float32, job.ds_config, device)
        assert "pin_memory" in job.ds_config["zero_optimization"]["offload_param"]  # for the LoRA
        return configs[0], transformer

    return build


def test_fixed_positions_are_not_rounded_at_stage_3(family, monkeypatch):
    """Within `zero.Init`, arange makes bf16 numbers, whatever dtype is asked for."""

    @contextlib.contextmanager
    def init(config_dict_or_path):  # noqa: ARG001
        with monkeypatch.context() as patch:
            rounded = zero_wrapper_for_fp_tensor_constructor(torch.arange, torch.bfloat16, torch.device("cpu"))
            patch.setattr(torch, "arange", rounded)
            yield

    monkeypatch.setattr(deepspeed.zero, "Init", init)
    model = find_model(str(family("2b")))
    job = make_job(f"model.path={model.path}", "data.path=unused", "data.buckets=[9x64x64]", deepspeed="zero3")
    transformer = start.build_for_stage(model, torch.bfloat16, job.ds_config, torch.device("cpu"))
    expected = CogVideoXTransformer3DModel.from_config(model.transformer_config).patch_embed.pos_embedding
    torch.testing.assert_close(transformer.patch_embed.pos_embedding, expected)


def test_deepspeed_does_not_pin_what_is_pinned_in_one_piece(build):
    pinned = []
    config, transformer = build(lambda: pinned.append(1))
    assert config == {"device": "cpu"}
    assert pinned == [1]
    assert transformer.offloaded_weights is not None
    assert build(lambda: pinned.append(2), torch.device("cpu"))[1].offloaded_weights is not None
    _, transformer = build(lambda: pinned.append(3), pin_memory=False)
    assert transformer.offloaded_weights is None
    assert pinned == [1]


def test_locks_of_killed_builds_are_removed_before_zero_init_compiles(tiny_model, monkeypatch):
    """For weights on NVMe, `zero.Init` compiles an extension, and would wait for such a lock forever."""
    events = []
    job = make_job(f"model.path={tiny_model}", "data.path=unused", deepspeed="zero3_offload")
    job.ds_config["zero_optimization"]["offload_param"] = {"device": "nvme", "nvme_path": "unused"}
    monkeypatch.setattr(start, "find_ninja", lambda: None)
    monkeypatch.setattr(start, "remove_stale_locks", lambda _: events.append("locks"))
    monkeypatch.setattr(deepspeed.zero, "Init", lambda **_: events.append("init") or contextlib.nullcontext())
    start.build_for_stage(find_model(str(tiny_model)), torch.float32, job.ds_config, CUDA)
    assert events == ["locks", "init"]


def test_a_failure_to_pin_the_weights_is_a_user_error(build):
    def fail():
        raise OSError("Cannot allocate memory")

    with pytest.raises(UserError, match=r"^zero_optimization\.offload_param\.pin_memory: .*Cannot allocate memory"):
        build(fail)

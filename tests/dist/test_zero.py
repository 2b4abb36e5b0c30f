"""Every shipped DeepSpeed config gives the same losses and the same LoRA on 2 ranks."""

import json

import pytest
import torch

from tests.conftest import ROOT
from tests.dist.conftest import adapter, losses, metrics

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize("ds", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_float32_losses_and_adapter_agree(train_once, ds):
    reference, run = train_once("zero1", "zero1"), train_once(ds, ds)
    assert len(losses(run)) == 6
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)
    expected, tensors = adapter(reference), adapter(run)
    assert expected.keys() == tensors.keys()
    assert len(tensors) == 2 * 2 * 4
    for name, tensor in tensors.items():
        assert tensor.numel() > 0
        # Adam divides by the root of tiny second moments, which amplifies the last bits of a gradient.
        torch.testing.assert_close(tensor, expected[name], atol=2e-4, rtol=1e-3)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in tensors.items() if "lora_B" in name), "nothing was trained"


@pytest.mark.parametrize("ds", ["zero1", "zero2_offload", "zero3", "zero3_offload"])
def test_bf16_losses_agree(train_once, ds):
    reference = train_once("zero2-bf16", "zero2", "train.precision=bf16")
    run = train_once(f"{ds}-bf16", ds, "train.precision=bf16")
    assert losses(run) == pytest.approx(losses(reference), rel=5e-3)
    assert all(tensor.dtype == torch.bfloat16 and tensor.numel() for tensor in adapter(run).values())


@pytest.fixture
def train_released(train_once, workshop):
    """`train_released(name, ds, **zero_optimization)`: the folder of a run, and its weights.json.

    The tiny model's weights are below the default threshold, so the shipped config never releases one.
    """

    def run(name, ds, **section):
        config = json.loads((ROOT / f"ds_configs/{ds}.json").read_text())
        released = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 20_000}
        config["zero_optimization"] |= released | section
        file = workshop / f"{name}.json"
        file.write_text(json.dumps(config))
        folder = train_once(name, file, script=ROOT / "tests/dist/released_script.py")
        return folder, json.loads((folder / "weights.json").read_text())

    return run


def test_released_weights_give_the_same_losses(train_once, train_released):
    run, weights = train_released("zero3-released", "zero3")
    assert weights["released"] == weights["total"] > 50
    reference = train_once("zero2", "zero2")
    assert losses(run) == pytest.approx(losses(reference), rel=1e-6)
    for name, tensor in adapter(run).items():
        torch.testing.assert_close(tensor, adapter(reference)[name], atol=2e-4, rtol=1e-3)


def test_offloaded_weights_share_one_piece_of_memory(train_released):
    """Without pin_memory, DeepSpeed allocates each by itself. On CPUs it does so even with it."""
    run, weights = train_released("zero3_offload-pinned", "zero3_offload")
    assert weights["storages"] == 1
    assert weights["released"] == weights["total"] > 50
    unpinned, apart = train_released("zero3_offload-unpinned", "zero3_offload", offload_param={"device": "cpu"})
    assert apart["storages"] > 50
    assert losses(run) == losses(unpinned)
    expected = adapter(unpinned)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter(run).items())


def test_metrics_of_every_step(train_once):
    lines = metrics(train_once("zero2", "zero2"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        for name in ("train/loss", "train/lr", "train/grad_norm", "perf/step_s", "perf/data_wait_s",
                     "perf/samples_per_s", "perf/tokens_per_s", "perf/peak_memory_gb"):  # fmt: skip
            assert line[name] >= 0
        assert any(name.startswith("train/loss/bucket=") for name in line)
        assert any(name.startswith("train/loss/t_q") for name in line)
    assert [line["train/lr"] for line in lines][:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert lines[-1]["train/lr"] == pytest.approx(0)

"""The memory check: the bucket that it trains, that it leaves no trace, and the error if the bucket does not fit."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from cogds.config.loading import load_config
from cogds.core.geometry import ClipShape
from cogds.core.memory import ZeroSettings
from cogds.distributed.world import World
from cogds.errors import BugReported, UserError
from cogds.train.memory_check import MemoryCheck, _missing_bytes, check_memory
from cogds.train.tuning import BucketExecution, Execution
from tests.published_model import LORA, V15, published_memory

BUCKETS = (ClipShape(9, 64, 96), ClipShape(17, 64, 96), ClipShape(81, 768, 1360))


class Model(torch.nn.Module):
    """A model with one trainable number, which records its calls. error: raised by each forward pass."""

    def __init__(self, error=None):
        super().__init__()
        self.weight, self.error, self.modes, self.shapes = torch.nn.Parameter(torch.ones(())), error, [], []

    def set_checkpointing(self, mode):
        self.modes.append(mode)

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        torch.rand(3)  # as dropout would
        if self.error:
            raise self.error
        return (x * self.weight,)


class Builder:
    device, empty_caption_states, alphas_cumprod = torch.device("cpu"), torch.zeros(226, 8), torch.ones(1000)

    def with_random_conditions(self, batch, _shape):
        return batch

    def largest_mode(self, _shape):
        return "first"

    def build(self, batch, shape, draws):
        assert batch["first_frame"].shape[-2:] == (shape.height, shape.width)
        assert draws.timesteps.tolist() == [500] * len(batch["moments"])
        return {"x": batch["moments"].float()}, torch.zeros(batch["moments"].shape)


def make_run(stage, error=None, memory_check="on", sequence_size=1):
    """Return a run whose largest bucket has no clips, its engine and its builder."""
    cfg, _ = load_config(None, ["model.path=unused", "data.path=unused", f"train.memory_check={memory_check}"])
    memory = published_memory(zero=ZeroSettings(stage=stage), buckets=())
    sizes = (1, 2, 1)
    parts = [BucketExecution("full", memory.estimate(shape, size, "full")) for shape, size in zip(BUCKETS, sizes)]
    run = SimpleNamespace(
        cfg=cfg, world=World(0, 1, 0, 1, sequence_size), buckets=BUCKETS, model=SimpleNamespace(geometry=V15),
        used_buckets=[(0, BUCKETS[0], parts[0]), (1, BUCKETS[1], parts[1])],
        ds_config={"zero_optimization": {"stage": stage}}, plan=SimpleNamespace(local_batch_sizes=sizes),
        execution=Execution("torch", False, tuple(parts), 24e9),
    )  # fmt: skip
    engine = SimpleNamespace(
        module=Model(error), device=torch.device("cpu"), torch_autocast_enabled=lambda: False,
        torch_autocast_dtype=lambda: None,
        optimizer=SimpleNamespace(parameter_offload=SimpleNamespace(release_backward_leftovers=lambda: None)),
    )  # fmt: skip
    return run, engine, Builder()


@pytest.mark.parametrize("stage, num_passes", [(2, 1), (3, 2)])
def test_the_largest_bucket_that_has_clips_is_tried_and_leaves_no_trace(stage, num_passes):
    run, engine, builder = make_run(stage)
    before = torch.get_rng_state()
    result = check_memory(run, engine, builder)
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.module.weight.grad is None
    assert engine.module.modes == ["full"]
    assert engine.module.shapes == [(2, 32, 5, 8, 12)] * num_passes
    assert (result.shape, result.batch_size, result.checkpointing) == (BUCKETS[1], 2, "full")
    assert result.predicted_bytes == run.execution.buckets[1].estimate.total_bytes - 1_000_000_000
    assert set(result.scalars()) == {"memory/predicted_gb"}
    assert "17x64x96" in str(result)


def test_it_runs_only_on_gpus_by_default():
    assert check_memory(*make_run(2, memory_check="auto")) is check_memory(*make_run(2, memory_check="off")) is None


@pytest.mark.parametrize("stage, sequence_size", [(2, 1), (3, 1), (2, 2)])
def test_a_bucket_that_does_not_fit_is_a_user_error(stage, sequence_size):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more")
    run, engine, builder = make_run(stage, error, sequence_size=sequence_size)
    with pytest.raises(UserError) as raised:
        check_memory(run, engine, builder)
    text = str(raised.value)
    assert all(part in text for part in ("17x64x96", "batch size 2", "activation checkpointing full", "rank 0"))
    assert "20 GiB" in text
    assert "24.0 GB" in text
    with pytest.raises(RuntimeError, match="another thing"):
        check_memory(*make_run(stage, RuntimeError("another thing"), sequence_size=sequence_size))


def test_all_ranks_raise_if_one_does_not_fit(monkeypatch):
    monkeypatch.setattr("cogds.train.memory_check.any_rank", lambda *_: (True, False, False))
    with pytest.raises(UserError, match="another rank"):
        check_memory(*make_run(2))


def test_any_other_error_ends_all_ranks(monkeypatch):
    votes, has_bug = [], True

    def any_rank(_world, *flags):
        votes.append(flags)
        return False, True, has_bug

    monkeypatch.setattr("cogds.train.memory_check.any_rank", any_rank)
    error = ValueError("a defect")
    with pytest.raises(ValueError, match="a defect") as raised:
        check_memory(*make_run(2, error))
    assert raised.value is error
    with pytest.raises(BugReported, match="17x64x96"):
        check_memory(*make_run(2))
    assert votes == [(False, True, True), (False, False, False)]
    # At stage 3, a failed rank misses collectives of the pass, so the ranks cannot vote.
    with pytest.raises(ValueError, match="a defect"):
        check_memory(*make_run(3, error))
    assert len(votes) == 2
    # A UserError on one rank is a UserError on all ranks, which then end with code 2.
    has_bug = False
    with pytest.raises(UserError, match="a setting"):
        check_memory(*make_run(2, UserError("a setting")))
    with pytest.raises(UserError) as raised:
        check_memory(*make_run(2))
    assert raised.value.shared
    assert votes[2:] == [(False, True, False), (False, False, False)]


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    "stage, state, missing",
    # Of the optimizer's 12 bytes per parameter, 4 are the master weight, which exists from the start.
    [(1, {}, 8_570), (2, {}, 8_570), (3, {}, 8_000), (2, {"resumed": 1}, 570), (3, {"resumed": 1}, 0)],
)
def test_memory_that_the_first_steps_allocate_is_reserved(stage, state, missing):
    estimate = SimpleNamespace(
        optimizer_state_bytes=12_000, reduce_buffers_bytes=500, trained_gradients_bytes=70, clip_encode_bytes=0
    )
    engine = SimpleNamespace(device=GPU, basic_optimizer=SimpleNamespace(state=state))
    assert _missing_bytes(estimate, engine, stage) == missing
    estimate.clip_encode_bytes = 3
    assert _missing_bytes(estimate, engine, stage) == missing + 3
    engine.device = torch.device("cpu")
    assert _missing_bytes(estimate, engine, stage) == 0


@pytest.mark.parametrize("stage, num_passes", [(2, 1), (3, 2)])
def test_the_peak_on_a_gpu_is_measured_and_reset_before_the_first_step(monkeypatch, stage, num_passes):
    """Records the calls to torch.cuda, on a CPU."""
    run, engine, builder = make_run(stage)
    events, empty = [], torch.empty
    run.world = SimpleNamespace(device=GPU, rank=0, size=1, sequence_size=1)
    engine.device = GPU
    engine.basic_optimizer = SimpleNamespace(state={})
    engine.module.register_forward_hook(lambda *_: events.append("pass"))

    def allocate(*size, device=None, **options):
        if device == GPU:
            events.append(size)
        return empty(*size if device != GPU else (0,), **options)

    def peak(device):
        assert device == GPU
        events.append("measured")
        return 5_000_000_000

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.random, "fork_rng", lambda _devices: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append(f"reset {device}"))
    result = check_memory(run, engine, builder)
    missing = _missing_bytes(run.execution.buckets[1].estimate, engine, stage)
    assert missing >= 8 * LORA.num_parameters
    assert events == ["reset cuda", (missing,), *["pass"] * num_passes, "measured", "reset cuda"]
    assert result.measured_bytes == 5_000_000_000
    assert result.scalars()["memory/measured_gb"] == 5.0
    assert "5.0 GB" in str(result)


def test_the_prediction_is_compared_with_the_measurement():
    check = MemoryCheck(ClipShape(81, 768, 1360), 1, "selective", 44_000_000_000, 40_000_000_000, 31.5)
    assert all(part in str(check) for part in ("81x768x1360", "selective", "40.0 GB", "44.0 GB", "+10%"))
    assert check.scalars() == {"memory/predicted_gb": 44.0, "memory/measured_gb": 40.0}

"""The memory check: which bucket is tried, that it leaves no trace, and the error if it does not fit."""

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
    """One trainable number. error: raised by each forward pass."""

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

    def build(self, batch, shape, draws):
        assert batch["first_frame"].shape[-2:] == (shape.height, shape.width)
        assert draws.timesteps.tolist() == [500] * len(batch["moments"])
        return {"x": batch["moments"].float()}, torch.zeros(batch["moments"].shape)


def stage(number, error=None, memory_check="on", sequence_size=1):
    """A run whose largest bucket has no clips, its engine and builder."""
    cfg, _ = load_config(None, ["model.path=unused", "data.path=unused", f"train.memory_check={memory_check}"])
    memory = published_memory(zero=ZeroSettings(stage=number), buckets=())
    sizes = (1, 2, 1)
    parts = [BucketExecution("full", memory.estimate(shape, size, "full")) for shape, size in zip(BUCKETS, sizes)]
    run = SimpleNamespace(
        cfg=cfg, world=World(0, 1, 0, 1, sequence_size), buckets=BUCKETS, model=SimpleNamespace(geometry=V15),
        used_buckets=[(0, BUCKETS[0], parts[0]), (1, BUCKETS[1], parts[1])],
        ds_config={"zero_optimization": {"stage": number}}, plan=SimpleNamespace(local_batch_sizes=sizes),
        execution=Execution("torch", False, tuple(parts), 24e9),
    )  # fmt: skip
    engine = SimpleNamespace(
        module=Model(error), device=torch.device("cpu"), torch_autocast_enabled=lambda: False,
        torch_autocast_dtype=lambda: None,
        optimizer=SimpleNamespace(parameter_offload=SimpleNamespace(release_backward_leftovers=lambda: None)),
    )  # fmt: skip
    return run, engine, Builder()


@pytest.mark.parametrize("number, passes", [(2, 1), (3, 2)])
def test_the_largest_bucket_that_has_clips_is_tried_and_leaves_no_trace(number, passes):
    run, engine, builder = stage(number)
    before = torch.get_rng_state()
    result = check_memory(run, engine, builder)
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.module.weight.grad is None
    assert engine.module.modes == ["full"]
    assert engine.module.shapes == [(2, 32, 5, 8, 12)] * passes
    assert (result.shape, result.batch_size, result.checkpointing) == (BUCKETS[1], 2, "full")
    assert result.predicted_bytes == run.execution.buckets[1].estimate.total_bytes - 1_000_000_000
    assert set(result.scalars()) == {"memory/predicted_gb"}
    assert "17x64x96" in str(result)


def test_it_runs_only_on_gpus_by_default():
    assert check_memory(*stage(2, memory_check="auto")) is check_memory(*stage(2, memory_check="off")) is None


@pytest.mark.parametrize("number, sequence", [(2, 1), (3, 1), (2, 2)])
def test_a_bucket_that_does_not_fit_is_a_user_error(number, sequence):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more")
    run, engine, builder = stage(number, error, sequence_size=sequence)
    with pytest.raises(UserError) as raised:
        check_memory(run, engine, builder)
    text = str(raised.value)
    assert all(part in text for part in ("17x64x96", "batch size 2", "train.activation_checkpointing=full", "rank 0"))
    assert "20 GiB" in text
    assert "24.0 GB" in text
    with pytest.raises(RuntimeError, match="another thing"):
        check_memory(*stage(number, RuntimeError("another thing"), sequence_size=sequence))


def test_all_ranks_raise_if_one_does_not_fit(monkeypatch):
    monkeypatch.setattr("cogds.train.memory_check.any_rank", lambda *_: (True, False, False))
    with pytest.raises(UserError, match="another rank"):
        check_memory(*stage(2))


def test_any_other_error_ends_all_ranks(monkeypatch):
    """The others would otherwise wait for its vote forever."""
    votes, has_bug = [], True

    def vote(_world, *flags):
        votes.append(flags)
        return False, True, has_bug

    monkeypatch.setattr("cogds.train.memory_check.any_rank", vote)
    error = ValueError("a defect")
    with pytest.raises(ValueError, match="a defect") as raised:
        check_memory(*stage(2, error))
    assert raised.value is error
    with pytest.raises(BugReported, match="17x64x96"):
        check_memory(*stage(2))
    assert votes == [(False, True, True), (False, False, False)]
    # At stage 3 a pass is full of collectives, so no vote is reached.
    with pytest.raises(ValueError, match="a defect"):
        check_memory(*stage(3, error))
    assert len(votes) == 2
    # A user's error on one rank is a user's error on all: they end with code 2.
    has_bug = False
    with pytest.raises(UserError, match="a setting"):
        check_memory(*stage(2, UserError("a setting")))
    with pytest.raises(UserError) as raised:
        check_memory(*stage(2))
    assert raised.value.shared
    assert votes[2:] == [(False, True, False), (False, False, False)]


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    "number, state, missing",
    # Of the optimizer's 12 bytes per parameter, 4 are the master weight, which exists from the start.
    [(1, {}, 8_570), (2, {}, 8_570), (3, {}, 8_000), (2, {"resumed": 1}, 570), (3, {"resumed": 1}, 0)],
)
def test_memory_that_the_first_steps_allocate_is_reserved(number, state, missing):
    estimate = SimpleNamespace(optimizer_state_bytes=12_000, reduce_buffers_bytes=500, lora_gradients_bytes=70)
    engine = SimpleNamespace(device=GPU, basic_optimizer=SimpleNamespace(state=state))
    assert _missing_bytes(estimate, engine, number) == missing
    engine.device = torch.device("cpu")
    assert _missing_bytes(estimate, engine, number) == 0


@pytest.mark.parametrize("number, passes", [(2, 1), (3, 2)])
def test_the_peak_on_a_gpu_is_measured_and_reset_before_the_first_step(monkeypatch, number, passes):
    """The calls to torch.cuda, in order, on a CPU in place of the GPU."""
    run, engine, builder = stage(number)
    events, empty = [], torch.empty
    run.world = SimpleNamespace(device=GPU, rank=0, size=1, sequence_size=1)
    engine.device = GPU
    engine.basic_optimizer = SimpleNamespace(state={})
    engine.module.register_forward_hook(lambda *_: events.append("pass"))

    def taken(*size, device=None, **options):
        if device == GPU:
            events.append(size)
        return empty(*size if device != GPU else (0,), **options)

    def peak(device):
        assert device == GPU
        events.append("measured")
        return 5_000_000_000

    monkeypatch.setattr(torch, "empty", taken)
    monkeypatch.setattr(torch.random, "fork_rng", lambda _devices: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append(f"{device} from zero"))
    result = check_memory(run, engine, builder)
    missing = _missing_bytes(run.execution.buckets[1].estimate, engine, number)
    assert missing >= 8 * LORA.num_parameters
    assert events == ["cuda from zero", (missing,), *["pass"] * passes, "measured", "cuda from zero"]
    assert result.measured_bytes == 5_000_000_000
    assert result.scalars()["memory/measured_gb"] == 5.0
    assert "5.0 GB" in str(result)


def test_the_prediction_is_compared_with_the_measurement():
    check = MemoryCheck(ClipShape(81, 768, 1360), 1, "selective", 44_000_000_000, 40_000_000_000, 31.5)
    assert all(part in str(check) for part in ("81x768x1360", "selective", "40.0 GB", "44.0 GB", "+10%"))
    assert check.scalars() == {"memory/predicted_gb": 44.0, "memory/measured_gb": 40.0}

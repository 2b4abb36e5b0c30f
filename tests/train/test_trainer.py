"""Optimizer steps of one rank with an engine that records its calls, and the callbacks. tests/dist has real runs."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch

from cogds.config.loading import load_config
from cogds.core.diffusion import stratified_timesteps
from cogds.core.plan import Plan
from cogds.data.loading.dataset import Batch
from cogds.distributed.world import World
from cogds.train.batches import Prefetcher, make_draws, make_micro_steps
from cogds.train.callbacks import TrainContext, due_after, due_at_start, run_callbacks
from cogds.train.step import draw_dropouts
from cogds.train.trainer import train_step
from cogds.train.tuning import BucketExecution, Execution

# A step has two micro-steps and trains all eight clips: six of bucket 0, two on each of three ranks, and two of bucket
# 1, where ranks 0 and 2 train the same clip.
PLAN = Plan((6, 2), (2, 2), world_size=3, accumulation=2, seed=0)
# The target of each clip. The prediction is 0, so the clip's loss is the square of the target.
TARGETS = ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (7.0, 8.0))
MEAN_LOSS = sum(target**2 for bucket in TARGETS for target in bucket) / 8
# Each pair of ranks shares a clip.
SIX_RANKS = [World(rank, 6, rank, 6, sequence_size=2) for rank in range(6)]
CHECKPOINTING_MODES = ("checkpointing of bucket 0", "checkpointing of bucket 1")
EXECUTION = Execution("torch", False, tuple(BucketExecution(mode, None) for mode in CHECKPOINTING_MODES))


class Engine:
    """An engine whose only weight is 0. It predicts that weight, and records its calls."""

    def __init__(self):
        self.weight = torch.zeros((), requires_grad=True)
        self.optimizer = SimpleNamespace(param_groups=[{"lr": math.nan}])
        self.module = SimpleNamespace(set_checkpointing=functools.partial(setattr, self, "checkpointing"))
        # One entry per micro-step: (bucket, checkpointing mode), a random number, the loss, the learning rate.
        self.modes, self.numbers, self.losses, self.rates = [], [], [], []

    def __call__(self, timestep, bucket):
        self.modes.append((bucket, self.checkpointing))
        self.numbers.append(torch.rand(()).item())
        return [self.weight.expand(len(timestep), 1)]

    def backward(self, loss):
        self.losses.append(loss.item())
        loss.backward()

    def step(self):
        self.rates.append(self.optimizer.param_groups[0]["lr"])

    def was_step_applied(self):
        gradient, self.weight.grad = self.weight.grad, None
        return math.isfinite(gradient)

    def get_global_grad_norm(self):
        return 0.0


def make_config(*overrides):
    return load_config(None, ["model.path=m", "data.path=d", "train.num_steps=5", *overrides])[0]


def run_of(world, *overrides, plan=PLAN, first_step=0):
    return SimpleNamespace(
        cfg=make_config(*overrides), world=world, plan=plan, first_step=first_step, buckets=(0, 1),
        execution=EXECUTION, data=SimpleNamespace(index=()),
        clips=lambda _: ["a.mp4"],
    )  # fmt: skip


def batches(run, targets=TARGETS):
    """Yield batches with the targets of their clips."""
    rank = run.world.data_rank
    for step in range(run.first_step, run.cfg.train.num_steps):
        for micro_batch in run.plan.at(step):
            bucket_targets = targets[micro_batch.bucket_of(rank)]
            yield Batch({"target": torch.tensor([[bucket_targets[clip]] for clip in micro_batch.clips_of(rank)])})


BUILDER = SimpleNamespace(
    alphas_cumprod=range(1000),
    build=lambda batch, bucket, draws: ({"timestep": draws.timesteps, "bucket": bucket}, batch["target"]),
)
METER = SimpleNamespace(begin=lambda _: None, before_update=lambda _: None, finish_step=lambda *_: ({}, None, None))
BAD_SAMPLES = SimpleNamespace(add=lambda _: None, sync=lambda: None)


class Monitor:
    """Records the learning rate and this rank's share of the loss of each step."""

    def __init__(self):
        self.rates, self.shares = [], []

    def add_step(self, _step, scalars, losses, _rank_values, _norms):
        self.rates.append(scalars["train/lr"])
        self.shares.append(losses.vector[0].item())


def train(run, targets=TARGETS):
    """Run all steps. Returns the engine, the monitor, and the bad clips of each step."""
    context = TrainContext(run, Engine(), BUILDER, Monitor())
    prefetcher = Prefetcher(make_micro_steps(run, BUILDER, batches(run, targets)))
    steps = range(run.first_step, run.cfg.train.num_steps)
    bad_clips = [train_step(context, prefetcher, step, BAD_SAMPLES, METER) for step in steps]
    return context.engine, context.monitor, bad_clips


@pytest.fixture(autouse=True)
def _on_cpus(monkeypatch):
    monkeypatch.setattr(World, "device", torch.device("cpu"))


def test_the_recorded_learning_rate_is_that_of_the_optimizer():
    schedule = ["optimizer.lr=8", "optimizer.schedule=linear", "optimizer.warmup_steps=1", "optimizer.final_lr_ratio=0"]
    engine, monitor, _ = train(run_of(World(0, 3, 0, 3), *schedule))
    assert monitor.rates == pytest.approx([4, 8, 8 * 2 / 3, 8 / 3, 0])
    assert engine.rates[1::2] == monitor.rates


def test_every_clip_of_a_step_has_the_same_weight_over_all_ranks():
    """Even if two ranks train the same clip. DeepSpeed divides by the micro-steps and averages over the ranks."""
    ranks = [train(run_of(world)) for world in SIX_RANKS]
    for step in range(5):
        losses = [loss for engine, _, _ in ranks for loss in engine.losses[2 * step : 2 * step + 2]]
        assert sum(losses) / PLAN.accumulation / len(ranks) == pytest.approx(MEAN_LOSS)
        assert sum(monitor.shares[step] for _, monitor, _ in ranks) == pytest.approx(MEAN_LOSS)


def test_every_forward_pass_has_its_own_random_numbers_also_after_resuming():
    """They depend on the rank (even among ranks that share a clip), the step, the micro-step and the seed."""
    runs = [run_of(world, seed) for world in SIX_RANKS for seed in ("seed=1", "seed=2")]
    numbers = [train(run)[0].numbers for run in runs]
    assert len({number for run_numbers in numbers for number in run_numbers}) == 2 * 6 * 5 * 2
    for world, run_numbers in zip(SIX_RANKS, numbers[::2]):
        assert train(run_of(world, "seed=1", first_step=2))[0].numbers == run_numbers[2 * 2 :]


def test_a_forward_pass_uses_the_activation_checkpointing_of_its_bucket():
    engine, *_ = train(run_of(World(0, 3, 0, 3)))
    assert set(engine.modes) == set(enumerate(CHECKPOINTING_MODES))


@pytest.mark.parametrize("image, caption", [(1, 0), (0.5, 0.5)])
@pytest.mark.parametrize("world", SIX_RANKS)
def test_the_draws_belong_to_the_slots_of_the_rank(world, image, caption):
    cfg = make_config("seed=5", f"conditioning.image_dropout={image}", f"conditioning.caption_dropout={caption}")
    for step in range(4):
        for micro_batch in PLAN.at(step):
            draws, slots = make_draws(micro_batch, step, 1000, cfg, world), micro_batch.slots_of(world.data_rank)
            assert (draws.seed, draws.step, draws.slots) == (5, step, slots)
            assert torch.equal(draws.timesteps, stratified_timesteps(slots, micro_batch.step_slots, 1000, 5, step))
            dropped = draw_dropouts(cfg.conditioning, 5, step, slots)
            assert all(map(torch.equal, (draws.drop_image, draws.drop_caption), dropped))
            if image == 1:
                assert draws.drop_image.all()
                assert not draws.drop_caption.any()


def test_an_infinite_loss_makes_the_gradient_infinite_and_its_clip_is_named():
    weight = torch.zeros((), requires_grad=True)
    loss = (weight - 1e20).square()
    loss.backward()
    assert math.isinf(loss.item())
    assert math.isfinite(weight.grad)
    plan = Plan((5,), (1,), 1, 1, 0)
    targets = [1.0] * 5
    (clip,) = plan.at(2)[0].clips_of(0)
    targets[clip] = 1e20
    _, monitor, bad = train(run_of(World(0, 1, 0, 1), plan=plan), [targets])
    assert [len(clips) for clips in bad] == [0, 0, 1, 0, 0]
    assert "a.mp4" in bad[2][0]
    assert monitor.shares == [1, 1, math.inf, 1, 1]


@pytest.fixture
def gpu(monkeypatch):
    """The allocator of a GPU: bytes in use, and their peak since the last reset."""
    memory = SimpleNamespace(held=4e9, peak=9e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: memory.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: setattr(memory, "peak", memory.held))
    monkeypatch.setattr(World, "device", torch.device("cuda", 0))
    return memory


class Callback:
    """Raises the peak memory to a number of bytes."""

    def __init__(self, memory, num_bytes):
        self.name, self._memory, self._num_bytes = f"using {num_bytes}", memory, num_bytes

    def run(self, _step):
        self._memory.peak = max(self._memory.peak, self._num_bytes)


def run_after_step_5(*callbacks):
    """Return what is recorded, and the descriptions for the watchdog."""
    scalars, watched = [], []
    monitor = SimpleNamespace(add_scalars=lambda *args: scalars.append(args))
    watchdog = SimpleNamespace(watch=lambda describe: watched.append(describe()))
    run_callbacks(callbacks, 5, watchdog, monitor, World(0, 1, 0, 1))
    return scalars, watched


def test_the_peak_memory_of_callbacks_is_recorded_separately(gpu):
    scalars, watched = run_after_step_5(Callback(gpu, 6_000_000_000), Callback(gpu, 5_000_000_000))
    assert scalars == [(5, {"callbacks/peak_memory_gb": 6.0})]  # not the 9 GB of training before
    assert gpu.peak == 4e9
    assert watched == ["using 6000000000 after step 5", "using 5000000000 after step 5"]


def test_without_callbacks_nothing_is_recorded(gpu):
    assert run_after_step_5() == ([], [])
    assert gpu.peak == 9e9


def test_no_peak_is_recorded_on_a_cpu():
    assert run_after_step_5(Callback(SimpleNamespace(peak=0), 1))[0] == []


EVALUATING = SimpleNamespace(name="evaluating", every=4, at_start=True, on_stop=False)
SAVING = SimpleNamespace(name="saving", every=4, at_start=False, on_stop=True)


@pytest.mark.parametrize(
    "step, is_last, is_stopped, names",
    [
        (3, False, False, []),
        (4, False, False, ["evaluating", "saving"]),
        (3, True, False, ["evaluating", "saving"]),
        (3, False, True, ["saving"]),
        (4, False, True, ["saving"]),
    ],
)
def test_callbacks_run_at_their_interval_and_at_the_end_and_a_stopped_run_only_saves(step, is_last, is_stopped, names):
    due = due_after([EVALUATING, SAVING], step, is_last=is_last, is_stopped=is_stopped)
    assert [callback.name for callback in due] == names


def test_callbacks_run_at_the_start_if_they_are_due_there():
    assert [due_at_start([EVALUATING, SAVING], step) for step in (0, 3, 4)] == [[EVALUATING], [], [EVALUATING]]

"""The steps of one rank with an engine that records its calls, and the callbacks.

A step sets the learning rate, the plan's weights, the random draws, torch's global seed and the bucket's activation
checkpointing, and makes the gradient not finite if the loss is not. Real runs in tests/dist show that a model learns.
"""

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
from cogds.train.callbacks import run_callbacks
from cogds.train.step import draw_dropouts
from cogds.train.trainer import train_step
from cogds.train.tuning import BucketExecution, Execution

# A step is two micro-steps and all eight clips: six of bucket 0, in twos on three ranks, and two of bucket 1, where
# ranks 0 and 2 train copies of one.
PLAN = Plan((6, 2), (2, 2), world_size=3, accumulation=2, seed=0)
# The target of each clip. The prediction is 0, so the clip's loss is the square of the target.
TARGETS = ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (7.0, 8.0))
MEAN_LOSS = sum(target**2 for bucket in TARGETS for target in bucket) / 8
# Each pair of ranks shares a clip.
SIX_RANKS = [World(rank, 6, rank, 6, sequence_size=2) for rank in range(6)]
CHECKPOINTING_MODES = ("checkpointing of bucket 0", "checkpointing of bucket 1")
EXECUTION = Execution("torch", False, tuple(BucketExecution(mode, None) for mode in CHECKPOINTING_MODES))


class Engine:
    """An engine with one weight, 0, which is every prediction."""

    def __init__(self):
        self.weight = torch.zeros((), requires_grad=True)
        self.optimizer = SimpleNamespace(param_groups=[{"lr": math.nan}])
        self.module = SimpleNamespace(set_checkpointing=functools.partial(setattr, self, "checkpointing"))
        # One entry per micro-step: (bucket, checkpointing), a random number, the loss, the learning rate.
        self.ran, self.drawn, self.losses, self.rates = [], [], [], []

    def __call__(self, timestep, bucket):
        self.ran.append((bucket, self.checkpointing))
        self.drawn.append(torch.rand(()).item())
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


def configured(*overrides):
    return load_config(None, ["model.path=m", "data.path=d", "train.num_steps=5", *overrides])[0]


def run_of(world, *overrides, plan=PLAN, first_step=0):
    return SimpleNamespace(
        cfg=configured(*overrides), world=world, plan=plan, first_step=first_step, buckets=(0, 1),
        execution=EXECUTION, data=SimpleNamespace(index=()),
        clips=lambda _: ["a.mp4"],
    )  # fmt: skip


def batches(run, targets=TARGETS):
    """Batches with the target of each clip."""
    for step in range(run.first_step, run.cfg.train.num_steps):
        for micro in run.plan.at(step):
            own = targets[micro.bucket_of(run.world.data_rank)]
            yield Batch({"target": torch.tensor([[own[clip]] for clip in micro.clips_of(run.world.data_rank)])})


BUILDER = SimpleNamespace(
    alphas_cumprod=range(1000),
    build=lambda batch, bucket, draws: ({"timestep": draws.timesteps, "bucket": bucket}, batch["target"]),
)
METER = SimpleNamespace(begin=lambda _: None, before_update=lambda _: None, finish_step=lambda *_: ({}, None, None))
BAD_SAMPLES = SimpleNamespace(add=lambda _: None, sync=lambda: None)


class Monitor:
    """Keeps the learning rate and this rank's share of the loss of each step."""

    def __init__(self):
        self.rates, self.shares = [], []

    def add_step(self, _step, scalars, losses, _own, _norms):
        self.rates.append(scalars["train/lr"])
        self.shares.append(losses.vector[0].item())

    def flush(self):
        pass

    close = flush


def trained(run):
    """The engine and the monitor after all of a run's steps."""
    engine, monitor, prefetcher = Engine(), Monitor(), Prefetcher(make_micro_steps(run, BUILDER, batches(run)))
    for step in range(run.first_step, run.cfg.train.num_steps):
        train_step(run, engine, prefetcher, step, monitor, BAD_SAMPLES, METER)
    return engine, monitor


@pytest.fixture(autouse=True)
def _on_cpus(monkeypatch):
    monkeypatch.setattr(World, "device", torch.device("cpu"))


def test_the_recorded_learning_rate_is_that_of_the_optimizer():
    schedule = ["optimizer.lr=8", "optimizer.schedule=linear", "optimizer.warmup_steps=1", "optimizer.final_lr_ratio=0"]
    engine, monitor = trained(run_of(World(0, 3, 0, 3), *schedule))
    assert monitor.rates == pytest.approx([4, 8, 8 * 2 / 3, 8 / 3, 0])
    assert engine.rates[1::2] == monitor.rates


def test_every_clip_of_a_step_has_the_same_weight_over_all_ranks():
    """Even if two ranks train the same clip. DeepSpeed divides by the micro-steps and averages over the ranks."""
    everyone = [trained(run_of(world)) for world in SIX_RANKS]
    for step in range(5):
        losses = [loss for engine, _ in everyone for loss in engine.losses[2 * step : 2 * step + 2]]
        assert sum(losses) / PLAN.accumulation / len(everyone) == pytest.approx(MEAN_LOSS)
        assert sum(monitor.shares[step] for _, monitor in everyone) == pytest.approx(MEAN_LOSS)


def test_every_forward_pass_has_its_own_random_numbers_also_after_resuming():
    """They depend on the rank, also among ranks that share a clip, the step, the micro-step and the run's seed."""
    runs = [run_of(world, seed) for world in SIX_RANKS for seed in ("seed=1", "seed=2")]
    drawn = [trained(run)[0].drawn for run in runs]
    numbers = [number for of_one in drawn for number in of_one]
    assert len(set(numbers)) == len(numbers) == 2 * 6 * 5 * 2
    for world, whole in zip(SIX_RANKS, drawn[::2]):
        assert trained(run_of(world, "seed=1", first_step=2))[0].drawn == whole[2 * 2 :]


def test_a_forward_pass_uses_the_activation_checkpointing_of_its_bucket():
    engine, _ = trained(run_of(World(0, 3, 0, 3)))
    assert set(engine.ran) == set(enumerate(CHECKPOINTING_MODES))


@pytest.mark.parametrize("image, caption", [(1, 0), (0.5, 0.5)])
@pytest.mark.parametrize("world", SIX_RANKS)
def test_the_draws_are_those_of_the_ranks_slots(world, image, caption):
    cfg = configured("seed=5", f"conditioning.image_dropout={image}", f"conditioning.caption_dropout={caption}")
    for step in range(4):
        for micro in PLAN.at(step):
            draws, slots = make_draws(micro, step, 1000, cfg, world), micro.slots_of(world.data_rank)
            assert (draws.seed, draws.step, draws.slots) == (5, step, slots)
            assert torch.equal(draws.timesteps, stratified_timesteps(slots, micro.step_slots, 1000, 5, step))
            dropped = draw_dropouts(cfg.conditioning, 5, step, slots)
            assert all(map(torch.equal, (draws.drop_image, draws.drop_caption), dropped))
            if image == 1:
                assert draws.drop_image.all()
                assert not draws.drop_caption.any()


def test_an_infinite_loss_makes_the_gradient_infinite_and_its_clip_is_logged(caplog):
    weight = torch.zeros((), requires_grad=True)
    loss = (weight - 1e20).square()
    loss.backward()
    assert math.isinf(loss.item())
    assert math.isfinite(weight.grad)
    plan = Plan((5,), (1,), 1, 1, 0)
    targets = [1.0] * 5
    (clip,) = plan.at(2)[0].clips_of(0)
    targets[clip] = 1e20
    run, engine, monitor = run_of(World(0, 1, 0, 1), plan=plan), Engine(), Monitor()
    prefetcher = Prefetcher(make_micro_steps(run, BUILDER, batches(run, [targets])))
    with caplog.at_level("INFO", "cogds"):
        bad = [train_step(run, engine, prefetcher, step, monitor, BAD_SAMPLES, METER) for step in range(5)]
    assert [len(clips) for clips in bad] == [0, 0, 1, 0, 0]
    assert "a.mp4" in bad[2][0]
    assert monitor.shares == [1, 1, math.inf, 1, 1]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU's allocator: bytes in use, and the peak since the last reset."""
    memory = SimpleNamespace(held=4e9, peak=9e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: memory.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: setattr(memory, "peak", memory.held))
    monkeypatch.setattr(World, "device", torch.device("cuda", 0))
    return memory


def callback(memory, peak):
    run = lambda _: setattr(memory, "peak", max(memory.peak, peak))  # noqa: E731
    return SimpleNamespace(name=f"doing {peak}", every=1, at_start=True, on_stop=False, run=run)


def notes_of(callbacks):
    notes, watched = [], []
    monitor = SimpleNamespace(add_scalars=lambda step, scalars: notes.append((step, scalars)))
    watchdog = SimpleNamespace(watch=lambda describe: watched.append(describe()))
    run_callbacks(callbacks, 5, watchdog, monitor, World(0, 1, 0, 1))
    return notes, watched


def test_the_peak_memory_of_callbacks_is_recorded_separately(gpu):
    notes, watched = notes_of([callback(gpu, 6e9), callback(gpu, 5e9)])
    assert notes == [(5, {"callbacks/peak_memory_gb": 6.0})]  # not the 9 GB of training before
    assert gpu.peak == 4e9
    assert watched == ["doing 6000000000.0 after step 5", "doing 5000000000.0 after step 5"]


def test_without_callbacks_nothing_is_recorded(gpu):
    assert notes_of([]) == ([], [])
    assert gpu.peak == 9e9


def test_no_peak_is_recorded_on_a_cpu():
    assert notes_of([callback(SimpleNamespace(peak=0), 1)])[0] == []

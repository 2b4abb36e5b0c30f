"""The largest bucket, tried before the first step: a run that cannot fit fails in its first minute, not in its tenth
hour, when it first meets that bucket.

One forward and backward pass on random numbers, by all ranks together, which leaves no trace: the engine's module is
called and not the engine, and the gradients are returned (`torch.autograd.grad`) and not accumulated, so that none of
DeepSpeed's hooks on parameters runs, nothing is reduced and no micro-step is counted. At stage 3 DeepSpeed also has a
hook on each block, for the gradients of its parameters; it is put aside. What is left of it there is the order of the
blocks, which DeepSpeed records in its first pass, and which is the same in every one.
"""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cogds.core.diffusion import v_loss
from cogds.core.geometry import ClipShape
from cogds.core.memory import MemoryEstimate
from cogds.errors import BugReported, UserError
from cogds.runtime.ds_config import zero_stage
from cogds.runtime.world import any_rank
from cogds.training.aside import call_aside
from cogds.training.execution import USABLE_SHARE
from cogds.training.loop import Run
from cogds.training.step import Draws, StepBuilder, random_batch


@dataclass(frozen=True)
class Rehearsal:
    """What one bucket took. Bytes are of tensors: without the CUDA context, and what the allocator leaves in holes.

    measured_bytes: the peak; None on a CPU, where it would be the whole process's.
    """

    shape: ClipShape
    batch_size: int
    level: str
    predicted_bytes: int
    measured_bytes: int | None
    seconds: float

    def __str__(self) -> str:
        what = f"tried {self.shape}, batch {self.batch_size}, recompute {self.level}, in {self.seconds:.1f} s"
        if self.measured_bytes is None:
            return f"{what}; no memory is measured on a CPU"
        off = self.predicted_bytes / self.measured_bytes - 1
        return (
            f"{what}: {self.measured_bytes / 1e9:.1f} GB of tensors at the peak, {self.predicted_bytes / 1e9:.1f} GB "
            f"predicted ({100 * off:+.0f}%)"
        )

    def scalars(self) -> dict[str, float]:
        """For `Monitor.note`."""
        found = {"memory/predicted_gb": self.predicted_bytes / 1e9}
        return found if self.measured_bytes is None else found | {"memory/measured_gb": self.measured_bytes / 1e9}


def rehearse(run: Run, engine: Any, builder: StepBuilder) -> Rehearsal | None:
    """Try the bucket of the run that takes most memory; None where `train.rehearse` has it left out. Collective.

    Weights, gradients, optimizer and random states are as they were. Raises UserError where memory is not enough, and
    what else goes wrong on the rank on which it does. At stages 1 and 2 all ranks raise together. At stage 3, and where
    ranks share a clip, a pass is full of collectives: the others wait in one for the rank that failed, until the
    launcher ends them with it.
    """
    cfg, world, execution = run.cfg, run.world, run.execution
    device = world.device
    if cfg.train.rehearse == "off" or (cfg.train.rehearse == "auto" and device.type != "cuda"):
        return None
    used = [bucket for bucket, sizes in enumerate(run.data.index.sizes) if sum(sizes)]
    bucket = max(used, key=lambda one: _needs(execution.estimates[one]))
    shape, size, estimate = run.buckets[bucket], run.plan.local_batch_sizes[bucket], execution.estimates[bucket]
    level, stage = execution.levels[bucket], zero_stage(run.ds_config)
    start, too_little, trouble = time.perf_counter(), "", None
    try:
        _try(run, engine, builder, bucket)
    except Exception as error:  # told below, once every rank has got here
        if is_out_of_memory(error):
            too_little = _refusal(run, bucket, error)
        else:
            trouble = error
        if stage == 3 or world.sequence > 1:
            if too_little:
                raise UserError(too_little) from None
            raise
    if stage == 3:
        engine.optimizer.parameter_offload.release_backward_leftovers()
    is_users = isinstance(trouble, UserError)
    full, failed, has_bug = any_rank(world, bool(too_little), trouble is not None, trouble is not None and not is_users)
    if trouble is not None:
        raise trouble
    elsewhere = f"another rank failed while {shape} was tried before the first step, and says why"
    if has_bug:
        raise BugReported(elsewhere)
    if failed:
        error_elsewhere = UserError(elsewhere)
        error_elsewhere.shared = True
        raise error_elsewhere
    if full:
        error_for_all = UserError(too_little or _refusal(run, bucket))
        error_for_all.shared = world.rank > 0
        raise error_for_all
    measured = None
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    predicted = estimate.total_bytes - estimate.cuda_context_bytes
    return Rehearsal(shape, size, level, predicted, measured, time.perf_counter() - start)


def _try(run: Run, engine: Any, builder: StepBuilder, bucket: int) -> None:
    """What this rank does of it."""
    device, stage, level = run.world.device, zero_stage(run.ds_config), run.execution.levels[bucket]
    shape, size, estimate = run.buckets[bucket], run.plan.local_batch_sizes[bucket], run.execution.estimates[bucket]
    text_dim = builder.no_caption_states.shape[-1]
    batch = random_batch(shape, size, run.model.geometry, text_dim, run.cfg.train.precision)
    engine.module.set_level(level)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _hooks_put_aside(engine.module, stage):
        # What the first steps add and keep: with it, the peak is that of any later step.
        later = torch.empty(_missing_bytes(estimate, engine, stage), dtype=torch.uint8, device=device)
        # At stage 3 the first pass is recorded; only from the second on are weights fetched ahead.
        for _ in range(2 if stage == 3 else 1):
            _pass(engine, builder, batch, shape, size)
        del later


def _pass(engine: Any, builder: StepBuilder, batch: dict[str, torch.Tensor], shape: ClipShape, size: int) -> None:
    """Forward and backward; the gradients are let go."""
    kept = torch.zeros(size, dtype=torch.bool)
    draws = Draws(torch.full((size,), len(builder.alphas_cumprod) // 2), kept, kept, 0, 0, range(size))
    inputs, target = builder.build(batch, shape, draws)
    output = call_aside(engine, builder.device, inputs)[0]
    parameters = [one for one in engine.module.parameters() if one.requires_grad]
    torch.autograd.grad(v_loss(output, target).mean(), parameters)
    if builder.device.type == "cuda":
        torch.cuda.synchronize(builder.device)  # what fails on the device, fails here


@contextlib.contextmanager
def _hooks_put_aside(module: torch.nn.Module, stage: int) -> Iterator[None]:
    """Inside, ZeRO-3's hooks on blocks do not run: they would make gradients of zeros where none was accumulated, and
    reduce them. Forward hooks and those that gather weights for the backward pass are others, and stay.
    """
    if stage < 3:
        yield
        return
    hooked = [(one, one._backward_hooks) for one in module.modules() if one._backward_hooks]
    try:
        for one, _ in hooked:
            one._backward_hooks = OrderedDict()
        yield
    finally:
        for one, hooks in hooked:
            one._backward_hooks = hooks


def _needs(estimate: MemoryEstimate) -> tuple[int, int]:
    """To compare buckets by: short ones may all take what the VAE takes."""
    return estimate.total_bytes, estimate.kept_activations_bytes + estimate.block_activations_bytes


def _missing_bytes(estimate: MemoryEstimate, engine: Any, stage: int) -> int:
    """Of the estimate, what DeepSpeed makes in its first steps only; 0 on a CPU.

    Adam's moments, two of the optimizer's three tensors; below stage 3 also the buffers of the reduction and the
    gradients between micro-steps.
    """
    if engine.device.type != "cuda":
        return 0
    moments = 0 if engine.optimizer.optimizer.state else estimate.optimizer_state_bytes * 2 // 3
    return moments + (estimate.reduce_buffers_bytes + estimate.lora_gradients_bytes if stage < 3 else 0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, CUDA or cuBLAS says so; only torch has a class of its own for it."""
    if not isinstance(error, RuntimeError):
        return False
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _refusal(run: Run, bucket: int, error: Exception | None = None) -> str:
    """The sentence for a bucket that does not fit. error: of this rank."""
    execution, shape, size = run.execution, run.buckets[bucket], run.plan.local_batch_sizes[bucket]
    level, estimate = execution.levels[bucket], execution.estimates[bucket]
    where = f"rank {run.world.rank}" if error is not None else "another rank"
    there = "" if execution.device_bytes is None else f" of {execution.device_bytes / 1e9:.1f} GB"
    said = f" ({str(error).splitlines()[0]})" if error is not None and str(error) else ""
    advice = execution.shortfalls[bucket] if bucket < len(execution.shortfalls) else ""
    if not advice:
        advice = (
            f"the estimate is {estimate.total_bytes / 1e9:.1f} GB{there}, of which {USABLE_SHARE:.0%} count as usable: "
            "take a level of train.recompute that keeps less, model.base=nf4, ds_configs/zero3.json on several GPUs, "
            "a smaller batch or a smaller bucket"
        )
    return (
        f"{shape}, batch {size}, with train.recompute={level} does not fit into the memory of {where}{said}, found "
        f"before the first step: {advice}"
    )

"""The memory check: trains the largest bucket once before the first step.

A run that does not fit then fails in its first minute, not when it first reaches that bucket. All ranks run one forward
and backward pass on random numbers that leaves no trace: it calls the engine's module, not the engine, and returns the
gradients (`torch.autograd.grad`) instead of accumulating them. So none of DeepSpeed's parameter hooks runs, nothing is
reduced and no micro-step is counted. At stage 3 DeepSpeed also hooks each block for the gradients of its parameters;
that hook is removed during the check. The check leaves one trace at stage 3: DeepSpeed records the order of the blocks
in its first pass. That order is the same in every pass.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from cogds.config.deepspeed import zero_stage
from cogds.core.checkpointing import BlockCheckpointing
from cogds.core.diffusion import v_loss
from cogds.core.geometry import ClipShape
from cogds.core.memory import USABLE_SHARE, MemoryEstimate
from cogds.distributed.collectives import any_rank
from cogds.distributed.deepspeed_internals import (
    has_optimizer_states,
    release_gathered_weights,
    without_zero3_backward_hooks,
)
from cogds.errors import BugReported, UserError
from cogds.model.evaluation_mode import call_module
from cogds.train.run import Run
from cogds.train.step import Draws, StepBuilder, random_batch


@dataclass(frozen=True)
class MemoryCheck:
    """The memory that one bucket needed. Bytes count tensors only, not the CUDA context and fragmentation.

    measured_bytes: peak; None on a CPU, where only the peak of the whole process is known.
    """

    shape: ClipShape
    batch_size: int
    checkpointing: BlockCheckpointing
    predicted_bytes: int
    measured_bytes: int | None
    seconds: float

    def __str__(self) -> str:
        text = (
            f"memory check: {self.shape}, batch {self.batch_size}, activation checkpointing {self.checkpointing}, "
            f"{self.seconds:.1f} s"
        )
        if self.measured_bytes is None:
            return text
        error = self.predicted_bytes / self.measured_bytes - 1
        return (
            f"{text}; peak of tensors {self.measured_bytes / 1e9:.1f} GB, predicted "
            f"{self.predicted_bytes / 1e9:.1f} GB ({100 * error:+.0f}%)"
        )

    def scalars(self) -> dict[str, float]:
        """Return tags and values for `Monitor.add_scalars`."""
        sizes = {"memory/predicted_gb": self.predicted_bytes, "memory/measured_gb": self.measured_bytes}
        return {tag: size / 1e9 for tag, size in sizes.items() if size is not None}


def check_memory(run: Run, engine: Any, builder: StepBuilder) -> MemoryCheck | None:
    """Train the bucket that needs the most memory once. Returns None if `train.memory_check` is off. Collective.

    Leaves weights, gradients, optimizer and random states unchanged. Raises UserError if there is not enough memory,
    and any other error on its own rank. At stages 1 and 2 all ranks raise together. At stage 3, or if ranks share a
    clip, the other ranks wait in a collective until the launcher ends them.
    """
    cfg, world, device = run.cfg, run.world, run.world.device
    if cfg.train.memory_check == "off" or (cfg.train.memory_check == "auto" and device.type != "cuda"):
        return None
    bucket, shape, part = max(run.used_buckets, key=lambda used: _memory_key(used[2].estimate))
    stage, start = zero_stage(run.ds_config), time.perf_counter()
    shortage, other_error = "", None
    try:
        _try(run, engine, builder, bucket)
    except Exception as error:  # raised below, once every rank has voted
        if is_out_of_memory(error):
            shortage = _describe_shortage(run, bucket, error)
        else:
            other_error = error
        if stage == 3 or world.sequence_size > 1:
            if shortage:
                raise UserError(shortage) from None
            raise
    if stage == 3:
        release_gathered_weights(engine)
    is_bug = other_error is not None and not isinstance(other_error, UserError)
    is_full, has_failed, has_bug = any_rank(world, bool(shortage), other_error is not None, is_bug)
    if other_error is not None:
        raise other_error
    elsewhere = f"memory check: another rank failed on {shape} and reports why."
    if has_bug:
        raise BugReported(elsewhere)
    if has_failed:
        raise UserError(elsewhere, shared=True)
    if is_full:
        raise UserError(shortage or _describe_shortage(run, bucket), shared=world.rank > 0)
    measured = None
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return MemoryCheck(
        shape,
        run.plan.local_batch_sizes[bucket],
        part.checkpointing,
        part.estimate.total_bytes - part.estimate.cuda_context_bytes,
        measured,
        time.perf_counter() - start,
    )


def _try(run: Run, engine: Any, builder: StepBuilder, bucket: int) -> None:
    """Run this rank's passes."""
    device, stage, part = run.world.device, zero_stage(run.ds_config), run.execution.buckets[bucket]
    shape, size, estimate = run.buckets[bucket], run.plan.local_batch_sizes[bucket], part.estimate
    text_dim = builder.empty_caption_states.shape[-1]
    batch = random_batch(shape, size, run.model.geometry, text_dim, run.cfg.train.precision)
    batch = builder.with_random_conditions(batch, shape)
    engine.module.set_checkpointing(part.checkpointing)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), without_zero3_backward_hooks(engine.module, stage):
        # Reserve what the first steps allocate and keep, so the peak is that of any later step.
        reserved = torch.empty(_missing_bytes(estimate, engine, stage), dtype=torch.uint8, device=device)
        # At stage 3 DeepSpeed records the first pass and prefetches weights from the second on.
        for _ in range(2 if stage == 3 else 1):
            _pass(engine, builder, batch, shape, size)
        del reserved


def _pass(engine: Any, builder: StepBuilder, batch: dict[str, torch.Tensor], shape: ClipShape, size: int) -> None:
    """Run forward and backward. The gradients are discarded."""
    no_dropout = torch.zeros(size, dtype=torch.bool)
    timesteps, modes = torch.full((size,), len(builder.alphas_cumprod) // 2), (builder.largest_mode(shape),) * size
    draws = Draws(timesteps, no_dropout, no_dropout, 0, 0, range(size), modes)
    inputs, target = builder.build(batch, shape, draws)
    output = call_module(engine, builder.device, inputs)[0]
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    # Training reduces a gradient as soon as it is there. To hold the gradients of all weights would take more memory.
    hooks = [parameter.register_hook(_discard) for parameter in parameters]
    try:
        torch.autograd.grad(v_loss(output, target).mean(), parameters)
    finally:
        for hook in hooks:
            hook.remove()
    if builder.device.type == "cuda":
        torch.cuda.synchronize(builder.device)  # errors on the device surface here


def _discard(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient of the same shape that takes no memory."""
    return gradient.new_zeros(()).expand(gradient.shape)


def _memory_key(estimate: MemoryEstimate) -> tuple[int, int]:
    """Return a sort key of buckets. Short ones may all need only the VAE's memory, so activations break ties."""
    return estimate.total_bytes, estimate.kept_activations_bytes + estimate.block_activations_bytes


def _missing_bytes(estimate: MemoryEstimate, engine: Any, stage: int) -> int:
    """Return the part of the estimate that is allocated after the check, or 0 on a CPU.

    DeepSpeed's first steps allocate Adam's moments, two of the optimizer's three tensors, and below stage 3 also the
    reduction's buffers and the gradients between micro-steps. Encoding on the fly starts after the check, too.
    """
    if engine.device.type != "cuda":
        return 0
    moments = 0 if has_optimizer_states(engine) else estimate.optimizer_state_bytes * 2 // 3
    reduction = estimate.reduce_buffers_bytes + estimate.trained_gradients_bytes if stage < 3 else 0
    return moments + reduction + estimate.clip_encode_bytes


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, CUDA or cuBLAS ran out of memory. Only torch has an exception class for it."""
    if not isinstance(error, RuntimeError):
        return False
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _describe_shortage(run: Run, bucket: int, error: Exception | None = None) -> str:
    """Return the message for a bucket that does not fit. error: this rank's error, if it is this rank that failed."""
    part, shape, size = run.execution.buckets[bucket], run.buckets[bucket], run.plan.local_batch_sizes[bucket]
    gpu_bytes = run.execution.gpu_bytes
    rank = f"rank {run.world.rank}" if error is not None else "another rank"
    reason = f" ({str(error).splitlines()[0]})" if error is not None and str(error) else ""
    gpu = "" if gpu_bytes is None else f" of {gpu_bytes / 1e9:.1f} GB"
    blocks = BlockCheckpointing.of(part.checkpointing)
    mode = f"={blocks.mode}, which keeps no whole block" if blocks.num_kept_blocks else " to a mode that keeps less"
    quantize = "model.quantization=nf4, " if run.cfg.trains_lora else ""
    advice = part.shortfall or (
        f"The estimate was {part.estimate.total_bytes / 1e9:.1f} GB{gpu}, {USABLE_SHARE:.0%} of which is usable. Set "
        f"train.activation_checkpointing{mode}, {quantize}a smaller batch or bucket, or use "
        "ds_configs/zero3.json on several GPUs."
    )
    return (
        f"data.buckets: {shape} with batch size {size} and activation checkpointing {part.checkpointing} does not fit "
        f"into the memory of {rank}{reason}. {advice}"
    )

"""Changes to a run that make a bucket fit into GPU memory, found with the memory model."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

from cogds.core.checkpointing import BlockCheckpointing
from cogds.core.geometry import ClipShape
from cogds.core.memory import MemoryModel, ZeroSettings
from cogds.formatting import gigabytes

# Maximum number of remedies for one bucket.
MAX_REMEDIES = 6


@dataclass(frozen=True)
class Remedy:
    """A change that makes a bucket fit.

    arguments: of the command line, none if another checkpointing mode is enough; checkpointing: the fastest mode that
    fits with them; total_bytes: the estimate with both.
    """

    arguments: tuple[str, ...]
    checkpointing: str
    total_bytes: int

    def __str__(self) -> str:
        memory = gigabytes(self.total_bytes)
        if not self.arguments:
            return f"train.activation_checkpointing={self.checkpointing} ({memory})"
        return f"{' with '.join(self.arguments)} ({self.checkpointing}, {memory})"


def find_remedies(model: MemoryModel, shape: ClipShape, batch_size: int, gpu_bytes: float) -> list[Remedy]:
    """Return up to MAX_REMEDIES changes that make the bucket fit, each with the fastest checkpointing mode.

    Tries another mode alone, then single changes, then pairs. Returns the first of these groups that is not empty.
    """
    changes = _changes(model, batch_size)
    for num_changes in range(3):
        remedies = []
        for chosen in itertools.combinations(changes, num_changes):
            fields = {name: value for _, change in chosen for name, value in change.items()}
            if len(fields) < len(chosen):
                continue  # two values for one field
            size = fields.pop("batch_size", batch_size)
            changed = replace(model, **fields)
            if changed.quantization != "none" and changed.zero.stage == 3:
                continue  # ZeRO-3 cannot shard quantized weights
            mode = changed.least_checkpointing(shape, size, gpu_bytes)
            estimate = changed.estimate(shape, size, mode)
            if estimate.fits(gpu_bytes):
                remedies.append(Remedy(tuple(argument for argument, _ in chosen), mode, estimate.total_bytes))
        if remedies:
            return remedies[:MAX_REMEDIES]
    return []


def explain_shortfall(
    model: MemoryModel,
    shape: ClipShape,
    batch_size: int,
    checkpointing: BlockCheckpointing | str,
    gpu_bytes: float | None,
) -> str:
    """Explain why a bucket does not fit and what makes it fit. "" if it fits or if gpu_bytes is None (no GPU)."""
    if gpu_bytes is None or (estimate := model.estimate(shape, batch_size, checkpointing)).fits(gpu_bytes):
        return ""
    remedies = find_remedies(model, shape, batch_size, gpu_bytes)
    advice = (
        f"By the same estimate, these changes make it fit: {'; '.join(map(str, remedies))}."
        if remedies
        else "No setting makes it fit. Use a smaller bucket or a larger GPU."
    )
    return (
        f"bucket {shape} with batch size {batch_size} does not fit: it needs about {gigabytes(estimate.total_bytes)} "
        f"with train.activation_checkpointing={checkpointing}, and the GPU has {gigabytes(gpu_bytes)}. {advice}"
    )


def _changes(model: MemoryModel, batch_size: int) -> list[tuple[str, dict[str, Any]]]:
    """Possible changes: the command-line arguments, and the fields of `MemoryModel` (and `batch_size`) they set."""
    zero, changes = model.zero, list[tuple[str, dict[str, Any]]]()
    if batch_size > 1:
        changes.append(("train.batch_size=1 train.tokens_per_batch=null", {"batch_size": 1}))
    if model.on_the_fly is not None:
        changes.append(("data.encode=cached", {"on_the_fly": None}))
        if set(model.buckets) - model.on_the_fly.tiled:
            tiled = replace(model.on_the_fly, tiled=frozenset(model.buckets))
            changes.append(("data.vae_tiling=on", {"on_the_fly": tiled}))
    defaults = ZeroSettings(reduce_bucket_size=zero.reduce_bucket_size)
    if zero.stage < 2 or (zero.stage == 2 and not zero.offload_optimizer):
        settings = replace(defaults, stage=2, offload_optimizer=True)
        changes.append(("--deepspeed zero2_offload", {"zero": settings}))
    if model.quantization == "none":
        if model.trained.is_lora:
            changes += [(f"model.quantization={name}", {"quantization": name}) for name in ("int8", "nf4")]
        if model.num_ranks > 1 and zero.stage < 3:
            changes.append(("--deepspeed zero3", {"zero": replace(defaults, stage=3)}))
        if not zero.offload_param:
            settings = replace(defaults, stage=3, offload_optimizer=True, offload_param=True)
            changes.append(("--deepspeed zero3_offload", {"zero": settings}))
    for size in (2, 4, 8):
        is_possible = model.num_ranks % size == 0 and model.transformer.num_heads % size == 0
        if model.sequence_size < size and is_possible:
            changes.append((f"parallel.sequence_size={size}", {"sequence_size": size}))
    return changes

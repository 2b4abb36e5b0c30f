"""How the transformer runs on this machine: attention kernel, compilation, activation checkpointing of each bucket.

    execution = choose_execution(job, batch_sizes)
    prepare_blocks(transformer, execution)
    transformer.set_checkpointing(execution.buckets[bucket].checkpointing)

Rank 0 decides; every rank follows. The choice changes results in the last bits only.
"""

import importlib.util
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogds.config.deepspeed import zero_stage
from cogds.core.geometry import ClipShape, num_tokens
from cogds.core.memory import MemoryEstimate
from cogds.core.memory_advice import explain_shortfall
from cogds.distributed.collectives import all_gather, on_all_ranks, on_rank0
from cogds.errors import UserError
from cogds.formatting import gigabytes
from cogds.job import Job, choose_checkpointing
from cogds.metrics.trackers import check_tracker_packages
from cogds.model.transformer.attention import activate_kernel, find_fastest_kernel
from cogds.model.transformer.quantize import check_quantization
from cogds.process.environment import environment_variables


@dataclass(frozen=True)
class BucketExecution:
    """How one bucket is trained, and the memory that it needs.

    checkpointing: activation checkpointing mode. shortfall: why it does not fit and what would help, or "".
    pinned_host_bytes: of one rank.
    """

    checkpointing: str
    estimate: MemoryEstimate
    shortfall: str = ""
    pinned_host_bytes: int = 0


@dataclass(frozen=True)
class Execution:
    """kernel: attention kernel. gpu_bytes: memory of the smallest GPU, None on CPUs. notes: lines for the summary.
    ranks_per_node: ranks that share a host's memory."""

    kernel: str
    is_compiled: bool
    buckets: tuple[BucketExecution, ...]
    gpu_bytes: float | None = None
    notes: tuple[str, ...] = ()
    ranks_per_node: int = 1


def gpu_memory(device: torch.device) -> float | None:
    """Memory of a GPU [bytes]; None for a CPU."""
    return float(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else None


def check_execution(job: Job) -> None:
    """Raise UserError for a setting that this GPU or installation does not support, before any weight is loaded."""
    cfg, world = job.cfg, job.world
    check_quantization(
        cfg.model.quantization, cfg.model.fp8_matmul, cfg.train.precision, zero_stage(job.ds_config), world.device
    )
    check_tracker_packages(job.ds_config)
    if cfg.model.compile == "on" and (missing := missing_to_compile(world.device)):
        raise UserError(
            f"model.compile: compiling needs {missing}, which rank {world.rank} does not find. Install it, or set "
            "model.compile=off."
        )


def missing_to_compile(device: torch.device, variables: Mapping[str, str] | None = None) -> str:
    """Name what torch.compile needs for this device and does not find; "" if nothing is missing.

    On GPUs that is Triton, a C compiler for its launchers and the Python headers; on CPUs a C++ compiler.
    variables: CC and CXX of the environment.
    """
    variables = environment_variables("CC", "CXX") if variables is None else variables
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton, which comes with torch's builds for GPUs"
        name, language, usual = "CC", "C", ["gcc", "clang"]
        header = Path(sysconfig.get_paths()["include"], "Python.h")
        if not header.is_file():
            return f"the Python headers ({header}; package python3-dev)"
    else:
        name, language, usual = "CXX", "C++", ["g++"]
    given = variables.get(name)
    if any(shutil.which(command.split()[0]) for command in ([given] if given else usual)):
        return ""
    return f"a {language} compiler ({f'{name}={given} does not exist' if given else ' or '.join(usual)})"


def choose_execution(job: Job, batch_sizes: Sequence[int]) -> Execution:
    """What the config asks for; for `auto`, what fits and is fastest. batch_sizes: of every bucket. Collective."""
    world = job.world
    reports = all_gather(world, (gpu_memory(world.device), missing_to_compile(world.device)))
    memories = [gpu_bytes for gpu_bytes, _ in reports if gpu_bytes is not None]
    missing = [name for _, name in reports if name]
    execution = on_rank0(world, lambda: _choose(job, batch_sizes, min(memories, default=None), missing))
    on_all_ranks(world, lambda: activate_kernel(execution.kernel, world.device))
    return execution


def _choose(job: Job, batch_sizes: Sequence[int], gpu_bytes: float | None, missing: Sequence[str]) -> Execution:
    """On rank 0. missing: of `missing_to_compile`, from all ranks that miss something."""
    cfg, memory = job.cfg, job.memory
    kernel, notes = _choose_kernel(job) if cfg.model.attention == "auto" else (cfg.model.attention, [])
    is_compiled = cfg.model.compile == "on" or (cfg.model.compile == "auto" and job.world.device.type == "cuda")
    if is_compiled and missing and cfg.model.compile == "auto":
        is_compiled = False
        notes.append(f"model.compile=auto: not compiled, and so slower, because {missing[0]} is missing")
    buckets = tuple(
        BucketExecution(
            mode,
            memory.estimate(shape, batch_size, mode),
            explain_shortfall(memory, shape, batch_size, mode, gpu_bytes),
            memory.pinned_host_bytes(shape, batch_size, mode),
        )
        for shape, batch_size, mode in zip(job.buckets, batch_sizes, choose_checkpointing(job, batch_sizes, gpu_bytes))
    )
    return Execution(kernel, is_compiled, buckets, gpu_bytes, tuple(notes), job.world.local_size)


def _choose_kernel(job: Job) -> tuple[str, list[str]]:
    """The fastest attention kernel for the largest bucket, and lines that say why."""
    model, device = job.model, job.world.device
    if device.type == "cpu":
        return "torch", ["attention kernel: torch"]
    tokens = max(num_tokens(shape, model.geometry) for shape in job.buckets)
    heads = model.transformer_config["num_attention_heads"] // job.world.sequence_size
    kernel, times, failures = find_fastest_kernel(tokens, heads, model.geometry.head_dim, job.dtype, device)
    timings = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in sorted(times.items()))
    return kernel, [
        f"attention kernel: {kernel} ({timings})",
        *(f"  {name}: not usable ({reason})" for name, reason in failures.items()),
    ]


def execution_lines(execution: Execution, buckets: Sequence[ClipShape], num_clips: Sequence[int]) -> list[str]:
    """Lines for the summary: one per bucket that has clips, and a warning for each that does not fit."""
    lines = [*execution.notes, f"transformer blocks: {'compiled' if execution.is_compiled else 'not compiled'}"]
    used = [(shape, part) for shape, part, num in zip(buckets, execution.buckets, num_clips) if num]
    if pinned := max((part.pinned_host_bytes for _, part in used), default=0):
        ranks = execution.ranks_per_node
        per_node = f", {gigabytes(ranks * pinned)} per node of {ranks} GPUs" if ranks > 1 else ""
        lines.append(f"pinned host memory for activations: {gigabytes(pinned)} per GPU{per_node}")
    for shape, part in used:
        needed = f"  about {gigabytes(part.estimate.total_bytes)}" if execution.gpu_bytes else ""
        needed += f" of {gigabytes(execution.gpu_bytes)}" if execution.gpu_bytes else ""
        lines.append(f"  {shape!s:>14}  activation checkpointing {part.checkpointing:<14}{needed}".rstrip())
    return lines + [f"warning: {part.shortfall}" for _, part in used if part.shortfall]


def prepare_blocks(transformer: Any, execution: Execution) -> None:
    """Make a transformer's blocks run as chosen. Each batch then sets its activation checkpointing mode."""
    transformer.set_kernel(execution.kernel)
    transformer.detect_dropout()
    if execution.is_compiled:
        transformer.compile_blocks()

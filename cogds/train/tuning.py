"""The execution plan: attention kernel, compilation, and the activation checkpointing of each bucket.

    execution = choose_execution(job, batch_sizes)
    prepare_blocks(transformer, execution)
    transformer.set_checkpointing(execution.buckets[bucket].checkpointing)

Rank 0 decides; every rank follows. The choices change results only in the last bits.
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
from cogds.core.checkpointing import BlockCheckpointing
from cogds.core.geometry import num_tokens
from cogds.core.memory import MemoryEstimate
from cogds.core.memory_advice import explain_shortfall
from cogds.distributed.collectives import all_gather, on_all_ranks, on_rank0
from cogds.distributed.world import gpu_memory
from cogds.errors import UserError
from cogds.job import Job, choose_checkpointing
from cogds.metrics.trackers import check_tracker_packages
from cogds.model.cudnn import check_cudnn
from cogds.model.transformer.attention import (
    check_kernel,
    find_fastest_kernel,
    installed_kernels,
    require_kernel,
)
from cogds.model.transformer.quantize import check_quantization
from cogds.process.environment import environment_variables


@dataclass(frozen=True)
class BucketExecution:
    """How one bucket is trained, and the memory that it needs.

    checkpointing: activation checkpointing. shortfall: a message if the bucket does not fit, else "".
    pinned_host_bytes: pinned memory of one rank.
    """

    checkpointing: BlockCheckpointing
    estimate: MemoryEstimate
    shortfall: str = ""
    pinned_host_bytes: int = 0


@dataclass(frozen=True)
class Execution:
    """How a run is executed on this machine.

    kernel: attention kernel. gpu_bytes: memory of the smallest GPU, None on CPUs. notes: further lines for the startup
    summary. ranks_per_node: number of ranks that share a host's memory.
    """

    kernel: str
    is_compiled: bool
    buckets: tuple[BucketExecution, ...]
    gpu_bytes: float | None = None
    notes: tuple[str, ...] = ()
    ranks_per_node: int = 1


def check_execution(job: Job) -> None:
    """Raise UserError if this GPU or installation does not support a setting, before any weight is loaded."""
    cfg, world = job.cfg, job.world
    check_quantization(
        cfg.model.quantization, cfg.model.fp8_matmul, cfg.train.precision, zero_stage(job.ds_config), world.device
    )
    check_cudnn(world.device, job.dtype)
    check_tracker_packages(job.ds_config)
    if cfg.model.compile == "on" and (missing := missing_to_compile(world.device)):
        raise UserError(
            f"model.compile: on needs {missing}, which is missing on rank {world.rank}. Install it, or set "
            "model.compile=off."
        )


def missing_to_compile(device: torch.device, variables: Mapping[str, str] | None = None) -> str:
    """Return the name of something that torch.compile needs for this device and that is missing, or "".

    On GPUs it needs Triton, a C compiler for Triton's launchers and the Python headers; on CPUs a C++ compiler.
    variables: CC and CXX of the environment.
    """
    variables = environment_variables("CC", "CXX") if variables is None else variables
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton, a part of torch's GPU builds"
        name, language, defaults = "CC", "C", ["gcc", "clang"]
        header = Path(sysconfig.get_paths()["include"], "Python.h")
        if not header.is_file():
            return f"the Python headers ({header}; package python3-dev)"
    else:
        name, language, defaults = "CXX", "C++", ["g++"]
    compiler = variables.get(name)
    if any(shutil.which(command.split()[0]) for command in ([compiler] if compiler else defaults)):
        return ""
    return f"a {language} compiler ({f'{name}={compiler} does not exist' if compiler else ' or '.join(defaults)})"


def choose_execution(job: Job, batch_sizes: Sequence[int], saved_kernel: str | None = None) -> Execution:
    """Return the execution that the config sets; for `auto`, the fastest that fits. Collective.

    batch_sizes: batch size of each bucket. saved_kernel: attention kernel of the checkpoint that the run resumes from,
    which `auto` keeps if it still works. Raises UserError if the kernel that the config sets does not work.
    """
    world = job.world
    reports = all_gather(world, (gpu_memory(world.device), missing_to_compile(world.device)))
    memories = [gpu_bytes for gpu_bytes, _ in reports if gpu_bytes is not None]
    missing = [name for _, name in reports if name]
    execution = on_rank0(world, lambda: _choose(job, batch_sizes, min(memories, default=None), missing, saved_kernel))
    on_all_ranks(world, lambda: require_kernel(execution.kernel, world.device))
    return execution


def _choose(
    job: Job, batch_sizes: Sequence[int], gpu_bytes: float | None, missing: Sequence[str], saved_kernel: str | None
) -> Execution:
    """Choose on rank 0. missing: names from `missing_to_compile` of the ranks that lack something."""
    cfg, memory = job.cfg, job.memory
    kernel, notes = _choose_kernel(job, saved_kernel)
    is_compiled = cfg.model.compile == "on" or (cfg.model.compile == "auto" and job.world.device.type == "cuda")
    if is_compiled and missing and cfg.model.compile == "auto":
        is_compiled = False
        notes.append(
            f"blocks are not compiled, and therefore slower, because {missing[0]} is missing (model.compile=auto)"
        )
    buckets = tuple(
        BucketExecution(
            blocks,
            memory.estimate(shape, batch_size, blocks),
            explain_shortfall(memory, shape, batch_size, blocks, gpu_bytes),
            memory.pinned_host_bytes(shape, batch_size, blocks),
        )
        for shape, batch_size, blocks in zip(
            job.buckets, batch_sizes, choose_checkpointing(job, batch_sizes, gpu_bytes)
        )
    )
    return Execution(kernel, is_compiled, buckets, gpu_bytes, tuple(notes), job.world.local_size)


def _choose_kernel(job: Job, saved_kernel: str | None) -> tuple[str, list[str]]:
    """Return the attention kernel for the largest bucket, and lines for the summary that say why."""
    model, device, configured = job.model, job.world.device, job.cfg.model.attention
    tokens = max(num_tokens(shape, model.geometry) for shape in job.buckets)
    heads = model.transformer_config["num_attention_heads"] // job.world.sequence_size
    clip = (tokens, heads, model.geometry.head_dim, job.dtype, device)
    if configured != "auto":
        if problem := check_kernel(configured, *clip):
            raise UserError(
                f"model.attention={configured}: does not work for clips of {tokens} tokens on this {device.type}: "
                f"{problem}. Use another kernel, or model.attention=auto."
            )
        return configured, []
    if device.type == "cpu":
        return "torch", []
    notes = []
    if saved_kernel:
        is_installed = saved_kernel in installed_kernels(device)
        problem = check_kernel(saved_kernel, *clip) if is_installed else "it is not installed"
        if not problem:
            return saved_kernel, [f"attention kernel {saved_kernel}, as in the checkpoint"]
        notes = [f"attention kernel {saved_kernel} of the checkpoint is not used: {problem}"]
    kernel, times, failures = find_fastest_kernel(*clip)
    timings = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in sorted(times.items()))
    return kernel, [
        *notes,
        f"attention on the largest bucket: {timings}",
        *(f"attention kernel {name} is not usable: {reason}" for name, reason in failures.items()),
    ]


def prepare_blocks(transformer: Any, execution: Execution) -> None:
    """Set the attention kernel of a transformer, and compile its blocks if chosen.

    Its activation checkpointing mode is set before each batch.
    """
    transformer.set_kernel(execution.kernel)
    transformer.detect_dropout()
    if execution.is_compiled:
        transformer.compile_blocks()

"""How the transformer runs here: attention kernel, compiled or not, and what each bucket recomputes.

    execution = choose_execution(cfg, ds_config, model, buckets, batch_sizes, world)
    prepare_blocks(transformer, execution); transformer.set_level(execution.levels[bucket])

Rank 0 measures and reckons, all do the same. None of it changes what is computed but in the last bits. Where a bucket
does not fit by the memory model, that is said here, with what would help; `rehearsal` then tries it.
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
from cogds.config.schema import RunConfig
from cogds.core.geometry import ClipShape, num_tokens
from cogds.core.memory import LoraSize, MemoryEstimate, MemoryModel, TransformerSize, ZeroSettings
from cogds.core.memory_advice import explain_shortfall
from cogds.distributed.world import World, all_gather, on_all_ranks, on_rank0, settings
from cogds.errors import UserError, did_you_mean
from cogds.metrics.trackers import check_monitors
from cogds.model.load import DTYPES, ModelFolder, empty_transformer
from cogds.model.lora.adapter import resolve_targets
from cogds.model.transformer.attention import fastest, use
from cogds.model.transformer.quantize import check_base


@dataclass(frozen=True)
class Execution:
    """kernel: of `model.attention.KERNELS`. levels: of `CHECKPOINTING_MODES`, and estimates, by bucket. lines: why, for
    people; the buckets' are `execution_lines`. device_bytes: of the smallest GPU, None on CPUs. shortfalls: by bucket,
    "" where it fits. pinned: host memory of a rank, by bucket (`pinned_host_bytes`); ranks_a_node: that have as much.
    """

    kernel: str
    compiled: bool
    levels: tuple[str, ...]
    lines: tuple[str, ...] = ()
    estimates: tuple[MemoryEstimate, ...] = ()
    device_bytes: float | None = None
    shortfalls: tuple[str, ...] = ()
    pinned: tuple[int, ...] = ()
    ranks_a_node: int = 1


def measure_sizes(cfg: RunConfig, model: ModelFolder) -> tuple[TransformerSize, LoraSize]:
    """Sizes of the run's transformer and LoRA, found without reading a weight."""
    empty = empty_transformer(model)
    layers, rank = dict(empty.named_modules()), cfg.lora.rank
    targets = resolve_targets(empty, cfg.lora.target_modules)
    num_lora = sum(rank * (layers[name].in_features + layers[name].out_features) for name in targets)
    num_base = sum(parameter.numel() for parameter in empty.parameters())
    transformer = TransformerSize.from_config(model.transformer_config, num_base)
    return transformer, LoraSize.from_targets(targets, num_lora, rank)


def memory_model(
    cfg: RunConfig, ds_config: Mapping[str, Any], model: ModelFolder, buckets: Sequence[ClipShape], num_ranks: int
) -> MemoryModel:
    """The memory model of a run with a resolved DeepSpeed config."""
    transformer, lora = measure_sizes(cfg, model)
    return MemoryModel(
        geometry=model.geometry,
        transformer=transformer,
        lora=lora,
        vae=model.vae_size,
        zero=ZeroSettings.from_config(ds_config.get("zero_optimization", {})),
        num_ranks=num_ranks,
        precision=cfg.train.precision,
        buckets=tuple(buckets),
        quantization=cfg.model.base,
        fp8_matmul=cfg.model.matmul == "float8",
        sequence_parallel=cfg.parallel.sequence,
    )


def memory_of(device: torch.device) -> float | None:
    """Bytes of a GPU; None for a CPU, whose memory nothing here counts on."""
    return float(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else None


def choose_levels(
    cfg: RunConfig, memory: MemoryModel, batch_sizes: Sequence[int], device_bytes: float | None
) -> tuple[str, ...]:
    """What every bucket recomputes: as asked, or the least that fits a GPU of so many bytes; None: any memory will do.

    Where nothing fits, the level that needs least. Raises UserError for a bucket in `train.recompute_by_bucket` that
    the run does not have.
    """
    names = [str(shape) for shape in memory.buckets]
    for name in cfg.train.recompute_by_bucket:
        if name not in names:
            raise UserError(
                f"train.recompute_by_bucket names {name}, which is no bucket of this run{did_you_mean(name, names)}; "
                f"there are {', '.join(names)}"
            )
    asked = [cfg.train.recompute_by_bucket.get(name, cfg.train.recompute) for name in names]
    if device_bytes is None:
        return tuple("none" if level == "auto" else level for level in asked)
    return tuple(
        memory.least_checkpointing(shape, batch_size, device_bytes) if level == "auto" else level
        for shape, batch_size, level in zip(memory.buckets, batch_sizes, asked)
    )


def check_execution(cfg: RunConfig, ds_config: dict[str, Any], world: World) -> None:
    """Raise UserError for what this GPU or what is installed cannot do. Before any weight is loaded."""
    check_base(cfg.model.base, cfg.model.matmul, cfg.train.precision, zero_stage(ds_config), world.device)
    check_monitors(ds_config)
    if cfg.model.compile == "on" and (missing := missing_to_compile(world.device)):
        raise UserError(
            f"model.compile=on needs {missing}, on rank {world.rank}'s machine: install it, or set model.compile=off"
        )


def missing_to_compile(device: torch.device, variables: Mapping[str, str] | None = None) -> str:
    """What torch.compile needs for this device and does not find, for people; "" where it can be tried.

    On GPUs triton, which has a C compiler build its launchers against Python's headers; on CPUs a C++ compiler.
    variables: CC and CXX of the environment.
    """
    variables = settings("CC", "CXX") if variables is None else variables
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton, which comes with torch's builds for GPUs"
        name, language, usual = "CC", "C", ["gcc", "clang"]
        header = Path(sysconfig.get_paths()["include"], "Python.h")
        if not header.is_file():
            return f"Python's headers ({header}; the package python3-dev)"
    else:
        name, language, usual = "CXX", "C++", ["g++"]
    asked = variables.get(name)
    if any(shutil.which(one.split()[0]) for one in ([asked] if asked else usual)):
        return ""
    return f"a {language} compiler ({f'{name}={asked} is not there' if asked else ' or '.join(usual)})"


def choose_execution(
    cfg: RunConfig,
    ds_config: dict[str, Any],
    model: ModelFolder,
    buckets: Sequence[ClipShape],
    batch_sizes: Sequence[int],
    world: World,
) -> Execution:
    """What the config asks for, and what fits and is fastest where it says auto. Collective."""
    device = world.device
    facts = all_gather(world, (memory_of(device), missing_to_compile(device)))
    memories, missing = [one for one, _ in facts if one is not None], [one for _, one in facts if one]

    def choose() -> Execution:
        device_bytes = min(memories, default=None)
        memory = memory_model(cfg, ds_config, model, buckets, world.size)
        levels = choose_levels(cfg, memory, batch_sizes, device_bytes)
        lines, kernel = [], cfg.model.attention
        if kernel == "auto":
            tokens = max(num_tokens(shape, model.geometry) for shape in buckets)
            heads = model.transformer_config["num_attention_heads"] // world.sequence
            kernel, times, failures = (
                ("torch", {}, {})
                if device.type == "cpu"
                else fastest(tokens, heads, model.geometry.head_dim, DTYPES[cfg.train.precision], device)
            )
            taken = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in sorted(times.items()))
            lines.append(f"attention kernel: {kernel}" + (f" (of {taken})" if taken else ""))
            lines += [f"  {name}: not usable ({reason})" for name, reason in failures.items()]
        compiled = cfg.model.compile == "on" or (cfg.model.compile == "auto" and device.type == "cuda")
        if compiled and missing and cfg.model.compile == "auto":
            compiled = False
            lines.append(f"model.compile=auto does not compile, and so is slower: it needs {missing[0]}")
        return Execution(
            kernel,
            compiled,
            levels,
            tuple(lines),
            tuple(map(memory.estimate, buckets, batch_sizes, levels)),
            device_bytes,
            tuple(
                explain_shortfall(memory, shape, batch_size, level, device_bytes)
                for shape, batch_size, level in zip(buckets, batch_sizes, levels)
            ),
            tuple(map(memory.pinned_host_bytes, buckets, batch_sizes, levels)),
            world.local_size,
        )

    execution = on_rank0(world, choose)
    on_all_ranks(world, lambda: use(execution.kernel, device))
    return execution


def execution_lines(execution: Execution, buckets: Sequence[ClipShape], num_clips: Sequence[int]) -> list[str]:
    """How the run will be executed, for people: a line a bucket that has clips, and a warning for what does not fit."""
    lines = [*execution.lines, f"transformer's block: {'compiled' if execution.compiled else 'not compiled'}"]
    warnings, there = [], execution.device_bytes
    if most := max((size for size, num in zip(execution.pinned, num_clips) if num), default=0):
        ranks = execution.ranks_a_node
        node = f", {_gigabytes(ranks * most)} a node of {ranks}" if ranks > 1 else ""
        lines.append(f"block+offload keeps {_gigabytes(most)} of pinned host memory a GPU{node}")
    for shape, num, level, estimate, short in zip(
        buckets, num_clips, execution.levels, execution.estimates, execution.shortfalls
    ):
        if not num:
            continue
        memory = "" if there is None else f"  about {_gigabytes(estimate.total_bytes)} of {_gigabytes(there)}"
        lines.append(f"  {shape!s:>14}  recompute {level:<14}{memory}".rstrip())
        if short:
            warnings.append(f"warning: {short}")
    return lines + warnings


def prepare_blocks(transformer: Any, execution: Execution) -> None:
    """Let a transformer's blocks run as chosen; each batch then says `set_level`."""
    transformer.set_kernel(execution.kernel)
    transformer.note_dropout()
    if execution.compiled:
        transformer.compile_blocks()


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"

"""How the transformer runs here: attention kernel, compiled or not, and the activation checkpointing of each bucket.

    execution = choose_execution(cfg, ds_config, model, buckets, batch_sizes, world)
    prepare_blocks(transformer, execution); transformer.set_checkpointing(execution.checkpointing_modes[bucket])

Rank 0 measures and reckons, all do the same. None of it changes what is computed but in the last bits. Where a bucket
does not fit by the memory model, that is said here, with what would help; `memory_check` then tries it.
"""

import dataclasses
import importlib.util
import itertools
import shutil
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogds.config.deepspeed import zero_stage
from cogds.config.schema import CHECKPOINTING_MODES, RunConfig
from cogds.core.geometry import ClipShape, ModelGeometry, num_tokens
from cogds.core.memory import (
    LoraSize,
    MemoryEstimate,
    TransformerSize,
    VaeSize,
    pinned_bytes,
    rotary_table_bytes,
    training_memory,
)
from cogds.distributed.world import World, all_gather, on_all_ranks, on_rank0, settings
from cogds.errors import UserError, did_you_mean
from cogds.metrics.trackers import check_monitors
from cogds.model.load import DTYPES, ModelFolder, empty_transformer
from cogds.model.lora.adapter import resolve_targets
from cogds.model.transformer.attention import fastest, use
from cogds.model.transformer.quantize import check_quantization

# Of a GPU's memory, what an estimate may take: the rest is the allocator's holes and other processes'.
USABLE_SHARE = 0.92
# So many ways out are named for a bucket that does not fit.
MAX_REMEDIES = 6


@dataclass(frozen=True)
class Execution:
    """kernel: of `model.attention.KERNELS`. checkpointing_modes: of `CHECKPOINTING_MODES`, and estimates, by bucket.
    lines: why, for people; the buckets' are `execution_lines`. device_bytes: of the smallest GPU, None on CPUs.
    shortfalls: by bucket, "" where it fits. pinned: host memory of a rank, by bucket
    (`pinned_bytes`); ranks_a_node: that have as much.
    """

    kernel: str
    compiled: bool
    checkpointing_modes: tuple[str, ...]
    lines: tuple[str, ...] = ()
    estimates: tuple[MemoryEstimate, ...] = ()
    device_bytes: float | None = None
    shortfalls: tuple[str, ...] = ()
    pinned: tuple[int, ...] = ()
    ranks_a_node: int = 1


@dataclass(frozen=True)
class Sizes:
    """What the memory model asks of a transformer and its LoRA, found without reading a weight."""

    transformer: TransformerSize
    lora: LoraSize

    @classmethod
    def of(cls, cfg: RunConfig, model: ModelFolder) -> "Sizes":
        empty = empty_transformer(model)
        layers, rank = dict(empty.named_modules()), cfg.lora.rank
        targets = resolve_targets(empty, cfg.lora.target_modules)
        numbers = sum(rank * (layers[name].in_features + layers[name].out_features) for name in targets)
        num_parameters = sum(parameter.numel() for parameter in empty.parameters())
        return cls(
            TransformerSize.from_config(model.transformer_config, num_parameters),
            LoraSize.from_targets(targets, numbers, rank),
        )


@dataclass(frozen=True)
class Setting:
    """What a rank's memory depends on, besides the bucket, its batch and checkpointing mode: see `training_memory`."""

    geometry: ModelGeometry
    sizes: Sizes
    vae: VaeSize
    zero: Mapping[str, Any]
    num_ranks: int
    precision: str
    quantization: str = "none"
    sequence_size: int = 1
    rotary_bytes: int = 0
    fp8_matmul: bool = False

    @classmethod
    def of(
        cls,
        cfg: RunConfig,
        ds_config: Mapping[str, Any],
        model: ModelFolder,
        sizes: Sizes,
        buckets: Sequence[ClipShape],
        num_ranks: int,
    ) -> "Setting":
        """Of a run with a resolved DeepSpeed config on so many ranks."""
        return cls(
            geometry=model.geometry,
            sizes=sizes,
            vae=model.vae_size,
            zero=ds_config.get("zero_optimization", {}),
            num_ranks=num_ranks,
            precision=cfg.train.precision,
            quantization=cfg.model.quantization,
            fp8_matmul=cfg.model.fp8_matmul,
            sequence_size=cfg.parallel.sequence_size,
            rotary_bytes=sum(rotary_table_bytes(shape, model.geometry) for shape in buckets),
        )

    def estimate(self, shape: ClipShape, batch_size: int, checkpointing: str) -> MemoryEstimate:
        """The memory of a rank while it trains this bucket."""
        return training_memory(
            shape, batch_size, self.geometry, self.sizes.transformer, self.sizes.lora, self.vae, self.zero,
            self.num_ranks, self.precision, checkpointing, self.rotary_bytes, self.quantization, self.sequence_size,
            self.fp8_matmul,
        )  # fmt: skip

    def pinned_bytes(self, shape: ClipShape, batch_size: int, checkpointing: str) -> int:
        """The pinned host memory of a rank while it trains this bucket."""
        return pinned_bytes(
            shape, batch_size, self.geometry, self.sizes.transformer, self.precision, checkpointing, self.sequence_size
        )

    def least_checkpointing(self, shape: ClipShape, batch_size: int, device_bytes: float) -> str:
        """The mode that recomputes least and fits; where none does, the one that needs the least memory."""
        for checkpointing in CHECKPOINTING_MODES:
            if fits(self.estimate(shape, batch_size, checkpointing), device_bytes):
                return checkpointing
        return CHECKPOINTING_MODES[-1]


def fits(estimate: MemoryEstimate, device_bytes: float) -> bool:
    """Whether a GPU of so many bytes is enough, by the estimate, with some to spare."""
    return estimate.total_bytes <= USABLE_SHARE * device_bytes


def memory_of(device: torch.device) -> float | None:
    """Bytes of a GPU; None for a CPU, whose memory nothing here counts on."""
    return float(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else None


def choose_checkpointing(
    cfg: RunConfig,
    ds_config: dict[str, Any],
    model: ModelFolder,
    buckets: Sequence[ClipShape],
    batch_sizes: Sequence[int],
    num_ranks: int,
    device_bytes: float | None,
) -> tuple[str, ...]:
    """The activation checkpointing of every bucket: as configured, or the least that fits a GPU of `device_bytes`.

    device_bytes: None for no limit.

    Where nothing fits, the mode that needs least. Raises UserError for a bucket in
    `train.activation_checkpointing_by_bucket` that the run does not have.
    """
    names = [str(shape) for shape in buckets]
    for name in cfg.train.activation_checkpointing_by_bucket:
        if name not in names:
            raise UserError(
                f"train.activation_checkpointing_by_bucket names {name}, which is no bucket of this "
                f"run{did_you_mean(name, names)}; "
                f"there are {', '.join(names)}"
            )
    asked = [
        cfg.train.activation_checkpointing_by_bucket.get(name, cfg.train.activation_checkpointing) for name in names
    ]
    if "auto" not in asked:
        return tuple(asked)
    if device_bytes is None:
        return tuple("none" if checkpointing == "auto" else checkpointing for checkpointing in asked)
    setting = Setting.of(cfg, ds_config, model, Sizes.of(cfg, model), buckets, num_ranks)
    return tuple(
        setting.least_checkpointing(shape, batch_size, device_bytes) if checkpointing == "auto" else checkpointing
        for shape, batch_size, checkpointing in zip(buckets, batch_sizes, asked)
    )


def shortfall(
    setting: Setting, shape: ClipShape, batch_size: int, checkpointing: str, device_bytes: float | None
) -> str:
    """A sentence for a bucket that does not fit in its checkpointing mode, with remedies; "" where it does."""
    if device_bytes is None or fits(estimate := setting.estimate(shape, batch_size, checkpointing), device_bytes):
        return ""
    ways = list(itertools.islice(_remedies(setting, shape, batch_size, device_bytes), MAX_REMEDIES))
    advice = (
        f"by the same arithmetic these fit: {'; '.join(ways)}"
        if ways
        else "no setting here makes it fit: take a smaller bucket or a larger GPU"
    )
    return (
        f"{shape}, batch {batch_size}, will not fit: about {_gigabytes(estimate.total_bytes)} with "
        f"train.activation_checkpointing={checkpointing}, of {_gigabytes(device_bytes)} on a GPU; {advice}"
    )


def _remedies(setting: Setting, shape: ClipShape, batch_size: int, device_bytes: float) -> Iterator[str]:
    """Changes of the run that make a bucket fit, in words: single ones, and where there are none, pairs.

    Each is taken with the checkpointing mode that is fastest with it; none at all means another mode.
    """
    changes = _changes(setting, batch_size)
    for count in range(3):
        ways = []
        for chosen in itertools.combinations(changes, count):
            values = {name: value for _, change in chosen for name, value in change.items()}
            if len(values) < len(chosen):
                continue  # two values of one thing
            changed = dataclasses.replace(setting, **{name: values[name] for name in values if name != "batch_size"})
            if changed.quantization != "none" and int(changed.zero.get("stage", 0)) == 3:
                continue  # quantized weights are not sharded
            size = values.get("batch_size", batch_size)
            checkpointing = changed.least_checkpointing(shape, size, device_bytes)
            estimate = changed.estimate(shape, size, checkpointing)
            if fits(estimate, device_bytes):
                names = " with ".join(name for name, _ in chosen)
                memory = _gigabytes(estimate.total_bytes)
                ways.append(
                    f"{names} ({checkpointing}, {memory})"
                    if names
                    else f"train.activation_checkpointing={checkpointing} ({memory})"
                )
        if ways:
            yield from ways
            return


def _changes(setting: Setting, batch_size: int) -> list[tuple[str, dict[str, Any]]]:
    """What may be changed: how to ask for it, and the fields of `Setting` (and `batch_size`) that it changes."""
    zero, changes = setting.zero, list[tuple[str, dict[str, Any]]]()
    stage, heads = int(zero.get("stage", 0)), setting.sizes.transformer.num_heads
    small, on_host = {name: zero[name] for name in ("reduce_bucket_size",) if name in zero}, {"device": "cpu"}
    if batch_size > 1:
        changes.append(("train.batch_size=1 train.tokens_per_batch=null", {"batch_size": 1}))
    if stage < 2 or (stage == 2 and not zero.get("offload_optimizer")):
        offloaded = {"stage": 2, **small, "overlap_comm": False, "offload_optimizer": on_host}
        changes.append(("--deepspeed ds_configs/zero2_offload.json", {"zero": offloaded}))
    if setting.quantization == "none":
        changes += [(f"model.quantization={kind}", {"quantization": kind}) for kind in ("int8", "nf4")]
        if setting.num_ranks > 1 and stage < 3:
            changes.append(("--deepspeed ds_configs/zero3.json", {"zero": {"stage": 3, **small}}))
        if not zero.get("offload_param"):
            whole = {"stage": 3, **small, "offload_optimizer": on_host, "offload_param": on_host}
            changes.append(("--deepspeed ds_configs/zero3_offload.json", {"zero": whole}))
    for number in (2, 4, 8):
        if setting.sequence_size < number and setting.num_ranks % number == 0 and heads % number == 0:
            changes.append((f"parallel.sequence_size={number}", {"sequence_size": number}))
    return changes


def check_execution(cfg: RunConfig, ds_config: dict[str, Any], world: World) -> None:
    """Raise UserError for what this GPU or what is installed cannot do. Before any weight is loaded."""
    check_quantization(
        cfg.model.quantization, cfg.model.fp8_matmul, cfg.train.precision, zero_stage(ds_config), world.device
    )
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
        checkpointing_modes = choose_checkpointing(
            cfg, ds_config, model, buckets, batch_sizes, world.size, device_bytes
        )
        setting = Setting.of(cfg, ds_config, model, Sizes.of(cfg, model), buckets, world.size)
        lines: list[str] = []
        kernel: str = cfg.model.attention
        if kernel == "auto":
            tokens = max(num_tokens(shape, model.geometry) for shape in buckets)
            heads = model.transformer_config["num_attention_heads"] // world.sequence_size
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
            checkpointing_modes,
            tuple(lines),
            tuple(map(setting.estimate, buckets, batch_sizes, checkpointing_modes)),
            device_bytes,
            tuple(
                shortfall(setting, shape, batch_size, checkpointing, device_bytes)
                for shape, batch_size, checkpointing in zip(buckets, batch_sizes, checkpointing_modes)
            ),
            tuple(map(setting.pinned_bytes, buckets, batch_sizes, checkpointing_modes)),
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
        lines.append(f"full+offload keeps {_gigabytes(most)} of pinned host memory a GPU{node}")
    for shape, num, checkpointing, estimate, short in zip(
        buckets, num_clips, execution.checkpointing_modes, execution.estimates, execution.shortfalls
    ):
        if not num:
            continue
        memory = "" if there is None else f"  about {_gigabytes(estimate.total_bytes)} of {_gigabytes(there)}"
        lines.append(f"  {shape!s:>14}  activation checkpointing {checkpointing:<12}{memory}".rstrip())
        if short:
            warnings.append(f"warning: {short}")
    return lines + warnings


def prepare_blocks(transformer: Any, execution: Execution) -> None:
    """Let a transformer's blocks run as chosen; each batch then says `set_checkpointing`."""
    transformer.set_kernel(execution.kernel)
    transformer.note_dropout()
    if execution.compiled:
        transformer.compile_blocks()


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"

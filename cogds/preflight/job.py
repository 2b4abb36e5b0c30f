"""The job that is about to be run, read as the run reads it, and what it will need. No weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cogds.config.deepspeed import load_ds_config, resolve
from cogds.config.loading import load_config, to_dict
from cogds.config.schema import RunConfig
from cogds.core.geometry import ClipShape
from cogds.core.memory import MemoryEstimate, cached_caption_bytes, cached_clip_bytes
from cogds.demo import make_demo, only_own_demo
from cogds.distributed.world import World, set_network
from cogds.encode.order import batch_sizes
from cogds.encode.survey import data_sets, make_buckets
from cogds.model.load import ModelFolder, empty_transformer, find_model
from cogds.model.lora.adapter import resolve_targets
from cogds.model.transformer.sequence_parallel import check_sequence
from cogds.preflight.finding import FAIL, OK, Facts, Finding, at, differing
from cogds.train.tuning import Setting, Sizes, check_execution, choose_checkpointing, memory_of

# DataLoader's own: batches that every worker has ready.
PREFETCHED = 2


@dataclass(frozen=True)
class Job:
    """A run's config, resolved for this many ranks, and its model."""

    cfg: RunConfig
    ds_config: dict[str, Any]
    model: ModelFolder
    buckets: tuple[ClipShape, ...]
    targets: tuple[str, ...]
    world: World

    @property
    def bytes_each(self) -> int:
        """Of one number of the transformer."""
        return 2 if self.cfg.train.precision == "bf16" else 4

    @cached_property
    def batch_sizes(self) -> tuple[int, ...]:
        return batch_sizes(self.cfg, self.buckets, self.model)

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes.of(self.cfg, self.model)

    @cached_property
    def checkpointing_modes(self) -> tuple[str, ...]:
        """The activation checkpointing of every bucket on this GPU."""
        return choose_checkpointing(
            self.cfg, self.ds_config, self.model, self.buckets, self.batch_sizes, self.world.size,
            memory_of(self.world.device),
        )  # fmt: skip

    @cached_property
    def setting(self) -> Setting:
        return Setting.of(self.cfg, self.ds_config, self.model, self.sizes, self.buckets, self.world.size)

    @cached_property
    def estimates(self) -> tuple[MemoryEstimate, ...]:
        """GPU memory of every bucket."""
        return tuple(map(self.setting.estimate, self.buckets, self.batch_sizes, self.checkpointing_modes))

    @cached_property
    def offloaded_bytes(self) -> int:
        """Host memory for a rank's share of the weights, where ZeRO-3 keeps them there. Pinned, each weight's share
        takes the next power of two, as torch's allocator has it."""
        offload = self.ds_config.get("zero_optimization", {}).get("offload_param", {})
        if str(offload.get("device", "none")) != "cpu":
            return 0
        shares = [
            -(-one.numel() // self.world.size) * self.bytes_each for one in empty_transformer(self.model).parameters()
        ]
        return sum(1 << (share - 1).bit_length() for share in shares) if offload.get("pin_memory") else sum(shares)

    @property
    def pinned_bytes(self) -> int:
        """Host memory that a rank pins for activations, in the bucket that takes most."""
        return max(map(self.setting.pinned_bytes, self.buckets, self.batch_sizes, self.checkpointing_modes))

    @property
    def largest(self) -> int:
        """The bucket that takes most memory."""
        return max(range(len(self.buckets)), key=lambda index: self.estimates[index].total_bytes)

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint, float32 weights and two moments, with its exported LoRA."""
        return self.sizes.lora.num_parameters * (12 + self.bytes_each)

    @property
    def shared_memory_bytes(self) -> int:
        """What the loaders of one rank keep in /dev/shm: the batches that they are ahead. 0 where there are none."""
        if self.cfg.data.encode != "cached":
            return 0
        text_dim, geometry = self.sizes.transformer.text_dim, self.model.geometry
        batches = (
            size * (cached_clip_bytes(shape, geometry, self.bytes_each)
                    + cached_caption_bytes(geometry, text_dim, self.bytes_each))
            for shape, size in zip(self.buckets, self.batch_sizes)
        )  # fmt: skip
        return self.cfg.data.num_workers * PREFETCHED * max(batches)

    @property
    def data_paths(self) -> dict[str, str]:
        """What is only read: key of the config -> path."""
        paths = [one.path for one in data_sets(self.cfg)]
        if not self.cfg.data.sets:
            return {"data.path": paths[0]}
        return {f"data.sets[{index}].path": path for index, path in enumerate(paths)}

    @property
    def shared_folders(self) -> dict[str, str]:
        """What all ranks write into."""
        return {"output_dir": self.cfg.output_dir, "data.cache_dir": self.cfg.data.cache_dir}

    def flat(self) -> dict[str, Any]:
        """Every key of both configs, dotted -> value."""
        return dict(_flat(to_dict(self.cfg))) | {f"DeepSpeed's {key}": value for key, value in _flat(self.ds_config)}


def _flat(node: Any, path: str = "") -> Sequence[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        return [leaf for name, child in node.items() for leaf in _flat(child, f"{path}.{name}".lstrip("."))]
    return [(path, node)]


def load_job(config: str | None, default_config: Path, overrides: list[str], ds_path: str, world: World) -> Job:
    """Read the run's config as `train` does, and set its network variables. Raises UserError for what is wrong."""
    cfg, explicit = load_config(config or str(default_config), overrides)
    if not config:
        cfg = only_own_demo(cfg, overrides)
    ds_config = load_ds_config(ds_path)
    set_network(world, cfg.network)
    make_demo(cfg)
    model = find_model(cfg.model.path, cfg.model.revision)
    buckets = make_buckets(cfg, model)
    check_sequence(cfg.parallel.sequence_size, world.size, model.transformer_config["num_attention_heads"])
    targets = resolve_targets(empty_transformer(model), cfg.lora.target_modules)
    ds_config, cfg = resolve(ds_config, cfg, explicit, world.size, model.hidden_size, ds_path)
    check_execution(cfg, ds_config, world)
    return Job(cfg, ds_config, model, buckets, tuple(targets), replace(world, sequence_size=cfg.parallel.sequence_size))


def judge_config(facts: list[Facts]) -> list[Finding]:
    """Every key is the same on all ranks. facts: `config`, of `Job.flat`."""
    keys = dict.fromkeys(key for one in facts for key in one["config"])
    unlike = {key: text for key in keys if (text := differing(facts, at("config", key)))}
    if unlike:
        listed = "; ".join(f"{key}: {text}" for key, text in list(unlike.items())[:5])
        return [Finding("config", FAIL, f"the ranks read different configs ({len(unlike)} keys): {listed}")]
    alike = f", the same on {len(facts)} ranks" if len(facts) > 1 else ""
    return [Finding("config", OK, f"{len(keys)} keys{alike}")]

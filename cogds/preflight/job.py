"""The job that is about to be run, read as the run reads it, and what it will need. No weights are loaded."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

from cogds.config.loading import to_dict
from cogds.core.geometry import cached_caption_bytes, cached_clip_bytes
from cogds.core.memory import MemoryEstimate
from cogds.distributed.network import set_network
from cogds.distributed.world import World
from cogds.encode.scan_data import data_sets
from cogds.job import Job, choose_checkpointing, load_job
from cogds.model.load import empty_transformer
from cogds.preflight.finding import FAIL, OK, Facts, Finding, at, differing
from cogds.train.tuning import check_execution, gpu_memory

# DataLoader's own: batches that every worker has ready.
PREFETCHED = 2


class CheckedJob(Job):
    """A job and what it needs of each machine. No weights are loaded."""

    @property
    def bytes_each(self) -> int:
        """Bytes per element of the transformer."""
        return self.memory.element_bytes

    @cached_property
    def checkpointing(self) -> tuple[str, ...]:
        """Activation checkpointing mode of each bucket on this GPU."""
        return choose_checkpointing(self, self.batch_sizes, gpu_memory(self.world.device))

    @cached_property
    def estimates(self) -> tuple[MemoryEstimate, ...]:
        """GPU memory of every bucket."""
        return tuple(map(self.memory.estimate, self.buckets, self.batch_sizes, self.checkpointing))

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
        return max(map(self.memory.pinned_host_bytes, self.buckets, self.batch_sizes, self.checkpointing))

    @property
    def largest(self) -> int:
        """The bucket that takes most memory."""
        return max(range(len(self.buckets)), key=lambda index: self.estimates[index].total_bytes)

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint, float32 weights and two moments, with its exported LoRA."""
        return self.memory.lora.num_parameters * (12 + self.bytes_each)

    @property
    def shared_memory_bytes(self) -> int:
        """What the loaders of one rank keep in /dev/shm: the batches that they are ahead. 0 where there are none."""
        if self.cfg.data.encode != "cached":
            return 0
        text_dim, geometry = self.memory.transformer.text_dim, self.model.geometry
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


def load_checked_job(args: argparse.Namespace, world: World) -> CheckedJob:
    """Read the run's config as `train` does and set its network variables. Raises UserError for anything wrong."""
    job = load_job(args, world)
    set_network(job.world, job.cfg.network)
    check_execution(job)
    return CheckedJob(**{field.name: getattr(job, field.name) for field in fields(Job)})


def judge_config(facts: list[Facts]) -> list[Finding]:
    """Every key is the same on all ranks. facts: `config`, of `Job.flat`."""
    keys = dict.fromkeys(key for one in facts for key in one["config"])
    unlike = {key: text for key in keys if (text := differing(facts, at("config", key)))}
    if unlike:
        listed = "; ".join(f"{key}: {text}" for key, text in list(unlike.items())[:5])
        return [Finding("config", FAIL, f"the ranks read different configs ({len(unlike)} keys): {listed}")]
    alike = f", the same on {len(facts)} ranks" if len(facts) > 1 else ""
    return [Finding("config", OK, f"{len(keys)} keys{alike}")]

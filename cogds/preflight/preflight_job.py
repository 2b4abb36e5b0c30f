"""The job to check, resolved as `train` resolves it, with what it needs of each machine. Loads no weights."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

from cogds.config.inputs import data_paths, prompt_files
from cogds.config.loading import to_dict
from cogds.core.checkpointing import BlockCheckpointing
from cogds.core.geometry import cached_caption_bytes
from cogds.core.memory import MemoryEstimate
from cogds.distributed.network import set_network
from cogds.distributed.world import World, gpu_memory
from cogds.job import Job, choose_checkpointing, load_job
from cogds.model.load import empty_transformer
from cogds.preflight.findings import FAIL, OK, Finding, RankResult, describe_differences
from cogds.train.tuning import check_execution

PREFETCH_FACTOR = 2  # DataLoader's default: batches that each worker keeps ready
MAX_LISTED_KEYS = 5


class PreflightJob(Job):
    """A job and its requirements: GPU memory, host memory, shared memory, disk space and paths."""

    @property
    def element_bytes(self) -> int:
        """Bytes per element of the transformer's weights."""
        return self.memory.element_bytes

    @cached_property
    def checkpointing(self) -> tuple[BlockCheckpointing, ...]:
        """Activation checkpointing of each bucket on this GPU."""
        return choose_checkpointing(self, self.batch_sizes, gpu_memory(self.world.device))

    @cached_property
    def estimates(self) -> tuple[MemoryEstimate, ...]:
        """Estimated GPU memory of each bucket."""
        return tuple(map(self.memory.estimate, self.buckets, self.batch_sizes, self.checkpointing))

    @cached_property
    def offloaded_bytes(self) -> int:
        """Host memory per rank for its share of the weights, 0 unless ZeRO-3 offloads parameters."""
        offload = self.ds_config.get("zero_optimization", {}).get("offload_param", {})
        if str(offload.get("device", "none")) != "cpu":
            return 0
        parameters = empty_transformer(self.model).parameters()
        return sum(-(-parameter.numel() // self.world.size) * self.element_bytes for parameter in parameters)

    @property
    def pinned_bytes(self) -> int:
        """Pinned host memory per rank for activations, in the bucket that needs the most."""
        return max(map(self.memory.pinned_host_bytes, self.buckets, self.batch_sizes, self.checkpointing))

    @property
    def largest_bucket(self) -> int:
        """Index of the bucket that needs the most GPU memory."""
        return max(range(len(self.buckets)), key=lambda index: self.estimates[index].total_bytes)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint (float32 weights and two moments) with its exported LoRA or model."""
        memory = self.memory
        num_exported = memory.trained.num_parameters if memory.trained.is_lora else memory.transformer.num_parameters
        return 12 * memory.trained.num_parameters + num_exported * self.element_bytes

    @property
    def shared_memory_bytes(self) -> int:
        """Size of the batches that one rank's loaders keep ready in /dev/shm, 0 without loaders."""
        if self.cfg.data.encode != "cached":
            return 0
        text_dim, geometry = self.memory.transformer.text_dim, self.model.geometry
        batches = (
            size * (self.memory.cached_clip_bytes(shape)
                    + cached_caption_bytes(geometry, text_dim, self.element_bytes))
            for shape, size in zip(self.buckets, self.batch_sizes)
        )  # fmt: skip
        return self.cfg.data.num_workers * PREFETCH_FACTOR * max(batches)

    @property
    def data_paths(self) -> dict[str, str]:
        """Paths that the run only reads, by config key."""
        return data_paths(self.cfg) | prompt_files(self.cfg)

    @property
    def shared_folders(self) -> dict[str, str]:
        """Folders that all ranks must share, by config key."""
        return {"output_dir": self.cfg.output_dir, "data.cache_dir": self.cfg.data.cache_dir}

    def flat_config(self) -> dict[str, Any]:
        """Return the run config and the DeepSpeed config as one dict with dotted keys."""
        return dict(_flatten(to_dict(self.cfg))) | {
            f"DeepSpeed's {key}": value for key, value in _flatten(self.ds_config)
        }


def _flatten(node: Any, path: str = "") -> Sequence[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        return [leaf for name, child in node.items() for leaf in _flatten(child, f"{path}.{name}".lstrip("."))]
    return [(path, node)]


def load_preflight_job(args: argparse.Namespace, world: World) -> PreflightJob:
    """Resolve the job as `train` does and set its network variables. Raises UserError if anything is invalid."""
    job = load_job(args, world)
    set_network(job.world, job.cfg.network)
    check_execution(job)
    return PreflightJob(**{field.name: getattr(job, field.name) for field in fields(Job)})


def assess_config(results: list[RankResult]) -> list[Finding]:
    """Every key must have the same value on all ranks. Reads `config`, from `PreflightJob.flat_config`."""
    keys = dict.fromkeys(key for result in results for key in result["config"])
    differences = {
        key: text
        for key in keys
        if (text := describe_differences(results, [result["config"].get(key) for result in results]))
    }
    if differences:
        listed = "; ".join(f"{key}: {text}" for key, text in list(differences.items())[:MAX_LISTED_KEYS])
        text = (
            f"{len(differences)} of {len(keys)} keys differ between ranks: {listed}. Start all ranks with the same "
            "files and arguments."
        )
        return [Finding("config", FAIL, text)]
    same = f", the same on {len(results)} ranks" if len(results) > 1 else ""
    return [Finding("config", OK, f"{len(keys)} keys{same}")]

"""Which buckets the VAE encodes in tiles, decided for all ranks of a run.

Tiles change an encoding a little, so they are part of its cache key. All ranks must therefore choose alike, even if
their GPUs differ.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cogds.distributed.collectives import all_gather, on_rank0
from cogds.distributed.world import gpu_memory
from cogds.job import Job, tiled_buckets


def choose_tiling(job: Job, saved: Mapping[str, Any] | None = None) -> Job:
    """Return the job with the tiles that its smallest GPU needs. Collective.

    Rank 0 decides; every rank follows. saved: header of the checkpoint that the run resumes from, if there is one.
    `data.vae_tiling=auto` keeps its choice, because other encodings would be other data.
    """
    memories = [gpu_bytes for gpu_bytes in all_gather(job.world, gpu_memory(job.world.device)) if gpu_bytes is not None]
    return dataclasses.replace(job, tiled=on_rank0(job.world, lambda: _choose(job, min(memories, default=None), saved)))


def _choose(job: Job, gpu_bytes: float | None, saved: Mapping[str, Any] | None) -> frozenset:
    if not saved or job.cfg.data.vae_tiling != "auto":
        return tiled_buckets(job.cfg, job.model, job.buckets, gpu_bytes)
    if "tiled" not in saved:  # of a version that chose without regard to the GPU, as for CPUs
        return tiled_buckets(job.cfg, job.model, job.buckets)
    return frozenset(shape for shape in job.buckets if str(shape) in saved["tiled"])

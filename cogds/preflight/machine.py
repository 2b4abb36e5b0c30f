"""The disks and memory of each node, and the GPU of each rank."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from cogds.config.deepspeed import zero_stage
from cogds.config.schema import RunConfig
from cogds.data.cache.local_copy import default_folder
from cogds.data.storage.location import is_url
from cogds.formatting import counted, gigabytes
from cogds.preflight.findings import (
    FAIL,
    OK,
    WARN,
    Finding,
    RankResult,
    describe_differences,
    describe_ranks,
    group_by_value,
)
from cogds.preflight.preflight_job import PreflightJob
from cogds.process.host_memory import available_memory_bytes

# More than the context of our own process: another process uses the GPU.
OCCUPIED_BYTES = 2_000_000_000
LOW_CACHE_BYTES = 5_000_000_000
LOW_TMP_BYTES = 1_000_000_000
SHARED_MEMORY = "/dev/shm"


def free_bytes(path: str) -> int:
    """Return the free space of the file system of a path that may not exist yet."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def inspect_disk(job: PreflightJob) -> RankResult:
    """Return `disk` of this node: [path, free bytes, needed bytes] of `output`, `cache`, `tmp`, `shm` and `memory`.

    Only the first rank of each node looks; the result of the others is empty.
    """
    if job.world.local_rank:
        return {"disk": {}}
    cfg, num_local = job.cfg, job.world.local_size
    num_kept = cfg.checkpoint.keep_last + (
        cfg.train.num_steps // cfg.checkpoint.keep_every if cfg.checkpoint.keep_every else 0
    )
    # Weights are loaded tensor by tensor, directly onto the device. At stage 3 each rank loads its share, which takes
    # host memory if parameters are offloaded. Below stage 3 it loads all weights, which takes host memory on CPUs.
    if zero_stage(job.ds_config) == 3:
        weights_bytes = job.offloaded_bytes * num_local
    elif job.world.device.type == "cpu":
        weights_bytes = job.memory.transformer.num_parameters * job.element_bytes * num_local
    else:
        weights_bytes = 0
    rank_bytes = job.pinned_bytes + job.memory.offloaded_optimizer_bytes
    return {
        "disk": {
            "output": [cfg.output_dir, free_bytes(cfg.output_dir), job.checkpoint_bytes * (num_kept + 1)],
            "num_checkpoints": num_kept + 1,
            **cache_disk(cfg),
            "tmp": [tempfile.gettempdir(), free_bytes(tempfile.gettempdir()), LOW_TMP_BYTES],
            "shm": [SHARED_MEMORY, free_bytes(SHARED_MEMORY), job.shared_memory_bytes * num_local],
            "memory": ["host memory", available_memory_bytes(), weights_bytes + rank_bytes * num_local],
        }
    }


def cache_disk(cfg: RunConfig) -> dict[str, list]:
    """Return the disk that the cache needs: shared, or on each node if the cache is at a URL."""
    if not is_url(cfg.data.cache_dir):
        return {"cache": [cfg.data.cache_dir, free_bytes(cfg.data.cache_dir), LOW_CACHE_BYTES]}
    folder = cfg.data.local_cache_dir or default_folder()
    return {"local_cache": [folder, free_bytes(folder), cfg.data.local_cache_gb * 1e9]}


def assess_disk(results: list[RankResult]) -> list[Finding]:
    """Checkpoints, cache, temporary files, loaders, weights and offloaded activations must fit."""
    findings, nodes = [], [result for result in results if result["disk"]]
    if not nodes:
        return []
    first = nodes[0]["disk"]
    path, free, needed = first["output"]
    text = (
        f"output_dir: {gigabytes(free)} free at {path}; {counted(first['num_checkpoints'], 'checkpoint')} with LoRAs "
        f"need {gigabytes(needed)}"
    )
    if free < needed:
        text += ". Free disk space, use another folder, or lower checkpoint.keep_last."
    findings.append(Finding("disk", FAIL if free < needed else OK, text))
    if "cache" in first:
        path, free, low = first["cache"]
        text = f"data.cache_dir: {gigabytes(free)} free at {path}; `cogds report` estimates how much the clips need"
        findings.append(Finding("disk", WARN if free < low else OK, text))
    for key, level, advice in (
        ("tmp", WARN, "Set TMPDIR to a folder with more space for temporary files."),
        ("local_cache", WARN, "Set data.local_cache_dir to a larger disk, or lower data.local_cache_gb."),
        ("shm", FAIL, "Give the container more (--shm-size), or lower data.num_workers."),
        ("memory", WARN, "The weights and the activations of full+offload need it: use fewer ranks per node."),
    ):
        if key not in first:
            continue
        short = [node for node in nodes if node["disk"][key][1] < node["disk"][key][2]]
        path, free, needed = min((node["disk"][key] for node in nodes), key=lambda values: values[1] - values[2])
        text = f"{path}: {gigabytes(free)} free, {gigabytes(needed)} needed"
        if short:
            text += f" on {describe_ranks(short)}. {advice}"
        findings.append(Finding("disk", level if short else OK, text))
    return findings


def inspect_gpu(job: PreflightJob) -> RankResult:
    """Return `gpu`: name, id, total, free and needed bytes, and the number of visible GPUs.

    Without a GPU it is None, and `cuda` is the version of CUDA that PyTorch is built with, None for a build for CPUs.
    """
    device = job.world.device
    if device.type != "cuda":
        return {"gpu": None, "cuda": torch.version.cuda or torch.version.hip}
    properties: Any = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    estimate = job.estimates[job.largest_bucket]
    return {
        "gpu": {
            "name": properties.name,
            "id": str(getattr(properties, "uuid", "") or getattr(properties, "pci_bus_id", "")),
            "total": total,
            "free": free,
            "needed": estimate.total_bytes - estimate.cuda_context_bytes,
            "bucket": str(job.buckets[job.largest_bucket]),
            "num_visible": torch.cuda.device_count(),
        },
        "num_local": job.world.local_size,
    }


def assess_gpu(results: list[RankResult]) -> list[Finding]:
    """Every rank must have a GPU of its own. They should be of the same kind, unused, and large enough by estimate."""
    without_gpu = [result for result in results if not result["gpu"]]
    if len(without_gpu) == len(results):
        is_cpu_build = not any(result["cuda"] for result in results)
        cause = (
            "This PyTorch is a build for CPUs: install one for CUDA"
            if is_cpu_build
            else "Check nvidia-smi, the driver, CUDA_VISIBLE_DEVICES, and that the job or container was given GPUs"
        )
        text = f"no GPU is seen on any rank, so the run trains on CPUs, which only suits tiny models. {cause}."
        return [Finding("gpu", WARN, text)]
    if without_gpu:
        text = (
            f"no GPU is visible on {describe_ranks(without_gpu)}, but the other ranks have one. Check nvidia-smi there."
        )
        return [Finding("gpu", FAIL, text)]
    findings = []
    by_gpu: dict[tuple[str, str], list[RankResult]] = {}
    for result in results:
        by_gpu.setdefault((result["host"], result["gpu"]["id"]), []).append(result)
    for sharing in by_gpu.values():
        if len(sharing) > 1 and sharing[0]["gpu"]["id"]:
            text = (
                f"{describe_ranks(sharing)} use the same GPU. Start one rank per GPU, and check CUDA_VISIBLE_DEVICES."
            )
            findings.append(Finding("gpu", FAIL, text))
    if kinds := describe_differences(results, [result["gpu"]["name"] for result in results]):
        findings.append(Finding("gpu", WARN, f"different kinds of GPUs; the slowest determines the speed: {kinds}"))
    occupied = [result for result in results if result["gpu"]["total"] - result["gpu"]["free"] > OCCUPIED_BYTES]
    if occupied:
        used = max(result["gpu"]["total"] - result["gpu"]["free"] for result in occupied)
        text = (
            f"up to {gigabytes(used)} already in use on {describe_ranks(occupied)}. End the other processes on these "
            "GPUs."
        )
        findings.append(Finding("gpu", WARN, text))
    idle = [result for result in results if result["gpu"]["num_visible"] > result["num_local"]]
    counts = [(result["gpu"]["num_visible"], result["num_local"]) for result in idle]
    for (num_gpus, num_ranks), group in group_by_value(idle, counts):
        text = (
            f"{num_gpus} GPUs but only {counted(num_ranks, 'rank')} per node on {describe_ranks(group)}. Start one "
            "rank per GPU to use all of them."
        )
        findings.append(Finding("gpu", WARN, text))
    tightest = min(results, key=lambda result: result["gpu"]["free"] - result["gpu"]["needed"])["gpu"]
    text = (
        f"{tightest['name']}: {gigabytes(tightest['free'])} free, {tightest['bucket']} needs about "
        f"{gigabytes(tightest['needed'])} (estimate)"
    )
    findings.append(Finding("gpu", WARN if tightest["free"] < tightest["needed"] else OK, text))
    return findings

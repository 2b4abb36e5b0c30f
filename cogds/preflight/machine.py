"""What every node has: disk, shared memory and memory, and every rank's GPU."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from cogds.config.deepspeed import zero_stage
from cogds.formatting import counted, gigabytes
from cogds.preflight.finding import FAIL, OK, WARN, Facts, Finding, at, by_value, differing, who
from cogds.preflight.job import CheckedJob

# More than this in use on a GPU is more than a process's own context.
OCCUPIED_BYTES = 2_000_000_000
LOW_CACHE_BYTES = 5_000_000_000
LOW_TMP_BYTES = 1_000_000_000
SHARED_MEMORY = "/dev/shm"


def free_bytes(path: str) -> int:
    """Free space of the disk that a path is on, or would be made on."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def available_memory_bytes() -> int:
    """Memory that new processes may take: the machine's, or less where a control group says so. 0: not known."""
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return 0
    available = int(match.group(1)) * 1024 if match else 0
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            root = Path("/sys/fs/cgroup")
            available = min(available, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return max(available, 0)


def look_disk(job: CheckedJob) -> Facts:
    """Free and needed bytes of this node: `output`, `cache`, `tmp`, `shm` and `memory`. {} but on one rank a node."""
    if job.world.local_rank:
        return {"disk": {}}
    cfg, num_local = job.cfg, job.world.local_size
    kept = cfg.checkpoint.keep_last + (
        cfg.train.num_steps // cfg.checkpoint.keep_every if cfg.checkpoint.keep_every else 0
    )
    # Weights are read one by one onto the device: below stage 3 every rank's whole, which is memory where there is no
    # GPU; at stage 3 its share, which is memory where parameters are offloaded.
    if zero_stage(job.ds_config) == 3:
        loading = job.offloaded_bytes * num_local
    else:
        loading = job.memory.transformer.num_parameters * job.bytes_each * num_local * (job.world.device.type == "cpu")
    return {
        "disk": {
            "output": [cfg.output_dir, free_bytes(cfg.output_dir), job.checkpoint_bytes * (kept + 1)],
            "checkpoints": kept + 1,
            "cache": [cfg.data.cache_dir, free_bytes(cfg.data.cache_dir), LOW_CACHE_BYTES],
            "tmp": [tempfile.gettempdir(), free_bytes(tempfile.gettempdir()), LOW_TMP_BYTES],
            "shm": [SHARED_MEMORY, free_bytes(SHARED_MEMORY), job.shared_memory_bytes * num_local],
            "memory": ["memory", available_memory_bytes(), loading + job.pinned_bytes * num_local],
        }
    }


def judge_disk(facts: list[Facts]) -> list[Finding]:
    """There is room for checkpoints, the cache, temporary files, loaders, the loading of weights and activations."""
    found, nodes = [], [one for one in facts if one["disk"]]
    if not nodes:
        return []
    first = nodes[0]["disk"]
    path, free, needed = first["output"]
    kept = f"{first['checkpoints']} checkpoints and LoRAs take {gigabytes(needed)}"
    text = f"{gigabytes(free)} are free at output_dir {path}; {kept}"
    found.append(Finding("disk", FAIL if free < needed else OK, text))
    path, free, low = first["cache"]
    found.append(
        Finding("disk", WARN if free < low else OK, f"{gigabytes(free)} are free at data.cache_dir {path}; "
                "what clips take is told by launch/report.py")
    )  # fmt: skip
    for key, level, why in (
        ("tmp", WARN, "for temporary files: set TMPDIR"),
        ("shm", FAIL, "for what the loaders have ready: give the container --shm-size, or lower data.num_workers"),
        ("memory", WARN, "for the weights and what full+offload keeps there"),
    ):
        short = [one for one in nodes if one["disk"][key][1] < one["disk"][key][2]]
        path, free, needed = min((one["disk"][key] for one in nodes), key=lambda disk: disk[1] - disk[2])
        where = f" on {who(short)}, {why}" if short else ""
        sizes = f"{gigabytes(free)} are free, {gigabytes(needed)} are needed"
        found.append(
            Finding(
                "disk",
                level if short else OK,
                f"{path}: {sizes}{where}",
            )
        )
    return found


def look_gpu(job: CheckedJob) -> Facts:
    """`gpu`: name, uuid, total, free and needed bytes, and how many GPUs the rank sees; None without one."""
    device = job.world.device
    if device.type != "cuda":
        return {"gpu": None}
    properties: Any = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    estimate = job.estimates[job.largest]
    return {
        "gpu": {
            "name": properties.name,
            "id": str(getattr(properties, "uuid", "") or getattr(properties, "pci_bus_id", "")),
            "total": total,
            "free": free,
            "needed": estimate.total_bytes - estimate.cuda_context_bytes,
            "bucket": str(job.buckets[job.largest]),
            "num_visible": torch.cuda.device_count(),
        },
        "num_local": job.world.local_size,
    }


def judge_gpu(facts: list[Facts]) -> list[Finding]:
    """A GPU for every rank, its own, of one kind, with nothing else on it, and large enough by the estimate."""
    without = [one for one in facts if not one["gpu"]]
    if len(without) == len(facts):
        return [Finding("gpu", OK, "no rank sees a GPU: all of them train on the CPU")]
    if without:
        return [Finding("gpu", FAIL, f"{who(without)} see no GPU, the others do")]
    found = []
    by_gpu: dict[tuple[str, str], list[Facts]] = {}
    for one in facts:
        by_gpu.setdefault((one["host"], one["gpu"]["id"]), []).append(one)
    for sharing in by_gpu.values():
        if len(sharing) > 1 and sharing[0]["gpu"]["id"]:
            found.append(
                Finding("gpu", FAIL, f"{who(sharing)} are on the same GPU: start as many ranks as there are GPUs, and "
                        "look at CUDA_VISIBLE_DEVICES")
            )  # fmt: skip
    if kinds := differing(facts, at("gpu", "name")):
        found.append(Finding("gpu", WARN, f"GPUs of several kinds, the slowest sets the pace: {kinds}"))
    occupied = [one for one in facts if one["gpu"]["total"] - one["gpu"]["free"] > OCCUPIED_BYTES]
    if occupied:
        used = max(one["gpu"]["total"] - one["gpu"]["free"] for one in occupied)
        found.append(
            Finding("gpu", WARN, f"{gigabytes(used)} are in use already on {who(occupied)}: something else runs there")
        )
    idle = [one for one in facts if one["gpu"]["num_visible"] > one["num_local"]]
    for (num, local), group in by_value(idle, lambda one: (one["gpu"]["num_visible"], one["num_local"])):
        found.append(
            Finding("gpu", WARN, f"{num} GPUs, but {counted(local, 'rank')} a node on {who(group)}: GPUs stay idle")
        )
    least = min(facts, key=lambda one: one["gpu"]["free"] - one["gpu"]["needed"])["gpu"]
    estimate = f"{least['bucket']} takes about {gigabytes(least['needed'])} (an estimate)"
    text = f"{least['name']}: {gigabytes(least['free'])} free, {estimate}"
    found.append(Finding("gpu", WARN if least["free"] < least["needed"] else OK, text))
    return found

"""The encode verb: encode a dataset before training, or maintain the cache."""

import argparse
import json
import logging
from collections.abc import Mapping
from functools import partial

from cogds.config.loading import load_config
from cogds.data.cache.maintenance import VerifyReport, prune, stats, verify
from cogds.distributed.collectives import on_rank0
from cogds.distributed.process_group import connect, disconnect
from cogds.distributed.world import read_world
from cogds.encode.encoder import encode_dataset
from cogds.encode.pruning import prune_unused
from cogds.encode.tiling import choose_tiling
from cogds.errors import refuse_to_run
from cogds.formatting import counted, gigabytes
from cogds.job import load_job
from cogds.model.cudnn import check_cudnn
from cogds.process.logs import RESULT
from cogds.process.signals import StopRequest, find_launchers

logger = logging.getLogger(__name__)

# What `stats` counts besides entries -> what it means.
STATS_NOTES = {
    "failures": "could not be decoded; --retry tries them again",
    "duplicates": "entries stored twice; --prune removes the copies",
    "damaged": "files that cannot be read; --verify removes them",
    "old": "files of an old version; --prune removes them",
}


def main(args: argparse.Namespace) -> None:
    """Encode what the run's dataset lacks, or maintain the cache."""
    if args.stats or args.verify:
        cache_dir = load_config(args.config, args.overrides)[0].data.cache_dir
        if args.stats:
            counts = stats(cache_dir)
            print(json.dumps(counts, indent=2) if args.json else "\n".join(stats_table(cache_dir, counts)))
        if args.verify:
            print_verified(verify(cache_dir, show_progress=True))
        return
    job = load_job(args, read_world(), changes={"data.encode": "cached"})
    check_cudnn(job.world.device, job.dtype)
    cfg, world, cache_dir = job.cfg, job.world, job.cfg.data.cache_dir
    StopRequest(find_launchers()).listen()  # the cache keeps every shard that was written
    connect(world, cfg.train.timeout_s, cfg.network)
    on_rank0(world, partial(job.make_folders, with_output=False))
    if args.retry:
        on_rank0(world, partial(prune, cache_dir, failed=True, shard_bytes=int(cfg.data.shard_gb * 1e9)))
    data = encode_dataset(choose_tiling(job), retry_failed=args.retry)
    if world.rank == 0:
        held_out = f", and {len(data.held_out)} for evaluation only" if data.held_out is not None else ""
        logger.log(RESULT, f"{counted(len(data.index), 'clip')} encoded in {cache_dir}{held_out}")
        if data.unusable.num:
            unusable = f"{counted(data.unusable.num, 'clip')} not usable"
            logger.log(RESULT, f"{unusable}, see {data.unusable.file}: {data.unusable.summary()}")
    if args.prune:
        on_rank0(world, partial(prune_unused, job, data, args.yes))
    disconnect()


def stats_table(cache_dir: str, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a line for each kind of entry, and notes about what can be removed. counts: from `stats`."""
    lines = [f"{cache_dir}: {gigabytes(sum(kind['bytes'] for kind in counts.values()))}"]
    width = max(map(len, counts), default=0)
    for kind, num in counts.items():
        entries = counted(num["entries"], "entry")
        lines.append(f"  {kind:{width}}  {entries}, {gigabytes(num['bytes'])} in {counted(num['shards'], 'file')}")
        for name, text in STATS_NOTES.items():
            if num[name]:
                lines.append(f"  {'':{width}}  {num[name]:,} {text}")
    return lines if counts else [f"{cache_dir}: no entries"]


def print_verified(report: VerifyReport) -> None:
    """Log the result of `verify`."""
    for entry in report.damaged:
        logger.log(RESULT, f"removed {entry.kind}/{entry.place} {entry.key}: {entry.reason}")
    logger.log(
        RESULT,
        f"{counted(report.num_entries, 'intact entry')} ({gigabytes(report.num_bytes)}), "
        f"{counted(report.num_failures, 'clip')} not decodable, {len(report.damaged)} damaged and removed (the next "
        "run encodes them again)",
    )


if __name__ == "__main__":
    refuse_to_run("cogds.encode.main", "encode")

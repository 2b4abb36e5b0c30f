"""The train verb."""

import argparse
import contextlib
import functools
from pathlib import Path

from cogds.config.loading import load_config
from cogds.core.rng import use_deterministic_kernels
from cogds.distributed.collectives import on_rank0
from cogds.distributed.process_group import connect, disconnect
from cogds.distributed.run_lock import hold_run_lock
from cogds.distributed.world import read_world
from cogds.errors import Interrupted, refuse_to_run
from cogds.job import load_job
from cogds.process.environment import make_cublas_deterministic
from cogds.process.signals import StopRequest, find_launchers
from cogds.train.trainer import Trainer
from cogds.train.tuning import check_execution
from cogds.videos.sample_spec import check_prompts

# A dry run evaluates nothing, and so encodes nothing. It checks memory on a CPU too.
DRY_RUN = {"train.memory_check": "on", "eval.every": None, "sample.every": None}


def main(args: argparse.Namespace) -> None:
    """Train. Errors in the input are reported before any weight is loaded."""
    job = load_job(args, read_world(), changes=DRY_RUN if args.dry_run else {}, evaluated_only=args.dry_run)
    if job.cfg.train.deterministic:
        make_cublas_deterministic()
        use_deterministic_kernels()
    check_execution(job)
    # As set, because a dry run makes no videos.
    check_prompts(load_config(args.config, args.overrides)[0], job.buckets, job.model.geometry)
    stop = StopRequest(find_launchers())
    stop.listen()
    connect(job.world, job.cfg.train.timeout_s, job.cfg.network)
    on_rank0(job.world, functools.partial(job.make_folders, with_output=not args.dry_run))
    try:
        with contextlib.nullcontext() if args.dry_run else hold_run_lock(job.world, Path(job.cfg.output_dir)):
            Trainer(job, stop, args.dry_run).run()
    except Interrupted:  # on all ranks
        stop.ignore()
        disconnect()
        raise
    disconnect()
    stop.close()


if __name__ == "__main__":
    refuse_to_run("cogds.train.main", "train")

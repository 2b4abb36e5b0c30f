"""The report verb: which clips will be trained, and at what cost. Loads no weights."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.config.schema import RunConfig
from cogds.core.geometry import ClipShape
from cogds.core.mixture import Mixture
from cogds.data.video.decode_task import DecodeTask, decode
from cogds.data.video.media import DecodeError
from cogds.distributed.world import World
from cogds.encode.captions import join_lists, list_lengths
from cogds.encode.clip_set import ClipSet, evaluation_clips, load_clip_set
from cogds.encode.encoder import check_decoder
from cogds.encode.scan_data import scan_data, scan_evaluation_data
from cogds.errors import refuse_to_run
from cogds.job import Job, choose_checkpointing, load_job
from cogds.model.load import ModelFolder, num_truncated
from cogds.process.worker_pool import TaskFailure, WorkerPool
from cogds.report.analysis import Captions, ClipTable, Report, TrainingSetup, make_report, read_rates
from cogds.report.html import FirstFrame, write_html
from cogds.report.text import print_report
from cogds.videos.sample_spec import check_prompts

logger = logging.getLogger(__name__)

# Of more captions than this, evenly spaced ones are tokenized and the count is extrapolated.
MAX_TOKENIZED = 100_000


def main(args: argparse.Namespace) -> None:
    """Print the report of a run, and with --html write it as a page too.

    Raises UserError after the report if training would not start with these clips.
    """
    job = load_job(args, World(0, 1, 0, 1), num_ranks=args.num_gpus)
    check_prompts(job.cfg.sample, job.buckets, job.model.geometry)
    clip_set = load_clip_set(job.cfg, scan_data(job.cfg, job.world), job.buckets)
    clips = clip_table(clip_set)
    report = run_report(job, clip_set, clips, args.gpu_memory * 1e9)
    print_report(report)
    if args.html:
        with frame_reader(job.cfg) as first_frame:
            write_html(args.html, report, clips, first_frame, job.cfg.seed, args.config)
        logger.info("wrote the page: %s", args.html)
    clip_set.check_not_empty()
    clip_set.unusable().check_share(job.cfg.data.max_unusable)
    for warning in evaluation_clips(job.cfg, clip_set, scan_evaluation_data(job.cfg, job.world))[-1]:
        logger.warning(warning)


def clip_table(clips: ClipSet) -> ClipTable:
    """The rows of the manifest, without held-out clips."""
    assignment = clips.assignment
    windows = np.bincount(assignment.rows, minlength=len(clips.table))
    table, buckets, frames, num_held_out = clips.table, assignment.row_buckets, assignment.row_frames, 0
    if clips.held_out is not None:
        left = np.ones(len(table), bool)
        left[clips.held_out.assignment.rows] = False
        table, buckets, frames, windows = table.filter(pa.array(left)), buckets[left], frames[left], windows[left]
        num_held_out = int((~left).sum())
    return ClipTable(table, buckets, frames, windows, num_held_out, clips.skipped)


def run_report(job: Job, clip_set: ClipSet, clips: ClipTable, gpu_bytes: float | None) -> Report:
    """The report of a run. gpu_bytes: memory of one GPU; None: on CPUs."""
    cfg, mixture = job.cfg, Mixture(clip_set.assignment.sizes, clip_set.repeats, job.cfg.seed)
    plan = job.plan(mixture) if clip_set.num_clips else None
    batch_sizes = plan.local_batch_sizes if plan else (1,) * len(job.buckets)
    setup = TrainingSetup(
        memory=job.memory,
        batch_sizes=batch_sizes,
        accumulation=cfg.train.gradient_accumulation_steps,
        checkpointing=choose_checkpointing(job, batch_sizes, gpu_bytes),
        is_cached=cfg.data.encode == "cached",
        epoch_sizes=mixture.virtual_sizes,
        steps_per_epoch=plan.steps_per_epoch if plan else 0.0,
        max_unusable=cfg.data.max_unusable,
        rates=read_rates(Path(cfg.output_dir) / "metrics.jsonl"),
        gpu_bytes=gpu_bytes,
    )
    return make_report(clips, setup, count_captions(clip_set.table, job.model))


def count_captions(table: pa.Table, model: ModelFolder) -> Captions:
    """Count missing, empty and distinct captions, and with the model's tokenizer those that are too long."""
    usable = table.filter(pc.equal(table.column("status"), "ok"))
    captions = join_lists(*(usable.column(name).combine_chunks() for name in ("caption", "more_captions")))
    lengths = list_lengths(captions)
    distinct = pc.unique(captions.flatten())
    taken = distinct
    if len(distinct) > MAX_TOKENIZED:
        taken = distinct.take(pa.array(np.linspace(0, len(distinct) - 1, MAX_TOKENIZED).astype(np.int64)))
    too_long = num_truncated(taken.to_pylist(), model)
    reasons = pc.fill_null(table.column("reason"), "")
    return Captions(
        num_missing=pc.sum(pc.starts_with(reasons, "caption missing")).as_py() or 0,
        num_empty=pc.sum(pc.starts_with(reasons, "caption empty")).as_py() or 0,
        num_too_long=round(too_long * len(distinct) / max(1, len(taken))),
        num_distinct=len(distinct),
        limit=model.geometry.text_tokens,
        per_clip=(int(lengths.min()), int(lengths.max()), float(lengths.mean())) if len(lengths) else (1, 1, 1.0),
    )


@contextmanager
def frame_reader(cfg: RunConfig) -> Iterator[FirstFrame]:
    """Read single frames in a worker process. A clip that crashes or hangs the worker gives None."""
    check_decoder(cfg)
    memory_bytes = round(cfg.data.decode_memory_gb * 1e9)
    with WorkerPool(decode, 1, cfg.data.decode_timeout_s, memory_bytes, (DecodeError,)) as pool:

        def read(path: str, kind: str, start_s: float, height: int, width: int) -> np.ndarray | None:
            shape = ClipShape(1, height, width)
            outcome = next(pool.imap([DecodeTask(path, kind, None, start_s, shape, cfg.data.fps, cfg.data.decoder)]))
            return None if isinstance(outcome, TaskFailure) else outcome.first_frame

        yield read


if __name__ == "__main__":
    refuse_to_run("cogds.report.main", "report")

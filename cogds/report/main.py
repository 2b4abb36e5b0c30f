"""The report verb: which clips will be trained, and at what cost. Loads no weights."""

import argparse
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.config.schema import RunConfig
from cogds.core.flops import GPUS, PEAK_TFLOPS
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
from cogds.model.load import ModelFolder, are_truncated
from cogds.process.worker_pool import TaskFailure, WorkerPool
from cogds.report.analysis import Captions, ClipTable, Report, TrainingSetup, estimate_rates, make_report, read_rates
from cogds.report.clips import ClipList, FrameRequest
from cogds.report.html import ReadFrames, write_html
from cogds.report.text import print_report
from cogds.videos.sample_spec import check_prompts

logger = logging.getLogger(__name__)

# Of more captions than this, evenly spaced ones are tokenized and the count is extrapolated.
MAX_TOKENIZED = 100_000
DEFAULT_GPU_BYTES = 80e9
MAX_WORKERS = 8


def main(args: argparse.Namespace) -> None:
    """Print the report of a run, and with --html write it as a page too.

    Raises UserError after the report if training would not start with these clips.
    """
    job = load_job(args, World(0, 1, 0, 1), num_ranks=args.num_gpus)
    check_prompts(job.cfg, job.buckets, job.model.geometry)
    clip_set = load_clip_set(job.cfg, scan_data(job.cfg, job.world), job.buckets)
    clips = clip_table(clip_set)
    gpu = GPUS[args.gpu] if args.gpu else None
    gpu_bytes = 1e9 * args.gpu_memory if args.gpu_memory else gpu.memory_bytes if gpu else DEFAULT_GPU_BYTES
    report = run_report(job, clip_set, clips, gpu_bytes, gpu.device if gpu else None, prefers_estimate=bool(gpu))
    print_report(report)
    if args.html:
        with frame_reader(job.cfg) as read_frames:
            config = " + ".join(args.config)
            write_html(args.html, report, clips, clip_list(clip_set, job.model), read_frames, config)
        logger.info("wrote the page: %s", args.html)
    clip_set.check_not_empty()
    clip_set.unusable().check_share(job.cfg.data.max_unusable)
    for warning in evaluation_clips(job.cfg, clip_set, scan_evaluation_data(job.cfg, job.world))[-1]:
        logger.warning(warning)


def clip_table(clips: ClipSet) -> ClipTable:
    """The rows of the manifest, without held-out clips."""
    assignment = clips.assignment
    windows, mirrored = _num_samples(clips, slice(None)), _num_samples(clips, clips.assignment.mirrored)
    table, buckets, frames, num_held_out = clips.table, assignment.row_buckets, assignment.row_frames, 0
    if clips.held_out is not None:
        left = np.ones(len(table), bool)
        left[clips.held_out.assignment.rows] = False
        table = table.filter(pa.array(left))
        buckets, frames, windows, mirrored = buckets[left], frames[left], windows[left], mirrored[left]
        num_held_out = int((~left).sum())
    return ClipTable(table, buckets, frames, windows, num_held_out, clips.skipped, mirrored)


def clip_list(clips: ClipSet, model: ModelFolder) -> ClipList:
    """All clips of the manifest, for the page."""
    assignment, windows = clips.assignment, _num_samples(clips, ~clips.assignment.mirrored)
    is_held_out = np.zeros(len(clips.table), bool)
    if clips.held_out is not None:
        is_held_out[clips.held_out.assignment.rows] = True
    return ClipList(
        clips.table, assignment.row_buckets, assignment.row_frames, windows, is_held_out, clips.buckets,
        functools.partial(are_truncated, model=model),
    )  # fmt: skip


def _num_samples(clips: ClipSet, which: slice | np.ndarray) -> np.ndarray:
    """int [num_rows]: number of samples of each row, of those samples that are selected."""
    return np.bincount(clips.assignment.rows[which], minlength=len(clips.table))


def run_report(
    job: Job,
    clip_set: ClipSet,
    clips: ClipTable,
    gpu_bytes: float | None,
    device: str | None = None,
    prefers_estimate: bool = False,
) -> Report:
    """The report of a run.

    gpu_bytes: memory of one GPU; None: on CPUs. device: name of the GPU, to estimate the time if no earlier run in the
    output folder measured it. prefers_estimate: estimate it in any case.
    """
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
        has_own_buckets=bool(cfg.data.buckets),
        num_steps=cfg.train.num_steps,
        rates=None if prefers_estimate else read_rates(Path(cfg.output_dir) / "metrics.jsonl"),
        gpu_bytes=gpu_bytes,
        model_notes=model_notes(job),
    )
    if setup.rates is None and device in PEAK_TFLOPS:
        setup = replace(setup, rates=estimate_rates(setup, device))
    return make_report(clips, setup, count_captions(clip_set.table, job.model))


def model_notes(job: Job) -> list[str]:
    """Say where frame rate and buckets differ from what a 1.0 model was trained for. 1.5 was trained at many sizes."""
    geometry, fps = job.model.geometry, job.cfg.data.fps
    if geometry.patch_size_t:
        return []
    size, trained_fps = geometry.trained_size, geometry.trained_fps
    notes = [] if fps == trained_fps else [f"data.fps={fps:g}, but the model was trained at {trained_fps:g} frames/s."]
    if others := [str(shape) for shape in job.buckets if shape.frames > 1 and shape != size]:
        notes.append(f"The model was trained only at {size}, but there are other buckets, such as {others[0]}.")
    return notes


def count_captions(table: pa.Table, model: ModelFolder) -> Captions:
    """Count missing, empty and distinct captions, and with the model's tokenizer those that are too long."""
    usable = table.filter(pc.equal(table.column("status"), "ok"))
    captions = join_lists(*(usable.column(name).combine_chunks() for name in ("caption", "more_captions")))
    lengths = list_lengths(captions)
    distinct = pc.unique(captions.flatten())
    taken = distinct
    if len(distinct) > MAX_TOKENIZED:
        taken = distinct.take(pa.array(np.linspace(0, len(distinct) - 1, MAX_TOKENIZED).astype(np.int64)))
    too_long = sum(are_truncated(taken.to_pylist(), model))
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
def frame_reader(cfg: RunConfig) -> Iterator[ReadFrames]:
    """Read single frames in worker processes. A clip that crashes or hangs its worker gives None."""
    check_decoder(cfg)
    memory_bytes = round(cfg.data.decode_memory_gb * 1e9)
    num_workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    with WorkerPool(decode, num_workers, cfg.data.decode_timeout_s, memory_bytes, (DecodeError,)) as pool:

        def task(request: FrameRequest) -> DecodeTask:
            path, kind, start_s, height, width = request
            return DecodeTask(path, kind, None, start_s, ClipShape(1, height, width), cfg.data.fps, cfg.data.decoder)

        def read(requests: Sequence[FrameRequest]) -> Iterator[np.ndarray | None]:
            for outcome in pool.imap(map(task, requests), ahead=num_workers):
                yield None if isinstance(outcome, TaskFailure) else outcome.first_frame

        yield read


if __name__ == "__main__":
    refuse_to_run("cogds.report.main", "report")

"""The report command: what will be trained and what will not, before the first GPU hour. It loads no weights."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.cli import parse_args
from cogds.config import RunConfig, load_config
from cogds.core.geometry import ClipShape
from cogds.core.mixture import Mixture
from cogds.data.decode import DecodeTask, decode
from cogds.data.pool import Failure, GuardedPool
from cogds.errors import UserError, refuse_to_run
from cogds.model.load import ModelFolder, find_model, num_truncated
from cogds.model.sequence import check_sequence
from cogds.prepare.demo import make_demo, only_own_demo
from cogds.prepare.encoding import check_decoder
from cogds.prepare.order import make_plan
from cogds.prepare.survey import Survey, make_buckets, survey, update_manifest
from cogds.report.facts import Captions, ClipTable, Report, Setup, make_report, measured_rates
from cogds.report.html import FirstFrame, write_html
from cogds.report.text import print_report
from cogds.runtime.ds_config import load_ds_config, resolve
from cogds.runtime.world import World
from cogds.training.execution import Sizes, choose_levels

# More captions than this are not all tokenized: as many are taken, evenly spaced, and counted for the rest.
MAX_TOKENIZED = 100_000


def main(default_deepspeed: Path, default_config: Path, argv: list[str] | None = None) -> None:
    """Print the report of a run, and with --html write it as a page too."""
    args = parse_args(
        sys.argv[1:] if argv is None else argv,
        "Tell what a run will train and what not. Loads no weights and trains nothing.",
        _add_arguments,
    )
    if args.num_gpus < 1:
        raise UserError(f"--num_gpus is {args.num_gpus} on the command line: it must be at least 1")
    if args.gpu_memory <= 0:
        raise UserError(f"--gpu_memory is {args.gpu_memory:g} on the command line: it must be more than 0, in GB")
    cfg, explicit = load_config(args.config or str(default_config), args.overrides)
    if not args.config:
        cfg = only_own_demo(cfg, args.overrides)
    ds_path = args.deepspeed or str(default_deepspeed)
    ds_config = load_ds_config(ds_path)
    make_demo(cfg)
    model = find_model(cfg.model.path, cfg.model.revision)
    check_sequence(cfg.parallel.sequence, args.num_gpus, model.transformer_config["num_attention_heads"])
    buckets = make_buckets(cfg, model)
    ds_config, cfg = resolve(ds_config, cfg, explicit, args.num_gpus, model.hidden_size, ds_path)
    manifest = update_manifest(cfg, World(0, 1, 0, 1), digests=False)
    found = survey(cfg, manifest, buckets)
    clips = clip_table(found)
    report = run_report(cfg, ds_config, model, found, clips, args.num_gpus, args.gpu_memory * 1e9)
    print_report(report)
    if args.html:
        with frame_reader(cfg) as first_frame:
            write_html(Path(args.html), report, clips, first_frame, cfg.seed, args.config or str(default_config))
        print(f"the same with pictures: {args.html}")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_gpus", metavar="N", type=int, default=1, help="how many GPUs the run will have")
    parser.add_argument("--gpu_memory", metavar="GB", type=float, default=80.0, help="memory of one GPU (80)")
    parser.add_argument("--html", metavar="REPORT.html", help="write the report as a page with plots and pictures, too")


def clip_table(found: Survey) -> ClipTable:
    """The survey's rows as the report takes them: without those that are held out."""
    placement = found.placement
    windows = np.bincount(placement.rows, minlength=len(found.table))
    table, buckets, frames, num_held_out = found.table, placement.row_buckets, placement.row_frames, 0
    if found.held_out is not None:
        left = np.ones(len(table), bool)
        left[found.held_out.placement.rows] = False
        table, buckets, frames, windows = table.filter(pa.array(left)), buckets[left], frames[left], windows[left]
        num_held_out = int((~left).sum())
    return ClipTable(table, buckets, frames, windows, num_held_out)


def run_report(
    cfg: RunConfig,
    ds_config: dict[str, Any],
    model: ModelFolder,
    found: Survey,
    clips: ClipTable,
    num_ranks: int,
    gpu_bytes: float | None,
) -> Report:
    """The report of a run with a resolved DeepSpeed config. gpu_bytes: memory of one GPU; None: on CPUs."""
    sizes = Sizes.of(cfg, model)
    mixture = Mixture(found.placement.sizes, found.repeats, cfg.seed)
    data_ranks = num_ranks // cfg.parallel.sequence
    plan = make_plan(cfg, mixture, found.buckets, model, data_ranks) if found.num_windows else None
    sizes_of_batches = plan.local_batch_sizes if plan else (1,) * len(found.buckets)
    setup = Setup(
        buckets=found.buckets,
        geometry=model.geometry,
        batch_sizes=sizes_of_batches,
        num_ranks=num_ranks,
        accumulation=cfg.train.gradient_accumulation_steps,
        zero=ds_config.get("zero_optimization", {}),
        transformer=sizes.transformer,
        lora=sizes.lora,
        vae=model.vae_size,
        precision=cfg.train.precision,
        levels=choose_levels(cfg, ds_config, model, found.buckets, sizes_of_batches, num_ranks, gpu_bytes),
        cached=cfg.data.encode == "cached",
        epoch_sizes=mixture.virtual_sizes,
        steps_per_epoch=plan.steps_per_epoch if plan else 0.0,
        max_unusable=cfg.data.max_unusable,
        rates=measured_rates(Path(cfg.output_dir) / "metrics.jsonl"),
        base=cfg.model.base,
        matmul=cfg.model.matmul,
        sequence=cfg.parallel.sequence,
        gpu_bytes=gpu_bytes,
    )
    return make_report(clips, setup, count_captions(found.table, model))


def count_captions(table: pa.Table, model: ModelFolder) -> Captions:
    """What the manifest says of captions. Those that are too long are counted with the model's tokenizer."""
    column, usable = table.column("caption"), pc.equal(table.column("status"), "ok")
    distinct = pc.unique(column.filter(usable).drop_null())
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
    )


@contextmanager
def frame_reader(cfg: RunConfig) -> Iterator[FirstFrame]:
    """What reads single frames in a child process that may crash or hang: such a clip has no picture."""
    check_decoder(cfg)
    memory_bytes = round(cfg.data.decode_memory_gb * 1e9)
    with GuardedPool(decode, 1, cfg.data.decode_timeout_s, memory_bytes) as pool:

        def read(path: str, kind: str, start_s: float, height: int, width: int) -> np.ndarray | None:
            shape = ClipShape(1, height, width)
            outcome = next(pool.imap([DecodeTask(path, kind, None, start_s, shape, cfg.data.fps, cfg.data.decoder)]))
            return None if isinstance(outcome, Failure) else outcome.first_frame

        yield read


if __name__ == "__main__":
    refuse_to_run("cogds.report.main", "report")

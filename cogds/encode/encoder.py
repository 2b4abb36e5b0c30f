"""From a data set to encoded clips that can be trained: scan, assign to buckets, encode what the cache lacks, index.

What depends only on the clip and the model is computed once and kept: the moments of the VAE's posterior, the pixels
of the first frame (their noise is drawn at every step, before the VAE), and the T5 states of the caption. The ranks
share the work by its cost.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pyarrow as pa
import torch

from cogds.config.schema import RunConfig
from cogds.core.conditioning import normalize_pixels
from cogds.core.geometry import ClipShape
from cogds.data.cache.store import Cache, CacheWriter
from cogds.data.video.decode_task import DecodedClip, DecodeTask, decode
from cogds.data.video.media import DecodeError
from cogds.data.video.probe_task import categorize
from cogds.distributed.collectives import on_all_ranks, on_rank0, rank0_only, scatter_from_rank0
from cogds.distributed.world import World
from cogds.encode.cache_keys import is_tiled
from cogds.encode.clip_set import ClipSet, evaluation_clips, load_clip_set
from cogds.encode.encoding_plan import EncodedData, EncodingPlan
from cogds.encode.scan_data import scan_data, scan_evaluation_data
from cogds.errors import UserError
from cogds.model.load import DTYPES, ModelFolder, TextEncoder, load_vae
from cogds.process.progress import progress_bar
from cogds.process.worker_pool import TaskFailure, WorkerPool

logger = logging.getLogger(__name__)


def encode_dataset(
    cfg: RunConfig,
    model: ModelFolder,
    buckets: tuple[ClipShape, ...],
    world: World,
    *,
    max_unusable: float = 1.0,
    retry_failed: bool = False,
    on_selected: Callable[[ClipSet], None] = lambda _: None,
) -> EncodedData:
    """Scan a run's data sets and encode what the cache lacks. Collective; all ranks return the same.

    A file that cannot be used is among `unusable`, and never ends the run.

    Args:
        max_unusable: share of the clips that may be unusable.
        retry_failed: open files again that could not be used in an earlier run.
        on_selected: called on rank 0 with the clips to train, before anything is encoded.

    Raises:
        UserError: no clip is left, more than `max_unusable` are unusable, or the decoder that is needed is not
            installed.
    """
    manifest = scan_data(cfg, world, retry_failed)
    eval_manifest = scan_evaluation_data(cfg, world, retry_failed)

    def make_plan() -> EncodingPlan:
        clips = load_clip_set(cfg, manifest, buckets)
        clips.check_not_empty()
        on_selected(clips)
        clips.unusable().check_share(max_unusable)
        held_out, trained, warnings = evaluation_clips(cfg, clips, eval_manifest)
        for warning in warnings:
            logger.warning(warning)
        return EncodingPlan(cfg, model, clips, held_out, trained)

    plan = cast(EncodingPlan, rank0_only(world, make_plan))  # None on the other ranks, which do not use it
    work = scatter_from_rank0(world, lambda: plan.work(world.size))
    cache, shard_bytes = Cache(cfg.data.cache_dir), int(cfg.data.shard_gb * 1e9)

    def check() -> None:  # before any weight is loaded
        if len(work.clips) or cfg.data.encode != "cached":
            check_decoder(cfg)

    def encode_own_captions() -> None:
        if len(work.captions):
            with cache.writer("captions", shard_bytes) as writer:
                encode_captions(work.captions, writer, model, cfg, world)

    def encode_own_clips() -> dict[bytes, str]:
        if not len(work.clips):
            return {}
        with cache.writer("clips", shard_bytes) as writer:
            return encode_clips(work.clips, writer, buckets, model, cfg, world)

    on_all_ranks(world, check)
    on_all_ranks(world, encode_own_captions)
    failures = {key: reason for share in on_all_ranks(world, encode_own_clips) for key, reason in share.items()}
    if world.device.type == "cuda":
        torch.cuda.empty_cache()

    def finish() -> EncodedData:
        data = plan.finish(failures)
        data.unusable.check_share(max_unusable)
        return data

    return on_rank0(world, finish)


def encode_captions(captions: pa.Table, writer: CacheWriter, model: ModelFolder, cfg: RunConfig, world: World) -> None:
    """Encode captions (`EncodingWork.captions`) into the cache."""
    encoder = TextEncoder(model, DTYPES[cfg.train.precision], world.device)
    rows = zip(captions.column("key").to_pylist(), captions.column("caption").to_pylist())
    for key, caption in progress_bar("encoding captions", "caption", len(captions), items=rows):
        writer.write(key.hex(), {"text_states": encoder.encode(caption)})


@torch.no_grad()
def encode_clips(
    clips: pa.Table, writer: CacheWriter, buckets: Sequence[ClipShape], model: ModelFolder, cfg: RunConfig, world: World
) -> dict[bytes, str]:
    """Encode clips (`EncodingWork.clips`) into the cache. Worker processes decode them ahead of the VAE.

    A clip that cannot be decoded is recorded in the cache, so that no later run tries it again.

    Returns:
        The keys of the clips that a later run tries again, with the reasons: files that are missing, changed since the
        scan, took too long or too much memory, or crashed the decoder.
    """
    vae = load_vae(model, DTYPES[cfg.train.precision], world.device)
    rows = clips.to_pylist()
    tasks = (
        decode_task(cfg, row["path"], row["kind"], row["image_path"], row["start_s"], buckets[row["bucket"]])
        for row in rows
    )
    failures = {}
    with decode_pool(cfg) as pool:
        decoded = pool.imap(tasks, ahead=1)
        for clip, row in zip(progress_bar("encoding clips", "clip", len(rows), items=decoded), rows):
            if reason := _change_reason(row):
                failures[row["key"]] = reason
            elif isinstance(clip, TaskFailure) and clip.is_permanent:
                writer.fail(row["key"].hex(), categorize(clip.reason))
            elif isinstance(clip, TaskFailure):
                failures[row["key"]] = categorize(clip.reason)
            else:
                pixels, first_frame = torch.from_numpy(clip.pixels), torch.from_numpy(clip.first_frame)
                moments = encode_pixels(vae, pixels, is_tiled(cfg, model, buckets[row["bucket"]]))
                writer.write(row["key"].hex(), {"moments": moments, "first_frame": first_frame.permute(2, 0, 1)})
    return failures


def encode_pixels(vae: Any, pixels: torch.Tensor, tiled: bool) -> torch.Tensor:
    """Encode a clip uint8 [F, H, W, 3] to moments [2C, F', H', W'], in the VAE's dtype and on its device.

    The VAE itself encodes 8 frames at a time. They are converted as many at a time, too: at once, a float32 copy of an
    81x768x1360 clip would take 1 GB.
    """
    device, dtype = vae.device, vae.dtype
    (vae.enable_tiling if tiled else vae.disable_tiling)()
    parts = [normalize_pixels(part.to(device), dtype) for part in pixels.split(8)]
    video = torch.cat(parts).permute(3, 0, 1, 2)[None]  # [1, 3, F, H, W]
    return vae.encode(video).latent_dist.parameters[0]


def decode_task(
    cfg: RunConfig, path: str, kind: str, image_path: str | None, start_s: float, shape: ClipShape
) -> DecodeTask:
    """The task of decoding one clip."""
    return DecodeTask(path, kind, image_path, start_s, shape, cfg.data.fps, cfg.data.decoder)


def decode_pool(cfg: RunConfig) -> WorkerPool[DecodeTask, DecodedClip]:
    """The worker processes that decode, with the bounds of the config."""
    memory_bytes = int(cfg.data.decode_memory_gb * 1e9)
    return WorkerPool(decode, cfg.data.num_workers, cfg.data.decode_timeout_s, memory_bytes, (DecodeError,))


def check_decoder(cfg: RunConfig) -> None:
    """Raise UserError if `data.decoder` is not installed. There are wheels of decord for x86-64 only."""
    if cfg.data.decoder == "decord" and importlib.util.find_spec("decord") is None:
        raise UserError(
            "data.decoder: decord is not installed here, and is available for x86-64 only. Set data.decoder=pyav, "
            "or run `pip install decord` on an x86-64 machine."
        )


def _change_reason(row: Mapping) -> str:
    """Why the files of a clip are not those that were scanned, "" if they are: its key would be wrong."""
    for prefix, path in (("", row["path"]), ("image_", row["image_path"])):
        if path is None:
            continue
        try:
            status = os.stat(path)
        except OSError as error:
            return f"disappeared: {path}: {error.strerror}"
        if (status.st_size, status.st_mtime_ns) != (row[f"{prefix}size"], row[f"{prefix}mtime_ns"]):
            return f"changed while it was encoded: {path}; start again"
    return ""

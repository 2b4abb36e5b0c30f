"""From a dataset to encoded clips that can be trained: scan, assign to buckets, encode what the cache lacks, index.

What depends only on the clip and the model is computed once and kept: the moments of the VAE's posterior, the pixels
of the first frame (their noise is drawn at every step, before the VAE), and the T5 states of the caption. The ranks
share the work by its cost.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from cogds.config.schema import RunConfig
from cogds.core.conditioning import normalize_pixels
from cogds.data.storage.access import stamp
from cogds.data.storage.location import display_name
from cogds.data.video.decode_task import DecodedClip, DecodeTask, decode
from cogds.data.video.media import DecodeError
from cogds.data.video.probe_task import categorize
from cogds.distributed.collectives import on_all_ranks, on_rank0, rank0_only, scatter_from_rank0
from cogds.encode.clip_set import ClipSet, evaluation_clips, load_clip_set
from cogds.encode.encoding_plan import EncodedData, EncodingPlan, EncodingWork
from cogds.encode.scan_data import scan_data, scan_evaluation_data
from cogds.errors import UserError
from cogds.job import Job
from cogds.model.load import TextEncoder, load_vae
from cogds.process.activity import activity
from cogds.process.progress import progress_bar
from cogds.process.worker_pool import TaskFailure, WorkerPool

logger = logging.getLogger(__name__)


def encode_dataset(
    job: Job,
    *,
    max_unusable: float = 1.0,
    retry_failed: bool = False,
    on_selected: Callable[[ClipSet], None] | None = None,
    parts: Sequence[str] = ("vae", "text_encoder"),
) -> EncodedData:
    """Scan a run's datasets and encode what the cache lacks. Collective; all ranks return the same.

    A file that cannot be used is among `unusable`, and never ends the run.

    Args:
        max_unusable: share of the clips that may be unusable.
        retry_failed: open files again that could not be used in an earlier run.
        on_selected: called on rank 0 with the clips to train, before anything is encoded.
        parts: of the model, whose weights are downloaded if they are missing.

    Raises:
        UserError: no clip is left, more than `max_unusable` are unusable, or the decoder that is needed is not
            installed.
    """
    cfg, world = job.cfg, job.world
    with activity("scanning the datasets"):
        manifests = scan_data(cfg, world, retry_failed), scan_evaluation_data(cfg, world, retry_failed)
    with activity("fetching the model"):
        on_all_ranks(world, lambda: job.model.fetch(*parts))
    with activity("choosing what to encode"):
        # The other ranks get None and do not use it.
        plan = cast(EncodingPlan, rank0_only(world, partial(_make_plan, job, manifests, max_unusable, on_selected)))
        encoder = _RankEncoder(job, scatter_from_rank0(world, lambda: plan.work(world.size)))
    with activity("waiting for the other ranks to encode"):
        on_all_ranks(world, encoder.check_decoder)
        on_all_ranks(world, encoder.encode_captions)
        failures = {key: reason for part in on_all_ranks(world, encoder.encode_clips) for key, reason in part.items()}
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    with activity("writing the index of clips"):
        return on_rank0(world, partial(_finish, plan, failures, max_unusable))


def _make_plan(
    job: Job,
    manifests: tuple[Path, Path | None],
    max_unusable: float,
    on_selected: Callable[[ClipSet], None] | None,
) -> EncodingPlan:
    """Choose the clips to train and to evaluate. manifests: of the run's datasets, and of eval.path."""
    clips = load_clip_set(job.cfg, manifests[0], job.buckets, job.held_out_limit)
    clips.check_not_empty()
    if on_selected:
        on_selected(clips)
    clips.unusable().check_share(max_unusable)
    held_out, trained, warnings = evaluation_clips(job.cfg, clips, manifests[1])
    for warning in warnings:
        logger.warning(warning)
    return EncodingPlan(job, clips, held_out, trained)


def _finish(plan: EncodingPlan, failures: Mapping[bytes, str], max_unusable: float) -> EncodedData:
    data = plan.finish(failures)
    data.unusable.check_share(max_unusable)
    return data


_FILE_COLUMNS = ("path", "kind", "image_path", "start_s", "mirrored", "control_path")  # fields of a DecodeTask


class _RankEncoder:
    """Encodes one rank's share of the work into the cache."""

    def __init__(self, job: Job, work: EncodingWork):
        self._job, self._cfg, self._work, self._device = job, job.cfg, work, job.world.device
        self._cache, self._shard_bytes = job.cache, int(job.cfg.data.shard_gb * 1e9)

    def check_decoder(self) -> None:
        """Raise UserError if a decoder is needed and missing, before any weight is loaded."""
        if len(self._work.clips) or not self._job.caches_trained_clips:
            check_decoder(self._cfg)

    @activity("encoding captions with T5")
    def encode_captions(self) -> None:
        captions = self._work.captions
        if not len(captions):
            return
        encoder = TextEncoder(self._job.model, self._job.dtype, self._device)
        rows = zip(captions.column("key").to_pylist(), captions.column("caption").to_pylist())
        with self._cache.writer("captions", self._shard_bytes) as writer:
            for key, caption in progress_bar("encoding captions", "caption", len(captions), items=rows):
                writer.write(key.hex(), {"text_states": encoder.encode(caption)})

    @activity("encoding clips with the VAE")
    @torch.no_grad()
    def encode_clips(self) -> dict[bytes, str]:
        """Encode the clips. Worker processes decode them ahead of the VAE.

        A clip that cannot be decoded is recorded in the cache, so that no later run tries it again.

        Returns:
            The keys of the clips that a later run tries again, with the reasons: files that are missing, changed since
            the scan, took too long or too much memory, or crashed the decoder.
        """
        if not len(self._work.clips):
            return {}
        vae = load_vae(self._job.model, self._job.dtype, self._device)
        rows = self._work.clips.to_pylist()
        failures: dict[bytes, str] = {}
        with self._cache.writer("clips", self._shard_bytes) as writer, decode_pool(self._cfg) as pool:
            decoded = pool.imap(map(self._task, rows), ahead=1)
            for clip, row in zip(progress_bar("encoding clips", "clip", len(rows), items=decoded), rows):
                key = row["key"].hex()
                if reason := _change_reason(row):
                    failures[row["key"]] = reason
                elif isinstance(clip, TaskFailure) and clip.is_permanent:
                    writer.fail(key, categorize(clip.reason))
                elif isinstance(clip, TaskFailure):
                    failures[row["key"]] = categorize(clip.reason)
                else:
                    is_tiled = self._job.buckets[row["bucket"]] in self._job.tiled
                    moments = encode_pixels(vae, torch.from_numpy(clip.pixels), is_tiled)
                    encoded = {"moments": moments}
                    if clip.control is not None:
                        encoded["control_moments"] = encode_pixels(vae, torch.from_numpy(clip.control), is_tiled)
                    frames = condition_pixels(clip, self._job.condition_frames(self._job.buckets[row["bucket"]]))
                    writer.write(key, {**encoded, **frames})
        return failures

    def _task(self, row: Mapping[str, Any]) -> DecodeTask:
        shape, data = self._job.buckets[row["bucket"]], self._cfg.data
        file = {name: row[name] for name in _FILE_COLUMNS}
        return DecodeTask(**file, shape=shape, fps=data.fps, decoder=data.decoder)


def encode_pixels(vae: Any, pixels: torch.Tensor, is_tiled: bool) -> torch.Tensor:
    """Encode a clip uint8 [F, H, W, 3] to moments [2C, F', H', W'], in the VAE's dtype and on its device.

    Frames are converted 8 at a time, as many as the VAE encodes at a time, because a float32 copy of a whole
    81x768x1360 clip would take 1 GB.
    """
    device, dtype = vae.device, vae.dtype
    (vae.enable_tiling if is_tiled else vae.disable_tiling)()
    # No name for the parts: they would be kept while the VAE encodes (0.5 GB for that clip in bf16).
    frames = torch.cat([normalize_pixels(part.to(device), dtype) for part in pixels.split(8)])
    video = frames.permute(3, 0, 1, 2)[None]  # [1, 3, F, H, W]
    return vae.encode(video).latent_dist.parameters[0]


def condition_pixels(clip: DecodedClip, frames: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the pixels that a clip can be conditioned on: `first_frame` [3, H, W], and `condition_frames` if any.

    They are kept as pixels, because their noise is drawn in every step, before the VAE. frames: numbers of the
    `condition_frames`, uint8 [K, 3, H, W].
    """
    pixels = {"first_frame": torch.from_numpy(clip.first_frame).permute(2, 0, 1)}
    if frames:
        pixels["condition_frames"] = torch.from_numpy(clip.pixels[list(frames)]).permute(0, 3, 1, 2)
    return pixels


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
    """Why the files of a clip are not those that were scanned, so that its cache key is wrong; "" if they are."""
    for prefix in ("", "image_", "control_"):
        if (path := row[f"{prefix}path"]) is None:
            continue
        try:
            current = stamp(path)
        except OSError as error:
            what = "disappeared" if isinstance(error, FileNotFoundError) else "cannot be opened"
            return f"{what}: {display_name(path)}: {error.strerror or error}"
        if current != (row[f"{prefix}size"], row[f"{prefix}mtime_ns"]):
            return f"changed while it was encoded: {display_name(path)}; start again"
    return ""

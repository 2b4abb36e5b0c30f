"""From a dataset to samples that can be trained: survey, place, encode what is missing, index.

Everything that depends only on the clip and the model is computed here, once, and kept: the VAE's moments of the clip,
its first frame's pixels (the image noise is drawn anew at every step, before the VAE), and the caption's T5 states.
The work is dealt to the ranks by its cost, every entry is kept as soon as it is made, and T5 is gone before the
transformer comes.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from cogds.config import RunConfig
from cogds.core.conditioning import to_range
from cogds.core.geometry import ClipShape
from cogds.core.mixture import Mixture
from cogds.data.cache import Cache, Writer
from cogds.data.decode import DecodedClip, DecodeTask, decode
from cogds.data.index import ClipIndex
from cogds.data.pool import Failure, GuardedPool
from cogds.data.probe import reason_of
from cogds.errors import UserError
from cogds.model.load import DTYPES, ModelFolder, TextEncoder, load_vae
from cogds.prepare.desk import Desk, Finished, Work, is_tiled
from cogds.prepare.survey import (
    Survey,
    Unusable,
    evaluated_survey,
    other_manifest,
    survey,
    update_manifest,
)
from cogds.progress import progress
from cogds.runtime.outlet import warn
from cogds.runtime.world import World, dealt_by_rank0, on_all_ranks, on_rank0


@dataclass(frozen=True)
class EncodedData:
    """What is trained, and what is not. All ranks hold the same, and none of it grows with the number of clips.

    index: the clips, in the order of the plan; mixture: how often each data set is trained; unusable: what is left
    out. no_caption_states [text_tokens, dim]: T5 states of the empty caption. fingerprint: changes when any encoding
    of what is trained does. held_out: clips that are evaluated and never trained, at most eval.num_clips; trained:
    as many of `index`, evaluated too. Both are encoded whatever data.encode is, and None where there are none.
    """

    index: ClipIndex
    mixture: Mixture
    unusable: Unusable
    no_caption_states: torch.Tensor
    fingerprint: str
    held_out: ClipIndex | None = None
    trained: ClipIndex | None = None

    @property
    def indices(self) -> list[ClipIndex]:
        """All there are."""
        return [one for one in (self.index, self.held_out, self.trained) if one is not None]


def encode_captions(captions: pa.Table, writer: Writer, model: ModelFolder, dtype: torch.dtype, world: World) -> None:
    """Encode and keep these captions."""
    encoder = TextEncoder(model, dtype, world.device)
    rows = zip(captions.column("key").to_pylist(), captions.column("caption").to_pylist())
    for key, caption in _progress(rows, len(captions), "captions", world):
        writer.write(key.hex(), {"text_states": encoder.encode(caption)})


def encode_pixels(vae: Any, pixels: torch.Tensor, tiled: bool) -> torch.Tensor:
    """Moments [2C, F, h, w] of a clip uint8 [F, H, W, 3], in the VAE's dtype, on its device.

    The VAE goes through the clip in batches of 8 frames by itself. Brought to its range in such batches too: at once, a
    float32 copy of an 81x768x1360 clip would take 1 GB.
    """
    device, dtype = vae.device, vae.dtype
    (vae.enable_tiling if tiled else vae.disable_tiling)()
    parts = [to_range(part.to(device), dtype) for part in pixels.split(8)]
    video = torch.cat(parts).permute(3, 0, 1, 2)[None]  # [1, 3, F, H, W]
    return vae.encode(video).latent_dist.parameters[0]


@torch.no_grad()
def encode_clips(
    clips: pa.Table, writer: Writer, buckets: Sequence[ClipShape], model: ModelFolder, cfg: RunConfig, world: World
) -> dict[bytes, str]:
    """Encode and keep these clips, decoded ahead of the VAE in guarded processes.

    A clip that the decoder refuses is kept as failed, with its reason, and is not tried again. Returns those that may
    succeed another time, key -> reason: files that have gone or changed since they were listed, or took too long or
    too much memory, or ended the decoding process.
    """
    vae = load_vae(model, DTYPES[cfg.train.precision], world.device)
    rows = clips.to_pylist()
    tasks = (
        decode_task(cfg, row["path"], row["kind"], row["image_path"], row["start_s"], buckets[row["bucket"]])
        for row in rows
    )
    unread = {}
    with decode_pool(cfg) as pool:
        decoded = pool.imap(tasks, ahead=1)
        for clip, row in zip(_progress(decoded, len(rows), "clips", world), rows):
            if reason := _changed(row):
                unread[row["key"]] = reason
            elif isinstance(clip, Failure) and clip.is_verdict:
                writer.fail(row["key"].hex(), reason_of(clip.reason))
            elif isinstance(clip, Failure):
                unread[row["key"]] = reason_of(clip.reason)
            else:
                pixels, first = torch.from_numpy(clip.pixels), torch.from_numpy(clip.first_frame)
                moments = encode_pixels(vae, pixels, is_tiled(cfg, model, buckets[row["bucket"]]))
                writer.write(row["key"].hex(), {"moments": moments, "first_frame": first.permute(2, 0, 1)})
    return unread


def decode_task(
    cfg: RunConfig, path: str, kind: str, image_path: str | None, start_s: float, shape: ClipShape
) -> DecodeTask:
    """What a decoding process is told of one clip."""
    return DecodeTask(path, kind, image_path, start_s, shape, cfg.data.fps, cfg.data.decoder)


def decode_pool(cfg: RunConfig) -> GuardedPool[DecodeTask, DecodedClip]:
    """The processes that decode, bounded as the config says."""
    memory_bytes = int(cfg.data.decode_memory_gb * 1e9)
    return GuardedPool(decode, cfg.data.num_workers, cfg.data.decode_timeout_s, memory_bytes)


def check_decoder(cfg: RunConfig) -> None:
    """Raise UserError if `data.decoder` is not installed. There are wheels of decord for x86-64 only."""
    if cfg.data.decoder == "decord" and importlib.util.find_spec("decord") is None:
        raise UserError(
            "data.decoder: decord is not installed here, and is available for x86-64 only. Set data.decoder=pyav, "
            "or run `pip install decord` on an x86-64 machine."
        )


def _changed(row: Mapping) -> str:
    """Why a file is no longer the one that was listed, if so: its encoding would have another's name."""
    for prefix, path in (("", row["path"]), ("image_", row["image_path"])):
        if path is None:
            continue
        try:
            stat = os.stat(path)
        except OSError as error:
            return f"disappeared: {path}: {error.strerror}"
        if (stat.st_size, stat.st_mtime_ns) != (row[f"{prefix}size"], row[f"{prefix}mtime_ns"]):
            return f"changed while it was encoded: {path}; start again"
    return ""


def _progress(items: Iterable, total: int, what: str, world: World) -> Iterable:
    return progress(f"encoding {what}", what[:-1], total, shown=world.rank == 0, items=items)


def prepare(
    cfg: RunConfig,
    model: ModelFolder,
    buckets: tuple[ClipShape, ...],
    world: World,
    max_unusable: float = 1.0,
    retry: bool = False,
    tell: Callable[[Survey], None] = lambda _: None,
) -> EncodedData:
    """Survey, place and encode the dataset; every rank returns the same. Collective.

    A file that cannot be used is among `unusable`, never a crash. retry: try again what failed before. tell: is
    given the survey on rank 0, before anything is encoded. Raises UserError where nothing is left, or where more than
    the share `max_unusable` is left out.
    """
    cache = Cache(cfg.data.cache_dir)
    manifest = update_manifest(cfg, world, digests=cfg.data.encode == "cached", retry=retry)
    other = other_manifest(cfg, world, retry)
    desks: list[Desk] = []  # rank 0's alone: it grows with the clips

    def begin() -> list[Work]:
        found = survey(cfg, manifest, buckets)
        found.check_any_left()
        tell(found)
        found.unusable().check_share(max_unusable)
        held_out, trained, warnings = evaluated_survey(cfg, found, other)
        for one in warnings:
            warn(one)
        desks.append(Desk(cfg, model, found, held_out, trained))
        return desks[0].work(world.size)

    mine = dealt_by_rank0(world, begin)
    shard_bytes, dtype = int(cfg.data.shard_gb * 1e9), DTYPES[cfg.train.precision]

    def check() -> None:  # before any weight is loaded
        if len(mine.clips) or cfg.data.encode != "cached":
            check_decoder(cfg)

    def captions() -> None:
        if len(mine.captions):
            with cache.writer("captions", shard_bytes) as writer:
                encode_captions(mine.captions, writer, model, dtype, world)

    def clips() -> dict[bytes, str]:
        if not len(mine.clips):
            return {}
        with cache.writer("clips", shard_bytes) as writer:
            return encode_clips(mine.clips, writer, buckets, model, cfg, world)

    on_all_ranks(world, check)
    on_all_ranks(world, captions)
    unread = {key: reason for share in on_all_ranks(world, clips) for key, reason in share.items()}
    if world.device.type == "cuda":
        torch.cuda.empty_cache()

    def end() -> tuple[Finished, Mixture]:
        done = desks[0].finish(unread)
        for one in done.warnings:
            warn(one)
        done.unusable.check_share(max_unusable)
        return done, Mixture(done.index.sizes, desks[0].survey.repeats, cfg.seed)

    done, mixture = on_rank0(world, end)
    key, place = on_rank0(world, lambda: desks[0].no_caption())
    no_caption_states = cache.read("captions", key, place)["text_states"]
    return EncodedData(
        done.index, mixture, done.unusable, no_caption_states, done.fingerprint, done.held_out, done.trained
    )

"""From a dataset to samples that can be trained: survey, place, encode what is missing, index.

Everything that depends only on the clip and the model is computed here, once, and kept: the VAE's moments of the clip,
its first frame's pixels (the image noise is drawn anew at every step, before the VAE), and the caption's T5 states.
The work is dealt to the ranks by its cost, every entry is kept as soon as it is made, and T5 is gone before the
transformer comes.
"""

import argparse
import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cogds.cli import make_folders, parse_args
from cogds.config import RunConfig, load_config, replace
from cogds.core.conditioning import to_range
from cogds.core.geometry import ClipShape
from cogds.core.memory import vae_can_encode, vae_encode_bytes
from cogds.core.mixture import Mixture
from cogds.core.shares import deal
from cogds.data.cache import Cache, Snapshot, Writer, key_array
from cogds.data.decode import DecodedClip, DecodeTask, decode
from cogds.data.digest import digest, digest_files
from cogds.data.index import ClipIndex, write_index
from cogds.data.pool import Failure, GuardedPool
from cogds.data.probe import reason_of
from cogds.data.staging import adopt
from cogds.data.upkeep import VerifyReport, prune, stats, verify
from cogds.demo import make_demo, only_own_demo
from cogds.model.load import ModelFolder, TextEncoder, find_model, load_vae
from cogds.progress import progress
from cogds.runtime.world import World, connect, dealt_by_rank0, disconnect, on_all_ranks, on_rank0, read_world
from cogds.survey import Survey, Unusable, make_buckets, survey, update_manifest

AT_ONCE = 1 << 17  # rows that are Python's objects at the same time
NO_CAPTION = ""  # what a dropped caption becomes: the pipeline's negative prompt
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Buckets whose encoding would take more are encoded in overlapping tiles (data.vae_tiling=auto): what a 24 GB card has
# beside the CUDA context, the VAE's weights and what its allocator cannot use.
UNTILED_BYTES = 20e9


@dataclass(frozen=True)
class EncodedData:
    """What is trained, and what is not. All ranks hold the same, and none of it grows with the number of clips.

    index: the clips, in the order of the plan; mixture: how often each data set is trained; unusable: what is left
    out. no_caption_states [text_tokens, dim]: T5 states of the empty caption. fingerprint: changes when any encoding
    of the dataset does.
    """

    index: ClipIndex
    mixture: Mixture
    unusable: Unusable
    no_caption_states: torch.Tensor
    fingerprint: str


def main(default_config: Path, argv: list[str] | None = None) -> None:
    """Encode what the run's dataset lacks, so that training starts at once; or look after the cache."""
    args = parse_args(
        sys.argv[1:] if argv is None else argv,
        "Encode a dataset's clips and captions into data.cache_dir; a second run does only what is left.",
        _add_arguments,
    )
    cfg, _ = load_config(args.config or str(default_config), args.overrides)
    if not args.config:
        cfg = only_own_demo(cfg, args.overrides)
    cfg = replace(cfg, {"data.encode": "cached"})
    cache_dir = cfg.data.cache_dir
    if args.stats:
        print(json.dumps(stats(cache_dir), indent=2))
        return
    if args.verify:
        print_verified(verify(cache_dir, show_progress=True))
        return
    world = read_world()
    make_demo(cfg)
    model = find_model(cfg.model.path, cfg.model.revision)
    buckets = make_buckets(cfg, model)
    connect(world, cfg.train.timeout_s)
    on_rank0(world, lambda: make_folders({"data.cache_dir": cache_dir}))
    if args.retry:
        on_rank0(world, lambda: prune(cache_dir, failed=True, shard_bytes=int(cfg.data.shard_gb * 1e9)))
    data = prepare(cfg, model, buckets, world, retry=args.retry)
    if world.rank == 0:
        print(f"{len(data.index)} clips are encoded in {cache_dir}")
        if data.unusable.num:
            print(f"{data.unusable.num} cannot be used, see {data.unusable.file}: {data.unusable.text()}")
        if args.prune:
            keep = {"clips": data.index.keys("clip_key"), "captions": data.index.keys("caption_key")}
            keep["captions"].add(EncodingNames(cfg, model).caption(NO_CAPTION).hex())
            pruned = prune(cache_dir, keep, shard_bytes=int(cfg.data.shard_gb * 1e9))
            for path in set(data.index.path.parent.iterdir()):
                if not path.name.startswith(data.index.path.stem):
                    path.unlink(missing_ok=True)
            print(
                f"removed {pruned.num_entries} entries, {pruned.num_bytes / 1e9:.3f} GB; merged {pruned.num_merged} "
                "small shards"
            )
    disconnect()


def print_verified(report: VerifyReport) -> None:
    """What a look at every entry found, for people."""
    for one in report.damaged:
        print(f"removed {one.kind}/{one.place} {one.key}: {one.reason}")
    print(
        f"{report.num_entries} entries are whole ({report.num_bytes / 1e9:.3f} GB), {report.num_failures} clips cannot "
        f"be decoded, {len(report.damaged)} were damaged and removed: they are encoded anew by the next run"
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stats", action="store_true", help="print what the cache holds, and do nothing else")
    parser.add_argument(
        "--verify", action="store_true", help="read the whole cache, remove what is damaged, and do nothing else"
    )
    parser.add_argument("--retry", action="store_true", help="try files again that could not be read before")
    parser.add_argument("--prune", action="store_true", help="remove all that this run's dataset does not use")


def is_tiled(cfg: RunConfig, model: ModelFolder, shape: ClipShape) -> bool:
    """Whether clips of this shape are encoded in tiles.

    Follows from the config, the model and the shape, never from the machine: tiles change the encoding a little, so
    they are part of its name.
    """
    if cfg.data.vae_tiling == "auto":
        too_large = vae_encode_bytes(shape, tiling=False, vae=model.vae_size) > UNTILED_BYTES
        return too_large or not vae_can_encode(shape, tiling=False, vae=model.vae_size)
    return cfg.data.vae_tiling == "on"


class EncodingNames:
    """Keys of encodings: the digest of everything that makes them. What is the same for many is hashed once."""

    def __init__(self, cfg: RunConfig, model: ModelFolder):
        self.cfg, self.model = cfg, model
        parts = {
            part: sorted(str(path) for path in (model.path / part).iterdir() if path.is_file())
            for part in ("vae", "text_encoder", "tokenizer")
        }
        every = [path for paths in parts.values() for path in paths]
        digests = digest_files(every, Path(cfg.data.cache_dir) / "files.json")
        self.vae = [digests[path] for path in parts["vae"]]
        text = [digests[path] for path in parts["text_encoder"] + parts["tokenizer"]]
        fields = {"encoder": text, "tokens": model.geometry.text_tokens, "dtype": cfg.train.precision}
        self.caption_prefix = digest(fields).encode()

    def caption(self, caption: str) -> bytes:
        """Key of a caption's states."""
        return _hash(self.caption_prefix + caption.encode())

    def captions(self, captions: pa.LargeStringArray) -> pa.FixedSizeBinaryArray:
        """Keys of captions."""
        return _binary(b"".join(self.caption(caption.as_py()) for caption in captions))

    def clips(self, survey: Survey) -> pa.FixedSizeBinaryArray:
        """Keys of all windows of a survey, in its order."""
        prefixes = [
            digest(
                {
                    "bucket": str(shape),
                    "fps": self.cfg.data.fps,
                    "decoder": self.cfg.data.decoder,
                    "tiled": is_tiled(self.cfg, self.model, shape),
                    "vae": self.vae,
                    "dtype": self.cfg.train.precision,
                }
            ).encode()
            for shape in survey.buckets
        ]
        placement = survey.placement
        keys = bytearray()
        for start in range(0, survey.num_windows, AT_ONCE):
            part = slice(start, start + AT_ONCE)
            for bucket, start_s, kind, content, image in zip(
                placement.buckets[part].tolist(),
                placement.starts_s[part].tolist(),
                *(survey.column(name, part).to_pylist() for name in ("kind", "digest", "image_digest")),
            ):
                keys += _hash(prefixes[bucket] + struct.pack("<d", start_s) + kind.encode() + content + (image or b""))
        return _binary(keys)


def _hash(message: bytes) -> bytes:
    return hashlib.blake2b(message, digest_size=16).digest()


def _binary(keys: bytes | bytearray) -> pa.FixedSizeBinaryArray:
    """Keys of 16 bytes, one after the other."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys) // 16, [None, pa.py_buffer(keys)])


@dataclass(frozen=True)
class Work:
    """What the cache lacks, a rank's share. captions: key, caption, rank. clips: key, path, kind, image_path, start_s,
    bucket, size, mtime_ns, image_size, image_mtime_ns, rank."""

    captions: pa.Table
    clips: pa.Table


class Desk:
    """Rank 0's table while a dataset is prepared: the survey, and the names of its encodings."""

    def __init__(self, cfg: RunConfig, model: ModelFolder, survey: Survey):
        self.cfg, self.model, self.survey, self.cache = cfg, model, survey, Cache(cfg.data.cache_dir)
        captions = survey.column("caption").combine_chunks().dictionary_encode()
        self.captions, self.caption_of = captions.dictionary, captions.indices.to_numpy()
        self.cached = cfg.data.encode == "cached"
        names = EncodingNames(cfg, model)
        self.no_caption_key = names.caption(NO_CAPTION)
        if self.cached:
            self.caption_keys, self.clip_keys = names.captions(self.captions), names.clips(survey)
        else:
            self.caption_keys, self.clip_keys = (
                _binary(bytes(16 * num)) for num in (len(self.captions), survey.num_windows)
            )

    def work(self, num_ranks: int) -> list[Work]:
        """What every rank is to encode, dealt by cost. What killed writers left is taken over first."""
        for kind in ("captions", "clips"):
            adopt(self.cache.root, kind)
        keys = pa.concat_arrays([self.caption_keys, _binary(self.no_caption_key)])
        texts = pa.concat_arrays([self.captions, pa.array([NO_CAPTION], self.captions.type)])
        rows = _missing(keys if self.cached else keys[-1:], self.cache.snapshot("captions"))
        rows = rows if self.cached else rows + len(keys) - 1
        captions = pa.table({"key": keys.take(rows), "caption": texts.take(rows)})
        captions = captions.append_column("rank", pa.array(np.arange(len(rows), dtype=np.int32) % num_ranks))

        windows = _missing(self.clip_keys, self.cache.snapshot("clips")) if self.cached else np.zeros(0, np.int64)
        order = np.argsort(-self.survey.costs()[windows], kind="stable")
        windows = windows[order]
        clips = pa.table(
            {
                "key": self.clip_keys.take(windows),
                "start_s": self.survey.placement.starts_s[windows],
                "bucket": self.survey.placement.buckets[windows],
                "rank": deal(self.survey.costs()[windows], num_ranks),
            }
            | {
                name: self.survey.column(name, windows)
                for name in ("path", "kind", "image_path", "size", "mtime_ns", "image_size", "image_mtime_ns")
            }
        )
        return [
            Work(*(one.filter(pc.equal(one.column("rank"), rank)) for one in (captions, clips)))
            for rank in range(num_ranks)
        ]

    def no_caption(self) -> tuple[str, str]:
        """Key and place of the empty caption's states."""
        captions = self.cache.snapshot("captions")
        return self.no_caption_key.hex(), captions.places[captions.find(_binary(self.no_caption_key))[0]]

    def finish(self, unread: Mapping[bytes, str]) -> tuple[ClipIndex, Unusable, str]:
        """The index of everything that is encoded now, what is left out, and the fingerprint of the dataset.

        unread: what this run could not read but another may, key -> reason.
        """
        clips, captions = self.cache.snapshot("clips"), self.cache.snapshot("captions")
        survey = self.survey
        if self.cached:
            failed = {bytes.fromhex(key): reason for key, reason in clips.failures.items()} | dict(unread)
            places = clips.find(self.clip_keys)
            survey, kept = survey.without(self.clip_keys, failed)
        else:
            places, kept = np.full(survey.num_windows, -1, np.int32), np.arange(survey.num_windows)
        survey.check_any_left()
        caption_places = captions.find(self.caption_keys) if self.cached else np.full(len(self.captions), -1, np.int32)

        def tables() -> Iterator[pa.Table]:
            for start in range(0, len(kept), AT_ONCE):
                windows = kept[start : start + AT_ONCE]
                texts = self.caption_of[windows]
                yield pa.table(
                    {name: self.survey.column(name, windows) for name in ("path", "kind", "image_path")}
                    | {
                        "caption": self.captions.take(texts),
                        "start_s": self.survey.placement.starts_s[windows],
                        "clip_key": self.clip_keys.take(windows),
                        "caption_key": self.caption_keys.take(texts),
                        "clip_place": places[windows],
                        "caption_place": caption_places[texts],
                    }
                )

        folder = self.cache.root / "index"
        every = {"clips": clips.places, "captions": captions.places}
        index = write_index(folder, tables(), survey.buckets, survey.placement.sizes, every)
        return index, survey.unusable(index.path.with_suffix(".unusable.jsonl")), self._fingerprint(survey, kept)

    def _fingerprint(self, survey: Survey, kept: np.ndarray) -> str:
        state = hashlib.blake2b(repr(survey.placement.sizes).encode(), digest_size=16)
        for column in [
            self.clip_keys.take(kept),
            self.caption_keys.take(self.caption_of[kept]),
            *([] if self.cached else [self.survey.column(name, kept) for name in ("path", "size", "mtime_ns")]),
        ]:
            for start in range(0, len(column), AT_ONCE):
                state.update(repr(column[start : start + AT_ONCE].to_pylist()).encode())
        return state.hexdigest()


def _missing(keys: pa.FixedSizeBinaryArray, snapshot: Snapshot) -> np.ndarray:
    """Numbers of the keys that the cache neither has nor has given up, each key once."""
    failed = key_array(snapshot.failures)
    lacking = (snapshot.find(keys) < 0) & ~pc.is_in(keys, failed).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(lacking)
    _, first = np.unique(keys.take(rows).dictionary_encode().indices.to_numpy(), return_index=True)
    return rows[np.sort(first)]


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
    desks: list[Desk] = []  # rank 0's alone: it grows with the clips

    def begin() -> list[Work]:
        found = survey(cfg, manifest, buckets)
        found.check_any_left()
        tell(found)
        found.unusable().check_share(max_unusable)
        desks.append(Desk(cfg, model, found))
        return desks[0].work(world.size)

    mine = dealt_by_rank0(world, begin)
    shard_bytes, dtype = int(cfg.data.shard_gb * 1e9), DTYPES[cfg.train.precision]

    def captions() -> None:
        if len(mine.captions):
            with cache.writer("captions", shard_bytes) as writer:
                encode_captions(mine.captions, writer, model, dtype, world)

    def clips() -> dict[bytes, str]:
        if not len(mine.clips):
            return {}
        with cache.writer("clips", shard_bytes) as writer:
            return encode_clips(mine.clips, writer, buckets, model, cfg, world)

    on_all_ranks(world, captions)
    unread = {key: reason for share in on_all_ranks(world, clips) for key, reason in share.items()}
    if world.device.type == "cuda":
        torch.cuda.empty_cache()

    def end() -> tuple[ClipIndex, Mixture, Unusable, str]:
        index, unusable, fingerprint = desks[0].finish(unread)
        unusable.check_share(max_unusable)
        return index, Mixture(index.sizes, desks[0].survey.repeats, cfg.seed), unusable, fingerprint

    index, mixture, unusable, fingerprint = on_rank0(world, end)
    key, place = on_rank0(world, lambda: desks[0].no_caption())
    return EncodedData(index, mixture, unusable, cache.read("captions", key, place)["text_states"], fingerprint)

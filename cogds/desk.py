"""What rank 0 works on while a dataset is prepared: names of encodings, what the cache lacks, the index.

It grows with the clips, as nothing that the other ranks hold does.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.config import RunConfig
from cogds.core.geometry import ClipShape
from cogds.core.memory import vae_can_encode, vae_encode_bytes
from cogds.core.shares import deal
from cogds.data.cache import Cache, Snapshot, key_array
from cogds.data.digest import digest, digest_files
from cogds.data.index import ClipIndex, write_index
from cogds.data.staging import adopt
from cogds.errors import UserError
from cogds.model.load import ModelFolder
from cogds.survey import Survey, Unusable

AT_ONCE = 1 << 17  # rows that are Python's objects at the same time
NO_CAPTION = ""  # what a dropped caption becomes: the pipeline's negative prompt
# Buckets whose encoding would take more are encoded in overlapping tiles (data.vae_tiling=auto): what a 24 GB card has
# beside the CUDA context, the VAE's weights and what its allocator cannot use.
UNTILED_BYTES = 20e9


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

        unread: what this run could not read but another may, key -> reason. Raises UserError where nothing is left, or
        where the cache lost what was made.
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
        if self.cached and (lost := int((places[kept] < 0).sum() + (caption_places[self.caption_of[kept]] < 0).sum())):
            raise UserError(
                f"{lost} encodings are no longer in {self.cache.root}, though they have been made: another run may "
                "have pruned them; start again, they are made anew"
            )

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

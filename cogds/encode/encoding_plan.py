"""What rank 0 decides before and after encoding: which encodings the cache lacks, which rank makes each, and the index.

Only rank 0's memory grows with the number of clips.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cogds.core.load_balance import assign_by_cost
from cogds.core.mixture import Mixture
from cogds.data.cache.store import Snapshot, key_array, key_array_of_bytes
from cogds.data.loading.index import ClipIndex, write_index
from cogds.data.storage.location import display_name
from cogds.encode.cache_keys import CLIPS_AT_ONCE, CacheKeys
from cogds.encode.captions import list_lengths, make_lists
from cogds.encode.clip_set import ClipSet, UnusableClips
from cogds.encode.scan_data import caption_prefixes
from cogds.errors import UserError
from cogds.job import Job

logger = logging.getLogger(__name__)

_STAMPED = ("path", "size", "mtime_ns")
EMPTY_CAPTION = ""  # replaces a caption that is dropped; the pipeline's negative prompt


@dataclass(frozen=True)
class EncodingWork:
    """What one rank encodes.

    Attributes:
        captions: columns key, caption, rank.
        clips: columns key, path, kind, start_s, mirrored, bucket, cost, rank, image_path, control_path, and size and
            mtime_ns of the three files.
    """

    captions: pa.Table
    clips: pa.Table


class KeyedClips:
    """A clip set with the cache keys of its clips and captions.

    captions: the distinct captions. caption_numbers: lists of numbers of captions, one list per clip.
    is_cached: whether they are encoded once and kept; otherwise the keys are zeros.
    """

    def __init__(self, clips: ClipSet, keys: CacheKeys, is_cached: bool):
        self.clips, self.is_cached = clips, is_cached
        lists = clips.captions()
        captions = lists.flatten().dictionary_encode()
        self.captions, self.caption_numbers = captions.dictionary, make_lists(list_lengths(lists), captions.indices)
        if is_cached:
            self.caption_keys, self.clip_keys = keys.captions(self.captions), keys.clips(clips)
        else:
            self.caption_keys, self.clip_keys = (
                key_array_of_bytes(bytes(16 * num)) for num in (len(self.captions), clips.num_clips)
            )

    def captions_of(self, clips: np.ndarray) -> np.ndarray:
        """The numbers of the captions of these clips, one clip after the other."""
        return self.caption_numbers.take(pa.array(clips)).flatten().to_numpy()

    def work(self, clips: np.ndarray) -> pa.Table:
        """The columns of `EncodingWork.clips`, except for rank, for these clips."""
        stamps = (f"{file}{name}" for file in ("", "image_", "control_") for name in _STAMPED)
        return pa.table(
            {
                "key": self.clip_keys.take(clips),
                "start_s": self.clips.assignment.starts_s[clips],
                "mirrored": self.clips.assignment.mirrored[clips],
                "bucket": self.clips.assignment.buckets[clips],
                "cost": self.clips.costs()[clips],
            }
            | {name: self.clips.column(name, clips) for name in ("kind", *stamps)}
        )

    def write_index(self, folder: Path, cached: "CachedEncodings") -> "IndexedClips":
        """Write the index of the clips that are encoded."""
        if self.is_cached:
            clip_places, caption_places = cached.clips.find(self.clip_keys), cached.captions.find(self.caption_keys)
            clips, kept = self.clips.without(self.clip_keys, cached.failures)
            num_lost = int((clip_places[kept] < 0).sum() + (caption_places[self.captions_of(kept)] < 0).sum())
        else:
            clip_places, caption_places = (
                np.full(len(keys), -1, np.int32) for keys in (self.clip_keys, self.caption_keys)
            )
            clips, kept, num_lost = self.clips, np.arange(self.clips.num_clips), 0
        if num_lost or not len(kept):
            return IndexedClips(clips, kept, None, num_lost)

        rows = self._index_rows(kept, clip_places, caption_places)
        places = {"clips": cached.clips.places, "captions": cached.captions.places}
        index = write_index(folder, rows, clips.buckets, clips.assignment.sizes, places, clips.has_controls)
        return IndexedClips(clips, kept, index, 0)

    def _index_rows(self, kept: np.ndarray, clip_places: np.ndarray, caption_places: np.ndarray) -> Iterator[pa.Table]:
        """The rows of the index for the clips in `kept`. clip_places, caption_places: of all clips and captions."""
        for start in range(0, len(kept), CLIPS_AT_ONCE):
            chunk = kept[start : start + CLIPS_AT_ONCE]
            captions = self.captions_of(chunk)
            num_captions = list_lengths(self.caption_numbers.take(pa.array(chunk)))
            yield pa.table(
                {name: self.clips.column(name, chunk) for name in ("path", "kind", "image_path", "control_path")}
                | {
                    "captions": make_lists(num_captions, self.captions.take(captions)),
                    "start_s": self.clips.assignment.starts_s[chunk],
                    "mirrored": self.clips.assignment.mirrored[chunk],
                    "clip_key": self.clip_keys.take(chunk),
                    "caption_keys": make_lists(num_captions, self.caption_keys.take(captions)),
                    "clip_place": clip_places[chunk],
                    "caption_places": make_lists(num_captions, pa.array(caption_places[captions])),
                }
            )


@dataclass(frozen=True)
class CachedEncodings:
    """What the cache holds after encoding; failures: keys of the clips that could not be encoded, with the reasons."""

    clips: Snapshot
    captions: Snapshot
    failures: Mapping[bytes, str]


@dataclass(frozen=True)
class IndexedClips:
    """The clips of a `KeyedClips` that are encoded.

    Attributes:
        clips: the clips that are left.
        kept: their numbers among the keyed clips.
        index: None if no clip is left or an encoding is lost.
        num_lost: number of encodings that have disappeared from the cache.
    """

    clips: ClipSet
    kept: np.ndarray
    index: ClipIndex | None
    num_lost: int


@dataclass(frozen=True)
class EncodedData:
    """The data of a run, the same on all ranks. Its size does not grow with the number of clips.

    Attributes:
        index: the clips to train, in the order of the plan.
        mixture: how often each dataset is trained.
        unusable: the clips that are left out.
        empty_caption_states: [text_tokens, dim], T5 states of the empty caption.
        fingerprint: changes if the encoding of any clip to train does.
        held_out: clips to evaluate that are not trained, at most eval.num_clips; None if there are none.
        trained: as many clips of `index` to evaluate. Both are encoded even if data.encode is on_the_fly.
        held_out_limit: see `ClipSet`.
    """

    index: ClipIndex
    mixture: Mixture
    unusable: UnusableClips
    empty_caption_states: torch.Tensor
    fingerprint: str
    held_out: ClipIndex | None = None
    trained: ClipIndex | None = None
    held_out_limit: int | None = None

    @property
    def indexes(self) -> list[ClipIndex]:
        """The indexes that exist."""
        return [index for index in (self.index, self.held_out, self.trained) if index is not None]


class EncodingPlan:
    """The clips to train and to evaluate, with their cache keys.

    held_out, trained: the clips to evaluate (`clip_set.evaluation_clips`), which are encoded even if the clips to train
    are not (`Job.caches_trained_clips`).
    """

    def __init__(self, job: Job, clips: ClipSet, held_out: ClipSet | None, trained: ClipSet | None):
        self._cfg = cfg = job.cfg
        self._cache, keys = job.cache, CacheKeys(cfg, job.model, job.tiled)
        # Captions of no clip: the empty one, and the prompts of videos during training.
        prompts = [spec.prompt for spec in cfg.sample.prompts] if cfg.sample.every is not None else []
        self._texts = {text: keys.caption(text) for text in dict.fromkeys([EMPTY_CAPTION, *prompts])}
        self._train = KeyedClips(clips, keys, job.caches_trained_clips)
        self._held_out = KeyedClips(held_out, keys, is_cached=True) if held_out else None
        self._trained = KeyedClips(trained, keys, is_cached=True) if trained else None

    @property
    def _cached(self) -> list[KeyedClips]:
        return [part for part in (self._train, self._held_out, self._trained) if part and part.is_cached]

    def work(self, num_ranks: int) -> list[EncodingWork]:
        """What each rank encodes, shared by cost. Removes temporary files of killed writers from the cache."""
        for kind in ("captions", "clips"):
            self._cache.remove_abandoned(kind)
        captions, clips = self._missing_captions(), self._missing_clips()
        captions = captions.append_column("rank", pa.array(np.arange(len(captions), dtype=np.int32) % num_ranks))
        clips = clips.take(np.argsort(-clips.column("cost").to_numpy(), kind="stable"))
        clips = clips.append_column("rank", pa.array(assign_by_cost(clips.column("cost").to_numpy(), num_ranks)))
        return [
            EncodingWork(*(table.filter(pc.equal(table.column("rank"), rank)) for table in (captions, clips)))
            for rank in range(num_ranks)
        ]

    def _missing_captions(self) -> pa.Table:
        keys = [part.caption_keys for part in self._cached] + [key_array_of_bytes(b"".join(self._texts.values()))]
        captions = [part.captions for part in self._cached] + [pa.array(list(self._texts), self._train.captions.type)]
        rows = _missing(pa.concat_arrays(keys), self._cache.snapshot("captions"))
        return pa.table({"key": pa.concat_arrays(keys).take(rows), "caption": pa.concat_arrays(captions).take(rows)})

    def _missing_clips(self) -> pa.Table:
        tables, start = [self._train.work(np.zeros(0, np.int64))], 0
        if self._cached:
            keys = pa.concat_arrays([part.clip_keys for part in self._cached])
            missing = _missing(keys, self._cache.snapshot("clips"))
            for part in self._cached:
                end = start + len(part.clip_keys)
                tables.append(part.work(missing[(missing >= start) & (missing < end)] - start))
                start = end
        return pa.concat_tables(tables)

    def finish(self, failures: Mapping[bytes, str]) -> EncodedData:
        """Write the indexes of the encoded clips, and log warnings.

        Args:
            failures: keys of the clips that this run could not encode but another may, with the reasons.

        Raises:
            UserError: no clip is left, or the cache has lost encodings.
        """
        clips, captions = self._cache.snapshot("clips"), self._cache.snapshot("captions")
        failures = {bytes.fromhex(key): reason for key, reason in clips.failures.items()} | dict(failures)
        cached, folder = CachedEncodings(clips, captions, failures), self._cfg.metadata_dir / "index"
        train = self._train.write_index(folder, cached)
        train.clips.check_not_empty()
        held_out = self._held_out.write_index(folder, cached) if self._held_out else None
        trained = self._trained.write_index(folder, cached) if self._trained else None
        empty_caption = self._texts[EMPTY_CAPTION].hex()
        place = captions.place(empty_caption)
        # If the trained clips are cached, those that are evaluated are among them.
        parts = [train, held_out] if self._train.is_cached else [held_out, trained]
        num_lost = sum(part.num_lost for part in parts if part) + int(place is None)
        if train.index is None or place is None or num_lost:
            raise UserError(
                f"data.cache_dir: {num_lost} encodings that were in {self._cache.root} are gone; another run may have "
                "pruned them. Start again to encode them again."
            )
        held_out_reasons = {}
        if held_out:
            paths = held_out.clips.table.column("path")
            held_out_reasons = {paths[row].as_py(): reason for row, reason in held_out.clips.reasons.items()}
        for path, reason in held_out_reasons.items():
            logger.warning(f"{display_name(path)} cannot be evaluated: {reason}")
        self._warn_of_overlap(train.kept)
        more = {} if self._cfg.eval.path is not None else held_out_reasons  # eval.path is another dataset
        return EncodedData(
            index=train.index,
            mixture=Mixture(train.index.sizes, train.clips.repeats, self._cfg.seed),
            unusable=train.clips.unusable(train.index.path.with_suffix(".unusable.jsonl"), more),
            empty_caption_states=self._cache.read("captions", empty_caption, place)["text_states"],
            fingerprint=self._fingerprint(train),
            held_out=held_out.index if held_out else None,
            trained=trained.index if trained else None,
            held_out_limit=self._train.clips.held_out_limit,
        )

    def _fingerprint(self, train: IndexedClips) -> str:
        part, kept = self._train, train.kept
        state = hashlib.blake2b(repr(train.clips.assignment.sizes).encode(), digest_size=16)
        captions = part.captions_of(kept)
        columns = [part.clip_keys.take(kept), part.caption_keys.take(captions)]
        if not part.is_cached:
            files = ("", "control_") if part.clips.has_controls else ("",)
            columns += [part.clips.column(f"{file}{name}", kept) for file in files for name in _STAMPED]
            if (mirrored := part.clips.assignment.mirrored[kept]).any():
                columns.append(pa.array(mirrored))
        num_captions = list_lengths(part.caption_numbers.take(pa.array(kept)))
        if (num_captions > 1).any():
            columns.append(pa.array(num_captions))
        if not part.is_cached and ((num_captions > 1).any() or any(caption_prefixes(self._cfg))):
            columns.append(part.captions.take(captions))
        for column in columns:
            for start in range(0, len(column), CLIPS_AT_ONCE):
                state.update(repr(column[start : start + CLIPS_AT_ONCE].to_pylist()).encode())
        return state.hexdigest()

    def _warn_of_overlap(self, kept: np.ndarray) -> None:
        """Warn if clips that should only be evaluated are also trained, as copies or as ranges of the same files."""
        if self._held_out is None:
            return
        # Copies have the same key. Other ranges of a file, or clips in other buckets, have the same path.
        paths = self._held_out.clips.column("path")
        is_copy = pc.is_in(self._held_out.clip_keys, self._train.clip_keys.take(kept)).to_numpy(zero_copy_only=False)
        is_same_file = pc.is_in(paths, self._train.clips.column("path", kept)).to_numpy()
        overlap = np.flatnonzero(is_copy | is_same_file)
        if len(overlap):
            first = display_name(paths[int(overlap[0])].as_py())
            logger.warning(
                f"{len(overlap)} of the {len(paths)} clips that should only be evaluated are also trained, as copies "
                f"or ranges of the same files (the first: {first}). eval/loss shows less overfitting than there is. "
                "Remove them from one of the two datasets."
            )


def _missing(keys: pa.FixedSizeBinaryArray, snapshot: Snapshot) -> np.ndarray:
    """Positions of the keys that the cache has neither as entries nor as failures, each key once."""
    has_failed = pc.is_in(keys, key_array(snapshot.failures)).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero((snapshot.find(keys) < 0) & ~has_failed)
    _, first = np.unique(keys.take(rows).dictionary_encode().indices.to_numpy(), return_index=True)
    return rows[np.sort(first)]

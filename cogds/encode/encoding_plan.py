"""What rank 0 works on while a dataset is prepared: names of encodings, what the cache lacks, the index.

It grows with the clips, as nothing that the other ranks hold does.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.config.schema import RunConfig
from cogds.core.geometry import ClipShape
from cogds.core.shares import deal
from cogds.core.vae_memory import vae_can_encode, vae_encode_bytes
from cogds.data.cache.keys import cache_key, digest_files
from cogds.data.cache.store import Cache, Snapshot, key_array
from cogds.data.loading.index import ClipIndex, write_index
from cogds.encode.survey import Survey, Unusable
from cogds.errors import UserError
from cogds.model.load import ModelFolder

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
        self.caption_prefix = cache_key(fields).encode()

    def caption(self, caption: str) -> bytes:
        """Key of a caption's states."""
        return _hash(self.caption_prefix + caption.encode())

    def captions(self, captions: pa.LargeStringArray) -> pa.FixedSizeBinaryArray:
        """Keys of captions."""
        return _binary(b"".join(self.caption(caption.as_py()) for caption in captions))

    def clips(self, survey: Survey) -> pa.FixedSizeBinaryArray:
        """Keys of all windows of a survey, in its order."""
        prefixes = [
            cache_key(
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
    bucket, cost, size, mtime_ns, image_size, image_mtime_ns, rank."""

    captions: pa.Table
    clips: pa.Table


class Part:
    """Windows of a survey and the names of their encodings.

    cached: whether they are encoded once and kept; else they have names of zeros.
    """

    def __init__(self, survey: Survey, names: EncodingNames, cached: bool):
        self.survey, self.cached = survey, cached
        captions = survey.column("caption").combine_chunks().dictionary_encode()
        self.captions, self.caption_of = captions.dictionary, captions.indices.to_numpy()
        if cached:
            self.caption_keys, self.clip_keys = names.captions(self.captions), names.clips(survey)
        else:
            self.caption_keys, self.clip_keys = (
                _binary(bytes(16 * num)) for num in (len(self.captions), survey.num_windows)
            )

    def clips(self, windows: np.ndarray) -> pa.Table:
        """What is to be known of windows to encode them, and the cost of it."""
        columns = ("path", "kind", "image_path", "size", "mtime_ns", "image_size", "image_mtime_ns")
        return pa.table(
            {
                "key": self.clip_keys.take(windows),
                "start_s": self.survey.placement.starts_s[windows],
                "bucket": self.survey.placement.buckets[windows],
                "cost": self.survey.costs()[windows],
            }
            | {name: self.survey.column(name, windows) for name in columns}
        )

    def write(
        self, folder: Path, clips: Snapshot, captions: Snapshot, failed: Mapping[bytes, str]
    ) -> tuple[Survey, np.ndarray, ClipIndex | None, int]:
        """Write the index of what is encoded: the survey of that, its windows' numbers, the index (None where nothing
        is), and how many encodings the cache has lost."""
        if self.cached:
            places, caption_places = clips.find(self.clip_keys), captions.find(self.caption_keys)
            survey, kept = self.survey.without(self.clip_keys, failed)
        else:
            places, caption_places = (np.full(len(keys), -1, np.int32) for keys in (self.clip_keys, self.caption_keys))
            survey, kept = self.survey, np.arange(self.survey.num_windows)
        lost = (places[kept] < 0).sum() + (caption_places[self.caption_of[kept]] < 0).sum()
        num_lost = int(lost) if self.cached else 0
        if num_lost or not len(kept):
            return survey, kept, None, num_lost

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

        every = {"clips": clips.places, "captions": captions.places}
        return survey, kept, write_index(folder, tables(), survey.buckets, survey.placement.sizes, every), 0


@dataclass(frozen=True)
class Finished:
    """What a prepared dataset comes to, on rank 0: see `encode.EncodedData`. warnings: for people."""

    index: ClipIndex
    held_out: ClipIndex | None
    trained: ClipIndex | None
    unusable: Unusable
    fingerprint: str
    warnings: Sequence[str]


class Desk:
    """Rank 0's table while a dataset is prepared: what is trained, what is evaluated, the names of their encodings.

    held_out, trained: what is evaluated (`survey.evaluated_survey`), encoded even where the rest is not.
    """

    def __init__(
        self,
        cfg: RunConfig,
        model: ModelFolder,
        survey: Survey,
        held_out: Survey | None = None,
        trained: Survey | None = None,
    ):
        self.cfg, self.survey, self.cache = cfg, survey, Cache(cfg.data.cache_dir)
        names = EncodingNames(cfg, model)
        self.no_caption_key = names.caption(NO_CAPTION)
        # Of no clip: what a dropped caption becomes, and what videos are made of during training.
        prompts = cfg.sample.prompts if cfg.sample.every is not None else ()
        texts = dict.fromkeys([NO_CAPTION, *(one.prompt for one in prompts)])
        self.texts = {text: names.caption(text) for text in texts}
        self.part = Part(survey, names, cfg.data.encode == "cached")
        self.unread: dict[str, str] = {}  # evaluated files, path -> reason

        def part(one: Survey | None) -> Part | None:
            if one is None:
                return None
            known, unread = _with_digests(one, self.cache.root / "files.json")
            self.unread |= unread
            return Part(known, names, cached=True) if known.num_windows else None

        self.held_out, self.trained = part(held_out), part(trained)

    @property
    def _cached(self) -> list[Part]:
        return [part for part in (self.part, self.held_out, self.trained) if part is not None and part.cached]

    def work(self, num_ranks: int) -> list[Work]:
        """What every rank is to encode, dealt by cost. What killed writers left is taken over first."""
        for kind in ("captions", "clips"):
            self.cache.remove_abandoned(kind)
        keys = pa.concat_arrays([*(part.caption_keys for part in self._cached), _binary(b"".join(self.texts.values()))])
        texts = pa.concat_arrays(
            [*(part.captions for part in self._cached), pa.array(list(self.texts), self.part.captions.type)]
        )
        rows = _missing(keys, self.cache.snapshot("captions"))
        captions = pa.table({"key": keys.take(rows), "caption": texts.take(rows)})
        captions = captions.append_column("rank", pa.array(np.arange(len(rows), dtype=np.int32) % num_ranks))

        tables, first = [self.part.clips(np.zeros(0, np.int64))], 0
        if self._cached:
            windows = _missing(
                pa.concat_arrays([part.clip_keys for part in self._cached]), self.cache.snapshot("clips")
            )
            for part in self._cached:
                end = first + len(part.clip_keys)
                tables.append(part.clips(windows[(windows >= first) & (windows < end)] - first))
                first = end
        clips = pa.concat_tables(tables)
        clips = clips.take(np.argsort(-clips.column("cost").to_numpy(), kind="stable"))
        clips = clips.append_column("rank", pa.array(deal(clips.column("cost").to_numpy(), num_ranks)))
        return [
            Work(*(one.filter(pc.equal(one.column("rank"), rank)) for one in (captions, clips)))
            for rank in range(num_ranks)
        ]

    def no_caption(self) -> tuple[str, str]:
        """Key and place of the empty caption's states."""
        captions = self.cache.snapshot("captions")
        return self.no_caption_key.hex(), captions.places[captions.find(_binary(self.no_caption_key))[0]]

    def finish(self, unread: Mapping[bytes, str]) -> Finished:
        """The indices of everything that is encoded now, what is left out, and the fingerprint of what is trained.

        unread: what this run could not read but another may, key -> reason. Raises UserError where nothing is left, or
        where the cache lost what was made.
        """
        clips, captions = self.cache.snapshot("clips"), self.cache.snapshot("captions")
        folder = self.cache.root / "index"
        failed = {bytes.fromhex(key): reason for key, reason in clips.failures.items()} | dict(unread)
        survey, kept, index, num_lost = self.part.write(folder, clips, captions, failed)
        survey.check_any_left()
        held_out, trained, lost = None, None, dict(self.unread)
        if self.held_out is not None:
            left, _, held_out, num = self.held_out.write(folder, clips, captions, failed)
            lost |= {left.table.column("path")[row].as_py(): reason for row, reason in left.reasons.items()}
            num_lost += num
        if self.trained is not None:
            _, _, trained, num = self.trained.write(folder, clips, captions, failed)
            num_lost += 0 if self.part.cached else num  # else they have been counted
        if index is None or num_lost:
            raise UserError(
                f"{num_lost} encodings are no longer in {self.cache.root}, though they have been made: another run may "
                "have pruned them; start again, they are made anew"
            )
        # Of a data set of their own they are none of this one's clips.
        lost_here = {} if self.cfg.eval.path is not None else lost
        unusable = survey.unusable(index.path.with_suffix(".unusable.jsonl"), lost_here)
        warnings = [f"{path} cannot be evaluated: {reason}" for path, reason in lost.items()]
        warnings += _trained_too(self.part, kept, self.held_out)
        return Finished(index, held_out, trained, unusable, self._fingerprint(survey, kept), warnings)

    def _fingerprint(self, survey: Survey, kept: np.ndarray) -> str:
        part = self.part
        state = hashlib.blake2b(repr(survey.placement.sizes).encode(), digest_size=16)
        for column in [
            part.clip_keys.take(kept),
            part.caption_keys.take(part.caption_of[kept]),
            *([] if part.cached else [self.survey.column(name, kept) for name in ("path", "size", "mtime_ns")]),
        ]:
            for start in range(0, len(column), AT_ONCE):
                state.update(repr(column[start : start + AT_ONCE].to_pylist()).encode())
        return state.hexdigest()


def _with_digests(survey: Survey, memo: Path) -> tuple[Survey, dict[str, str]]:
    """A small survey with the digests of its files, which the manifest may lack; less those that cannot be read, path
    -> reason."""
    table, columns = survey.table, {}
    unread = np.zeros(len(table), bool)
    for name, digest_name in (("path", "digest"), ("image_path", "image_digest")):
        paths, digests = table.column(name).to_pylist(), table.column(digest_name).to_pylist()
        found = digest_files([path for path, one in zip(paths, digests) if path and one is None], memo)
        columns[digest_name] = [
            bytes.fromhex(found[path]) if one is None and path in found else one for path, one in zip(paths, digests)
        ]
        unread |= [bool(path) and one is None for path, one in zip(paths, columns[digest_name])]
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.binary(16)))
    reasons = {table.column("path")[row].as_py(): "it cannot be read" for row in np.flatnonzero(unread).tolist()}
    known = replace(survey, table=table)
    return known.only(np.flatnonzero(~unread[survey.placement.rows])), reasons


def _trained_too(trained: Part, kept: np.ndarray, held_out: Part | None) -> list[str]:
    """A warning where clips that are to be evaluated only are trained as well: copies, or the same files."""
    if held_out is None:
        return []
    # By what is in them, where it is known: copies. By name: other parts of a file, or in other buckets.
    paths = held_out.survey.column("path")
    copies = pc.is_in(held_out.clip_keys, trained.clip_keys.take(kept)).to_numpy(zero_copy_only=False)
    same = np.flatnonzero(copies | pc.is_in(paths, trained.survey.column("path", kept)).to_numpy())
    if not len(same):
        return []
    return [
        f"{len(same)} of the {len(paths)} clips that are to be evaluated only are trained too, as copies or "
        f"as parts of the same files (the first: {paths[int(same[0])].as_py()}): eval/loss shows less overfitting than "
        "there is; remove them from one of the two"
    ]


def _missing(keys: pa.FixedSizeBinaryArray, snapshot: Snapshot) -> np.ndarray:
    """Numbers of the keys that the cache neither has nor has given up, each key once."""
    failed = key_array(snapshot.failures)
    lacking = (snapshot.find(keys) < 0) & ~pc.is_in(keys, failed).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(lacking)
    _, first = np.unique(keys.take(rows).dictionary_encode().indices.to_numpy(), return_index=True)
    return rows[np.sort(first)]

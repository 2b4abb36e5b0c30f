"""From a dataset to samples that can be trained: list, probe, bucket, encode what is missing.

Everything that depends only on the clip and the model is computed here, once, and kept: the VAE's moments of the
clip, its first frame's pixels (the image noise is drawn anew at every step, before the VAE), and the caption's T5
states. The work is shared over the ranks, and T5 is gone before the transformer comes.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cogds.config import RunConfig
from cogds.core.buckets import assign, generate_buckets, parse_buckets
from cogds.core.conditioning import to_range
from cogds.core.geometry import ClipShape, ModelGeometry, num_tokens
from cogds.data.cache import Cache, digest, digest_files
from cogds.data.dataset import Sample
from cogds.data.manifest import Clip, Rejected, read_entries
from cogds.data.probe import probe_entries
from cogds.data.video import DecodeError, num_frames_at, read_clip, read_image
from cogds.errors import UserError
from cogds.model.load import ModelFolder, TextEncoder, load_vae, num_truncated
from cogds.runtime.world import World, on_all_ranks, on_rank0

NO_CAPTION = ""  # what a dropped caption becomes: the pipeline's negative prompt
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class EncodedData:
    """What is trained, bucket by bucket, and what is not. All ranks hold the same.

    samples: bucket 0's first, then bucket 1's, ...; sizes: how many each bucket has. rejected: each with its reason.
    no_caption_states [text_tokens, dim]: T5 states of the empty caption. num_truncated: captions too long for the text
    encoder. fingerprint: changes when any encoding of the dataset does.
    """

    buckets: tuple[ClipShape, ...]
    samples: tuple[Sample, ...]
    sizes: tuple[int, ...]
    rejected: tuple[Rejected, ...]
    no_caption_states: torch.Tensor
    num_truncated: int
    fingerprint: str


def make_buckets(cfg: RunConfig, geometry: ModelGeometry) -> tuple[ClipShape, ...]:
    """The run's buckets: the explicit list, or the generated grid. Raises UserError for what the model cannot take."""
    if cfg.data.buckets:
        return parse_buckets(cfg.data.buckets, geometry)
    return generate_buckets(cfg.data.bucket_areas, cfg.data.bucket_aspect_ratios, cfg.data.bucket_frames, geometry)


class _DecodedClips(Dataset[tuple[torch.Tensor | None, torch.Tensor | None, str]]):
    """Clips decoded ahead of the VAE in loader processes: (pixels [F, 3, H, W], first frame [3, H, W], error)."""

    def __init__(self, samples: Sequence[Sample], fps: float):
        self.samples, self.fps = samples, fps

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, torch.Tensor | None, str]:
        clip, shape = self.samples[index].clip, self.samples[index].shape
        try:
            if clip.kind == "image":
                pixels = read_image(clip.path, shape.height, shape.width)[None]
            else:
                pixels = read_clip(clip.path, shape, self.fps)
            first = read_image(clip.image_path, shape.height, shape.width) if clip.image_path else pixels[0]
        except DecodeError as error:
            return None, None, str(error)
        except Exception as error:  # one file never stops the run; FFmpeg has dozens of errors
            return None, None, f"decoding failed: {type(error).__name__}: {error}"
        return pixels, first, ""


def list_clips(cfg: RunConfig) -> tuple[list[Clip], list[Rejected]]:
    """Every clip of the dataset with its size, and the files that cannot be used."""
    return probe_entries(read_entries(cfg.data.path), cfg.data.num_workers)


def assign_buckets(
    clips: Sequence[Clip], buckets: Sequence[ClipShape], fps: float
) -> tuple[list[tuple[Clip, ClipShape]], list[Rejected]]:
    """Each clip with its bucket's shape; a clip shorter than every bucket is rejected."""
    placed, rejected = [], []
    for clip in clips:
        frames = num_frames_at(clip.info, fps) if clip.kind == "video" else 1
        bucket = assign(frames, clip.height, clip.width, buckets)
        if bucket is None:
            shortest = min(shape.frames for shape in buckets)
            reason = f"too short: {frames} frames at {fps:g} fps, the shortest bucket has {shortest}"
            rejected.append(Rejected(clip.path, reason))
        else:
            placed.append((clip, buckets[bucket]))
    return placed, rejected


def make_samples(
    placed: Sequence[tuple[Clip, ClipShape]], cfg: RunConfig, model: ModelFolder, cache_dir: Path
) -> tuple[list[Sample], list[Rejected], str]:
    """Samples with their cache keys, what could not be read for its digest, and the key of the empty caption."""
    parts = {
        part: sorted(str(path) for path in (model.path / part).iterdir() if path.is_file())
        for part in ("vae", "text_encoder", "tokenizer")
    }
    files = [path for paths in parts.values() for path in paths]
    files += [clip.path for clip, _ in placed] + [clip.image_path for clip, _ in placed if clip.image_path]
    digests = digest_files(files, cache_dir / "files.json")
    vae = [digests[path] for path in parts["vae"]]
    text = [digests[path] for path in parts["text_encoder"] + parts["tokenizer"]]

    def caption_key(caption: str) -> str:
        tokens = model.geometry.text_tokens
        return digest({"caption": caption, "encoder": text, "tokens": tokens, "dtype": cfg.train.precision})

    samples, rejected = [], []
    for clip, shape in placed:
        needed = [clip.path, *([clip.image_path] if clip.image_path else [])]
        if unreadable := [path for path in needed if path not in digests]:
            rejected.append(Rejected(clip.path, f"cannot be read: {unreadable[0]}"))
            continue
        fields = {
            "files": [digests[path] for path in needed],
            "kind": clip.kind,
            "bucket": str(shape),
            "fps": cfg.data.fps,
            "vae": vae,
            "dtype": cfg.train.precision,
        }
        samples.append(Sample(clip, shape, digest(fields), caption_key(clip.caption)))
    return samples, rejected, caption_key(NO_CAPTION)


def missing_captions(captions: dict[str, str], cache: Cache) -> list[str]:
    """Keys of the captions (key -> text) that the cache lacks, in one order."""
    return sorted(key for key in captions if not cache.has("captions", key))


def missing_clips(samples: Sequence[Sample], cache: Cache, geometry: ModelGeometry) -> list[Sample]:
    """One sample of every clip that the cache lacks, by falling cost: dealt out in turn, ranks get about the same."""
    distinct = {sample.clip_key: sample for sample in samples if not cache.has("clips", sample.clip_key)}
    return sorted(distinct.values(), key=lambda one: (-num_tokens(one.shape, geometry), one.clip_key))


def encode_captions(
    captions: dict[str, str], cache: Cache, model: ModelFolder, dtype: torch.dtype, world: World
) -> None:
    """Encode and cache these captions, key -> text."""
    if captions:
        encoder = TextEncoder(model, dtype, world.device)
        for key in _progress(captions, "captions", world):
            cache.write("captions", key, {"text_states": encoder.encode(captions[key])})


@torch.no_grad()
def encode_clips(
    samples: Sequence[Sample], cache: Cache, model: ModelFolder, cfg: RunConfig, world: World
) -> dict[str, str]:
    """Encode and cache these clips; returns what could not be decoded: key -> reason."""
    if not samples:
        return {}
    dtype = DTYPES[cfg.train.precision]
    vae = load_vae(model, dtype, world.device)
    # One clip ahead per worker: an 81x768x1360 clip is 254 MB of shared memory.
    decoded = DataLoader(
        _DecodedClips(samples, cfg.data.fps),
        batch_size=None,
        num_workers=cfg.data.num_workers,
        prefetch_factor=1 if cfg.data.num_workers else None,
    )
    undecoded = {}
    for (pixels, first_frame, error), sample in zip(_progress(decoded, "clips", world), samples):
        if pixels is None:
            undecoded[sample.clip_key] = error
            continue
        video = to_range(pixels, dtype).transpose(0, 1)[None].to(world.device)  # [1, 3, F, H, W]
        moments = vae.encode(video).latent_dist.parameters[0]
        cache.write("clips", sample.clip_key, {"moments": moments, "first_frame": first_frame})
    return undecoded


def _progress(items: Iterable, what: str, world: World) -> Iterable:
    return tqdm(items, desc=f"encoding {what}", unit=what[:-1], disable=world.rank > 0, dynamic_ncols=True)


def prepare(cfg: RunConfig, model: ModelFolder, buckets: tuple[ClipShape, ...], world: World) -> EncodedData:
    """List, probe, place and encode the dataset; every rank returns the same. Collective.

    A file that cannot be used is among `rejected`, never a crash. Raises UserError where nothing is left.
    """
    cache = Cache(cfg.data.cache_dir)

    def survey() -> tuple[list[Sample], list[Rejected], str]:
        clips, unreadable = list_clips(cfg)
        placed, unplaced = assign_buckets(clips, buckets, cfg.data.fps)
        samples, vanished, no_caption_key = make_samples(placed, cfg, model, cache.root)
        return samples, [*unreadable, *unplaced, *vanished], no_caption_key

    samples, rejected, no_caption_key = on_rank0(world, survey)
    on_rank0(world, lambda: check_any_left(samples, rejected, cfg.data.path))
    captions = {sample.caption_key: sample.clip.caption for sample in samples} | {no_caption_key: NO_CAPTION}
    # Asked once: while others encode, each rank would see another cache and take another share.
    keys, clips = on_rank0(
        world, lambda: (missing_captions(captions, cache), missing_clips(samples, cache, model.geometry))
    )
    share = slice(world.rank, None, world.size)
    dtype = DTYPES[cfg.train.precision]
    on_all_ranks(
        world, lambda: encode_captions({key: captions[key] for key in keys[share]}, cache, model, dtype, world)
    )
    shares = on_all_ranks(world, lambda: encode_clips(clips[share], cache, model, cfg, world))
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    # By key, not by path: a copy of a bad file under another name is bad too.
    undecoded = {key: reason for one in shares for key, reason in one.items()}
    rejected += [Rejected(one.clip.path, undecoded[one.clip_key]) for one in samples if one.clip_key in undecoded]
    # One order for all ranks and all restarts: the manifest's, within each bucket.
    kept = [one for shape in buckets for one in samples if one.shape == shape and one.clip_key not in undecoded]
    on_rank0(world, lambda: check_any_left(kept, rejected, cfg.data.path))
    return EncodedData(
        buckets=buckets,
        samples=tuple(kept),
        no_caption_states=cache.read("captions", no_caption_key)["text_states"],
        sizes=tuple(sum(sample.shape == shape for sample in kept) for shape in buckets),
        rejected=tuple(rejected),
        num_truncated=on_rank0(world, lambda: num_truncated([sample.clip.caption for sample in kept], model)),
        fingerprint=digest({"samples": [[sample.clip_key, sample.caption_key] for sample in kept]}),
    )


def check_any_left(samples: Sequence[Sample], rejected: Sequence[Rejected], data_path: str) -> None:
    """Raise UserError with the commonest reasons where every clip is rejected."""
    if samples:
        return
    reasons = Counter(one.reason.split(":")[0] for one in rejected)
    counts = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    raise UserError(
        f"data.path: not one of the {len(rejected)} clips of {data_path} can be trained ({counts}); "
        f"the first is {rejected[0].path}: {rejected[0].reason}"
    )


def write_rejected(rejected: Sequence[Rejected], file: Path) -> None:
    """One line of JSON per file that is not trained: path and reason."""
    file.write_text("".join(json.dumps({"path": one.path, "reason": one.reason}) + "\n" for one in rejected))

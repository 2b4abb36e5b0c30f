"""Cache keys of clips and captions: digests of everything that determines their encodings."""

import hashlib
import struct
from pathlib import Path

import pyarrow as pa

from cogds.config.schema import RunConfig
from cogds.core.geometry import ClipShape
from cogds.core.vae_memory import vae_can_encode, vae_encode_bytes
from cogds.data.cache.keys import cache_key, digest_files
from cogds.data.cache.store import key_array_of_bytes
from cogds.encode.clip_set import ClipSet
from cogds.model.cudnn import cudnn_version
from cogds.model.load import ModelFolder

CLIPS_AT_ONCE = 1 << 17  # bounds the memory for Python objects
# With data.vae_tiling=auto, buckets whose encoding would take more memory are encoded in overlapping tiles. A 24 GB
# card has this much beside the CUDA context, the VAE's weights and what its allocator cannot use.
UNTILED_BYTES = 20e9


def is_tiled(cfg: RunConfig, model: ModelFolder, shape: ClipShape) -> bool:
    """Whether clips of this shape are encoded in tiles.

    It follows from the config, the model and the shape, never from the machine: tiles change the encoding a little, so
    they are part of the cache key.
    """
    if cfg.data.vae_tiling == "auto":
        is_too_large = vae_encode_bytes(shape, tiling=False, vae=model.vae_size) > UNTILED_BYTES
        return is_too_large or not vae_can_encode(shape, tiling=False, vae=model.vae_size)
    return cfg.data.vae_tiling == "on"


class CacheKeys:
    """Computes cache keys, 16 bytes each. What many encodings share is digested once."""

    def __init__(self, cfg: RunConfig, model: ModelFolder):
        self._cfg, self._model = cfg, model
        parts = {
            part: sorted(str(path) for path in (model.path / part).iterdir() if path.is_file())
            for part in ("vae", "text_encoder", "tokenizer")
        }
        paths = [path for part_paths in parts.values() for path in part_paths]
        digests = digest_files(paths, Path(cfg.data.cache_dir) / "files.json")
        self._vae = [digests[path] for path in parts["vae"]]
        encoder = [digests[path] for path in parts["text_encoder"] + parts["tokenizer"]]
        fields = {"encoder": encoder, "tokens": model.geometry.text_tokens, "dtype": cfg.train.precision}
        self._caption_prefix = cache_key(fields).encode()

    def caption(self, caption: str) -> bytes:
        """Key of a caption's T5 states."""
        return _digest(self._caption_prefix + caption.encode())

    def captions(self, captions: pa.LargeStringArray) -> pa.FixedSizeBinaryArray:
        """Keys of captions."""
        return key_array_of_bytes(b"".join(self.caption(caption.as_py()) for caption in captions))

    def clips(self, clips: ClipSet) -> pa.FixedSizeBinaryArray:
        """Keys of all clips of a set, in its order."""
        prefixes = [self._clip_prefix(shape) for shape in clips.buckets]
        keys = bytearray()
        for start in range(0, clips.num_clips, CLIPS_AT_ONCE):
            chunk = slice(start, start + CLIPS_AT_ONCE)
            for bucket, start_s, kind, digest, image_digest in zip(
                clips.assignment.buckets[chunk].tolist(),
                clips.assignment.starts_s[chunk].tolist(),
                *(clips.column(name, chunk).to_pylist() for name in ("kind", "digest", "image_digest")),
            ):
                clip = struct.pack("<d", start_s) + kind.encode() + digest + (image_digest or b"")
                keys += _digest(prefixes[bucket] + clip)
        return key_array_of_bytes(keys)

    def _clip_prefix(self, shape: ClipShape) -> bytes:
        fields = {
            "bucket": str(shape),
            "fps": self._cfg.data.fps,
            "decoder": self._cfg.data.decoder,
            "tiled": is_tiled(self._cfg, self._model, shape),
            "vae": self._vae,
            "dtype": self._cfg.train.precision,
        }
        if (cudnn := cudnn_version()) is not None:
            fields["cudnn"] = cudnn
        return cache_key(fields).encode()


def _digest(message: bytes) -> bytes:
    return hashlib.blake2b(message, digest_size=16).digest()

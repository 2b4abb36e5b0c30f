"""Cache keys of clips and captions: digests of everything that determines their encodings."""

import hashlib
import struct
from collections.abc import Collection

import pyarrow as pa

from cogds.config.schema import RunConfig
from cogds.core.condition_modes import condition_frames, used_modes
from cogds.core.geometry import ClipShape
from cogds.data.cache.keys import cache_key, digest_files
from cogds.data.cache.store import key_array_of_bytes
from cogds.data.video.media import PIXELS_VERSION
from cogds.encode.clip_set import ClipSet
from cogds.model.cudnn import cudnn_version
from cogds.model.load import ModelFolder

_DIGESTED = ("kind", "digest", "image_digest", "control_digest")
CLIPS_AT_ONCE = 1 << 17  # bounds the memory for Python objects


class CacheKeys:
    """Computes cache keys, 16 bytes each. What many encodings share is digested once.

    tiled: the buckets that are encoded in tiles, which changes the encodings a little. Captions do not depend on it.
    """

    def __init__(self, cfg: RunConfig, model: ModelFolder, tiled: Collection[ClipShape] = ()):
        self._cfg, self._tiled, self._geometry = cfg, tiled, model.geometry
        model.fetch("vae", "text_encoder")
        parts = {
            part: sorted(str(path) for path in (model.path / part).iterdir() if path.is_file())
            for part in ("vae", "text_encoder", "tokenizer")
        }
        paths = [path for part_paths in parts.values() for path in part_paths]
        digests = digest_files(paths, cfg.metadata_dir / "files.json")
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
            for bucket, start_s, is_mirrored, kind, digest, image_digest, control_digest in zip(
                clips.assignment.buckets[chunk].tolist(),
                clips.assignment.starts_s[chunk].tolist(),
                clips.assignment.mirrored[chunk].tolist(),
                *(clips.column(name, chunk).to_pylist() for name in _DIGESTED),
            ):
                clip = struct.pack("<d", start_s) + kind.encode() + digest + (image_digest or b"")
                clip += b"mirrored" if is_mirrored else b""
                clip += b"control" + control_digest if control_digest else b""  # no change to keys without a control
                keys += _digest(prefixes[bucket] + clip)
        return key_array_of_bytes(keys)

    def _clip_prefix(self, shape: ClipShape) -> bytes:
        fields = {
            "bucket": str(shape),
            "fps": self._cfg.data.fps,
            "pixels_version": PIXELS_VERSION,
            "decoder": self._cfg.data.decoder,
            "tiled": shape in self._tiled,
            "vae": self._vae,
            "dtype": self._cfg.train.precision,
        }
        modes, settings = used_modes(self._cfg.conditioning.modes), self._cfg.condition_settings(self._geometry)
        if frames := condition_frames(modes, shape.frames, self._geometry, settings):
            fields["condition_frames"] = frames
        if (cudnn := cudnn_version()) is not None:
            fields["cudnn"] = cudnn
        return cache_key(fields).encode()


def _digest(message: bytes) -> bytes:
    return hashlib.blake2b(message, digest_size=16).digest()

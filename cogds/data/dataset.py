"""Cache -> samples -> one-shape batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset, default_collate

from cogds.core.geometry import ClipShape
from cogds.data.cache import Cache
from cogds.data.manifest import Clip


@dataclass(frozen=True)
class Sample:
    """A clip that can be trained: where it goes, and the keys of its encodings."""

    clip: Clip
    shape: ClipShape
    clip_key: str
    caption_key: str


class ClipDataset(Dataset[dict[str, torch.Tensor]]):
    """Encoded clips by index, read from the cache inside a DataLoader worker.

    An item holds `moments` [2C, F, H, W] (mean and log-variance of the VAE's posterior), `first_frame` uint8 [3, H, W]
    in pixels, and `text_states` [text_tokens, dim].
    """

    def __init__(self, samples: Sequence[Sample], cache_dir: Path | str):
        self.samples, self.cache = samples, Cache(cache_dir)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[index]
        return self.cache.read("clips", sample.clip_key) | self.cache.read("captions", sample.caption_key)


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack items of one bucket: every tensor gains a leading batch axis."""
    return default_collate(items)

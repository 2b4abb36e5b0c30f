"""Clips that turn out to be unreadable during training, shared between ranks and listed in `quarantine.jsonl`.

The file is only for the user. A resumed run tries these clips again, so repaired clips are trained.
"""

import json
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from cogds.data.loading.dataset import BadClip
from cogds.distributed.collectives import all_gather, all_reduce_sum, disagreeing_data_ranks
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.metrics.async_writer import AppendFile

logger = logging.getLogger(__name__)

FILE_NAME = "quarantine.jsonl"


class BadSamples:
    """Collects the bad clips of every rank. Rank 0 lists and logs them."""

    def __init__(self, world: World, output_dir: Path, num_clips: int, max_share: float):
        """max_share: share of `num_clips` that may be bad."""
        self._world, self._path = world, output_dir / FILE_NAME
        self._num_clips, self._max_share = num_clips, max_share
        self._file = AppendFile(self._path)
        self._pending: list[BadClip] = []
        self._known_rows: set[int] = set()

    def add(self, bad: Sequence[BadClip]) -> None:
        """Add the bad clips of this rank's micro-step. Collective if ranks share clips.

        Raises UserError if ranks that share a clip differ, because they would train parts of different clips.
        """
        if differing := disagreeing_data_ranks(self._world, zlib.crc32(repr([clip.row for clip in bad]).encode())):
            size = self._world.sequence_size
            ranks = ", ".join(f"{number * size} to {number * size + size - 1}" for number in differing)
            files = "".join(f" ({clip.path}: {clip.reason})" for clip in bad)
            raise UserError(
                f"data.path: ranks {ranks} share clips, but only some of them could read theirs{files}. Check the "
                "disks of their nodes, then resume.",
                shared=self._world.rank > 0 and not (bad and self._world.data_rank in differing),
            )
        self._pending += bad

    def sync(self) -> None:
        """Share the clips added since the last call. Collective. Raises UserError if too many clips are bad."""
        count = torch.tensor([float(len(self._pending))], device=self._world.device)
        if not all_reduce_sum(self._world, count).item():
            return
        added = [clip for clips in all_gather(self._world, self._pending) for clip in clips]
        self._pending = []
        new = {clip.row: clip for clip in added if clip.row not in self._known_rows}
        self._known_rows |= set(new)
        if self._world.rank == 0:
            fields = (
                {name: value for name, value in clip._asdict().items() if value is not None} for clip in new.values()
            )
            self._file.write([json.dumps(line).encode() + b"\n" for line in fields])
            for clip in new.values():
                logger.warning(f"{clip.path}: cannot be read, so another clip of its bucket is trained: {clip.reason}")
        if len(self._known_rows) > self._max_share * self._num_clips:
            raise UserError(
                f"data.max_unusable: {len(self._known_rows)} of {self._num_clips} clips could not be read, more than "
                f"the share of {self._max_share:g} that is allowed ({self._path} lists them). Repair the files, or "
                "check the cache with `cogds encode --verify`.",
                shared=self._world.rank > 0,
            )

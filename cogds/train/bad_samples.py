"""Clips that turned out to be bad while training: told to every rank, written to `quarantine.jsonl`.

The file is for people. A resumed run tries them again, and so finds out alike what is still bad, and what was mended.
"""

import json
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from cogds.data.loading.dataset import Bad
from cogds.distributed.collectives import all_gather, all_reduce_sum, disagreeing_data_ranks
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.metrics.async_writer import Outlet

logger = logging.getLogger(__name__)

FILE_NAME = "quarantine.jsonl"


class Quarantine:
    """What every rank found, gathered now and then; rank 0 writes it down and says it.

    most: the share of num_clips that may turn out to be bad.
    """

    def __init__(self, world: World, output_dir: Path, num_clips: int, most: float):
        self.world, self.file, self.num_clips, self.most = world, output_dir / FILE_NAME, num_clips, most
        self.listed = Outlet(self.file)
        self.found: list[Bad] = []
        self.rows: set[int] = set()

    def add(self, bad: Sequence[Bad]) -> None:
        """Hand over what this rank found in a micro-step. Where ranks share their clips it is collective.

        Raises UserError where such ranks did not find the same: they would train parts of different clips.
        """
        if odd := disagreeing_data_ranks(self.world, zlib.crc32(repr([one.row for one in bad]).encode())):
            size = self.world.sequence_size
            ranks = ", ".join(f"{number * size} to {number * size + size - 1}" for number in odd)
            raise UserError(
                f"of the ranks {ranks}, which share a clip, some could not read what others could"
                f"{''.join(f' ({one.path}: {one.reason})' for one in bad)}: look at their nodes' disks, and resume",
                shared=self.world.rank > 0 and not (bad and self.world.data_rank in odd),
            )
        self.found += bad

    def settle(self) -> None:
        """Tell every rank what the others found. Raises UserError where it is too much. Collective."""
        count = torch.tensor([float(len(self.found))], device=self.world.device)
        if not all_reduce_sum(self.world, count).item():
            return
        every = [bad for share in all_gather(self.world, self.found) for bad in share]
        self.found = []
        new = {bad.row: bad for bad in every if bad.row not in self.rows}
        self.rows |= set(new)
        if self.world.rank == 0:
            self.listed.write([json.dumps(bad._asdict()).encode() + b"\n" for bad in new.values()])
            for bad in new.values():
                logger.warning(f"replaced by another clip of its bucket: {bad.path}: {bad.reason}")
        if len(self.rows) > self.most * self.num_clips:
            raise UserError(
                f"{len(self.rows)} of {self.num_clips} clips turned out to be unusable, more than data.max_unusable "
                f"({self.most:g}) allows: see {self.file}; mend the files, or the cache with launch/encode.py --verify",
                shared=self.world.rank > 0,
            )

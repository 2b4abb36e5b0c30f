"""Clips that turned out to be bad while training: `quarantine.jsonl`, known to every rank, kept over resumes."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from cogds.data.dataset import Bad
from cogds.errors import UserError
from cogds.runtime.world import World, all_gather, all_reduce_sum, on_rank0

FILE_NAME = "quarantine.jsonl"


class Quarantine:
    """What every rank found, gathered now and then; rank 0 writes it down and says it.

    known: rows of the index that are bad, from an earlier part of the run. Raises UserError (from `settle`) where more
    than the share `most` of num_clips is bad.
    """

    def __init__(self, world: World, output_dir: Path, num_clips: int, most: float):
        self.world, self.file, self.num_clips, self.most = world, output_dir / FILE_NAME, num_clips, most
        self.found: list[Bad] = []
        self.rows = on_rank0(world, self._read)
        self.known = frozenset(self.rows)

    def _read(self) -> set[int]:
        if not self.file.exists():
            return set()
        rows = set()
        for line in self.file.read_text().splitlines():
            try:
                rows.add(json.loads(line)["row"])
            except (ValueError, KeyError, TypeError):  # a line that a kill cut short: it will be found again
                continue
        return rows

    def add(self, bad: Iterable[Bad]) -> None:
        """Hand over what this rank found."""
        self.found += bad

    def settle(self) -> None:
        """Tell every rank what the others found. Collective."""
        count = torch.tensor([float(len(self.found))], device=self.world.device)
        if not all_reduce_sum(self.world, count).item():
            return
        every = [bad for share in all_gather(self.world, self.found) for bad in share]
        self.found = []
        new = {bad.row: bad for bad in every if bad.row not in self.rows}
        self.rows |= set(new)
        if self.world.rank == 0:
            with self.file.open("a") as file:
                for bad in new.values():
                    file.write(json.dumps(bad._asdict()) + "\n")
                    print(f"replaced by another clip of its bucket: {bad.path}: {bad.reason}", file=sys.stderr)
        if len(self.rows) > self.most * self.num_clips:
            error = UserError(
                f"{len(self.rows)} of {self.num_clips} clips turned out to be unusable, more than data.max_unusable "
                f"({self.most:g}) allows: see {self.file}; mend the files, or the cache with "
                "launch/encode.py --verify"
            )
            error.shared = self.world.rank > 0
            raise error

"""Mixture: how often the clips of each data set are trained, as arithmetic between the plan and the index.

The plan deals in virtual clips: set s, of n clips in a bucket, has m = max(1, round(n * repeats)) there, each trained
once an epoch. Pass p over the bucket takes rows p * m to (p + 1) * m - 1 of an endless row that goes round and round
the set's n clips in one shuffled order. So after P passes each of them has been trained floor(P * m / n) or
ceil(P * m / n) times, and no pass has a clip twice where m <= n. The order of the row stays the same on purpose: were
it shuffled anew every round, a pass that meets two rounds could take a clip twice. What is trained when is shuffled
every pass all the same: by the plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index

from cogds.core.permutation import permute
from cogds.core.plan import clip_at
from cogds.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """Which clip a place of the plan stands for, where data sets are trained more or less often than once an epoch.

    sizes: clips of [bucket][data set], numbered within a bucket set by set; repeats: of each data set, how often its
    clips are trained in one epoch, in the mean (to 1 in 2 m, since m is whole); seed: the plan's. The plan's `sizes`
    are this one's `virtual_sizes`. Raises ValueError where the numbers make no mixture.
    """

    sizes: tuple[tuple[int, ...], ...]
    repeats: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(tuple(map(index, sets)) for sets in self.sizes))
        object.__setattr__(self, "repeats", tuple(map(float, self.repeats)))
        if any(len(sets) != len(self.repeats) for sets in self.sizes):
            raise ValueError(f"{len(self.repeats)} data sets have repeats, but a bucket has sizes of another number")
        # Written so that a NaN is refused too.
        if not all(0 < repeats < float("inf") for repeats in self.repeats):
            raise ValueError(f"repeats {self.repeats} must be finite and positive")
        if min((n for sets in self.sizes for n in sets), default=0) < 0:
            raise ValueError("a bucket cannot hold less than no clip of a data set")

    @cached_property
    def virtual_sets(self) -> tuple[tuple[int, ...], ...]:
        """m: clips trained in one epoch, of [bucket][data set]."""
        return tuple(
            tuple(max(1, round(n * repeats)) if n else 0 for n, repeats in zip(sets, self.repeats))
            for sets in self.sizes
        )

    @cached_property
    def virtual_sizes(self) -> tuple[int, ...]:
        """Clips trained in one epoch, of each bucket: what the plan takes for `sizes`."""
        return tuple(map(sum, self.virtual_sets))

    def clip(self, bucket: int, position: int) -> int:
        """The clip at a position of the bucket's stream, in [0, sum(sizes[bucket]))."""
        num_virtual = self.virtual_sizes[bucket]
        return self.real_clip(bucket, clip_at(position, num_virtual, bucket, self.seed), position // num_virtual)

    def real_clip(self, bucket: int, virtual: int, pass_number: int) -> int:
        """The clip that a virtual one stands for in one pass over the bucket: itself where a set is trained once."""
        first = 0
        for number, (m, n) in enumerate(zip(self.virtual_sets[bucket], self.sizes[bucket])):
            if virtual < m:
                row = pass_number * m + virtual
                return first + (virtual if m == n else permute(row % n, n, self.seed, bucket, number))
            virtual -= m
            first += n
        raise ValueError(f"bucket {bucket} has {self.virtual_sizes[bucket]} clips an epoch: there is none beyond them")

    def next_clips(self, bucket: int, position: int, stride: int) -> Iterator[int]:
        """The clip at a position, then those that may stand in for it: what the bucket's stream holds from `stride` on.

        stride: positions that the micro-step takes of the bucket, so that each of its slots has a stand-in of its own.
        Ends when every clip of the bucket has come at least once; some come more often.
        """
        yield self.clip(bucket, position)
        m = self.virtual_sizes[bucket]
        # The rest of a pass, then as many whole ones as the set that is trained least often needs.
        passes = 1 + max(-(-n // v) for n, v in zip(self.sizes[bucket], self.virtual_sets[bucket]) if n)
        for turn in range(passes * m):
            yield self.clip(bucket, position + stride + turn)


def repeats_from_weights(weights: Sequence[float], num_clips: Sequence[int]) -> tuple[float, ...]:
    """Repeats that give each data set its weight's share of the training, an epoch being as long as all clips once.

    num_clips: of each data set, over all buckets. Raises UserError for a set without clips: nothing can be its share.
    """
    if len(weights) != len(num_clips):
        raise ValueError(f"{len(num_clips)} data sets have {len(weights)} weights: give each its own")
    for number, (weight, n) in enumerate(zip(weights, num_clips)):
        if n <= 0:
            raise UserError(
                f"data.sets[{number}] has weight {weight:g} but not one clip that can be trained: "
                "remove it, or mend its clips"
            )
        if not 0 < weight < float("inf"):
            raise UserError(f"data.sets[{number}] has weight {weight}: give a number above 0")
    return tuple(weight / sum(weights) * sum(num_clips) / n for weight, n in zip(weights, num_clips))

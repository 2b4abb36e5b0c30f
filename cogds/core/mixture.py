"""Mixture of datasets: maps the plan's virtual clips to real ones, so that datasets can have different repeats.

The plan works with virtual clips. A dataset with n clips in a bucket has m = max(1, round(n * repeats)) virtual clips
there, each trained once per epoch. Pass p over the bucket takes places p * m to (p + 1) * m - 1 of an endless sequence
that cycles through the n clips in one shuffled order. So after P passes, each clip has been trained floor(P * m / n) or
ceil(P * m / n) times, and a pass never repeats a clip if m <= n. The order is the same in every cycle, because a pass
that spans two differently shuffled cycles could repeat a clip. The plan still shuffles every pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import NamedTuple

from cogds.core.permutation import keyed_hash, permute
from cogds.core.plan import clip_at
from cogds.errors import UserError


class Visit(NamedTuple):
    """A clip of a bucket at a position of its stream. number: how many times the stream visits the clip before."""

    clip: int
    number: int


def caption_of_visit(number: int, num_captions: int, seed: int, row: int) -> int:
    """The caption, in [0, num_captions), that a clip is trained with at its visit of this number.

    The captions take turns, reshuffled after every num_captions visits. So each is used equally often, give or take
    once. row: of the clip in the index.
    """
    turn, number = divmod(number, num_captions)
    return permute(number, num_captions, keyed_hash("caption", seed, row), turn)


@dataclass(frozen=True)
class Mixture:
    """Datasets with different repeats per epoch. The plan is built with `virtual_sizes` as its sizes.

    Attributes:
        sizes: number of clips, [bucket][dataset]. Clips are numbered within a bucket, one dataset after the other.
        repeats: mean number of times that each dataset's clips are trained per epoch. m is rounded, so the actual
            mean differs by up to 1 / (2 n).
        seed: of the plan.

    Raises:
        ValueError: the values contradict each other or are out of range.
    """

    sizes: tuple[tuple[int, ...], ...]
    repeats: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(tuple(map(index, sets)) for sets in self.sizes))
        object.__setattr__(self, "repeats", tuple(map(float, self.repeats)))
        if any(len(sets) != len(self.repeats) for sets in self.sizes):
            raise ValueError(f"sizes {self.sizes} must have {len(self.repeats)} values per bucket, one per dataset")
        # This comparison also rejects NaN.
        if not all(0 < repeats < float("inf") for repeats in self.repeats):
            raise ValueError(f"repeats {self.repeats} must be finite and positive")
        if min((n for sets in self.sizes for n in sets), default=0) < 0:
            raise ValueError(f"sizes {self.sizes} must not be negative")

    @cached_property
    def virtual_sets(self) -> tuple[tuple[int, ...], ...]:
        """m: number of clips trained per epoch, [bucket][dataset]."""
        return tuple(
            tuple(max(1, round(n * repeats)) if n else 0 for n, repeats in zip(sets, self.repeats))
            for sets in self.sizes
        )

    @cached_property
    def virtual_sizes(self) -> tuple[int, ...]:
        """Number of clips trained per epoch, for each bucket."""
        return tuple(map(sum, self.virtual_sets))

    def visit(self, bucket: int, position: int) -> Visit:
        """The visit at a position of the bucket's stream. Its clip is in [0, sum(sizes[bucket]))."""
        num_virtual = self.virtual_sizes[bucket]
        pass_number, virtual, first = position // num_virtual, clip_at(position, num_virtual, bucket, self.seed), 0
        for set_number, (m, n) in enumerate(zip(self.virtual_sets[bucket], self.sizes[bucket])):  # noqa: B007
            if virtual < m:
                break
            virtual -= m
            first += n
        if m == n:  # with 1 repeat, virtual clips are the real ones
            return Visit(first + virtual, pass_number)
        cycle, place = divmod(pass_number * m + virtual, n)
        return Visit(first + permute(place, n, self.seed, bucket, set_number), cycle)

    def next_visits(self, bucket: int, position: int, stride: int) -> Iterator[Visit]:
        """Yield the visit at a position, then its possible substitutes: the visits `stride` positions on.

        Ends when every clip of the bucket has been yielded at least once.

        Args:
            stride: number of positions that the micro-step draws from the bucket, so that its slots get different
                substitutes.
        """
        yield self.visit(bucket, position)
        m = self.virtual_sizes[bucket]
        # The rest of this pass, then as many passes as the dataset with the fewest repeats needs.
        num_passes = 1 + max(-(-n // v) for n, v in zip(self.sizes[bucket], self.virtual_sets[bucket]) if n)
        for offset in range(num_passes * m):
            yield self.visit(bucket, position + stride + offset)


def repeats_from_weights(weights: Sequence[float], num_clips: Sequence[int]) -> tuple[float, ...]:
    """Return the repeats that give each dataset its weighted share, in an epoch as long as all clips once.

    Args:
        num_clips: of each dataset, over all buckets.

    Raises:
        UserError: a dataset has no clips or an invalid weight.
    """
    if len(weights) != len(num_clips):
        raise ValueError(f"weights: {len(weights)} values for {len(num_clips)} datasets")
    for number, (weight, n) in enumerate(zip(weights, num_clips)):
        if n <= 0:
            raise UserError(
                f"data.sets[{number}]: weight {weight:g}, but no clip can be trained. Remove the dataset, or fix its "
                "clips."
            )
        if not 0 < weight < float("inf"):
            raise UserError(f"data.sets[{number}].weight: {weight} is not a positive number. Pass a number above 0.")
    return tuple(weight / sum(weights) * sum(num_clips) / n for weight, n in zip(weights, num_clips))

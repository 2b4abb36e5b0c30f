"""Plan: which clips every rank trains on at step N, as arithmetic on integers. No replay, no state.

Clips lie in buckets of one shape. A **micro-step** is one forward and backward on all ranks, in one bucket and with
one batch size; `accumulation` micro-steps make an optimizer step. Everything follows from three ideas:

**Streams.** Bucket b, of n clips, is an endless row of positions; position k is clip `permute(k % n)` of pass k // n,
reshuffled every pass. A micro-step in b takes the next D = min(world_size * B, n) positions, where
B = min(batch_size, max(1, n // world_size)). A tail is therefore never dropped: the next pass begins in the same batch.
Where n < world_size, the ranks left over train copies, with other noise, and copies share their clip's weight.

**Epochs.** Bucket b has had floor((e * n - o) / D) micro-steps when epoch e begins, o being where its stream stood
when the plan began. So at every epoch's end each clip has been seen e or e - 1 times, and e - 1 to e + 1 times
within epoch e (counted from 0), for ever: nothing drifts.

**Turns.** Within an epoch a binary tree over the buckets says whose turn it is: after t turns at a node of n turns, of
which L belong to the left child, the left has had floor((t * L + phase) / n), and the right the rest. Entry t goes
where the count rises, so both "whose turn" and "how often before" are one walk down the tree. phase, a keyed hash
modulo n, gives every epoch another order. Each node errs by less than 1 from proportional, and a parent's error
reaches a child in proportion; in a Huffman tree the sizes above a leaf grow at least like Fibonacci numbers, so a
bucket is never `UNEVENNESS` micro-steps or more from its even share, however many buckets there are.

A changed world size, accumulation or batch size starts a new plan from where the old one stands (`Plan.resized`): its
`Origin` is a few integers for the checkpoint, and its first epoch is the rest of the current one.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from heapq import heapify, heappop, heappush
from operator import index

from cogds.core.permutation import keyed_hash, permute
from cogds.errors import UserError

# The sum of the reciprocal Fibonacci numbers, 1 + 1 + 1/2 + 1/3 + 1/5 + ..., rounded up.
UNEVENNESS = 3.36


@dataclass(frozen=True)
class Origin:
    """Where a plan begins: the optimizer step, its epoch, and how far each bucket's stream has come.

    Goes into a checkpoint as `dataclasses.asdict(origin)` and comes back as `Origin(**that)`. No offsets: all 0.
    """

    step: int = 0
    epoch: int = 0
    offsets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("step", "epoch"):
            object.__setattr__(self, name, index(getattr(self, name)))
        object.__setattr__(self, "offsets", tuple(map(index, self.offsets)))
        if self.step < 0 or self.epoch < 0:
            raise ValueError(f"a plan cannot begin at step {self.step}, epoch {self.epoch}: both count from 0")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One micro-step: the same bucket and batch size on every rank.

    Its world_size * batch_size slots belong to the ranks in order, batch_size each; slot s trains stream position
    start + s % num_draws. first_slot and step_slots place them among all slots of the optimizer step, and step_draws
    is the number of positions that the step draws.
    """

    bucket: int
    epoch: int
    start: int
    num_draws: int
    num_clips: int
    batch_size: int
    world_size: int
    accumulation: int
    first_slot: int
    step_slots: int
    step_draws: int
    seed: int

    def slots_of(self, rank: int) -> range:
        """The rank's slots, numbered over the whole optimizer step: a subset of range(step_slots)."""
        first = self.first_slot + self._slots(rank).start
        return range(first, first + self.batch_size)

    def positions_of(self, rank: int) -> tuple[int, ...]:
        """Stream positions of the rank's slots; position // num_clips is the pass over the bucket."""
        return tuple(self.start + slot % self.num_draws for slot in self._slots(rank))

    def clips_of(self, rank: int) -> tuple[int, ...]:
        """The rank's clips: indices within the bucket, one a slot."""
        n = self.num_clips
        return tuple(permute(k % n, n, self.seed, self.bucket, k // n) for k in self.positions_of(rank))

    def weights_of(self, rank: int) -> tuple[float, ...]:
        """What to multiply each slot's loss with so that every clip drawn counts the same in the optimizer step.

        Mean over the batch, / accumulation and mean over ranks divide a slot's loss by W * A * B. The mean over the
        step's distinct draws, of which micro-step j has D_j, divides it by copies * sum_j D_j instead. Hence

            weight = W * A * B / (copies * sum_j D_j)

        which is exactly 1.0 wherever all micro-steps have the same number of draws, D_j = W * B.
        """
        world_slots, num_draws = self.world_size * self.batch_size, self.num_draws
        total = world_slots * self.accumulation
        copies = (world_slots // num_draws + (s % num_draws < world_slots % num_draws) for s in self._slots(rank))
        return tuple(total / (c * self.step_draws) for c in copies)

    def _slots(self, rank: int) -> range:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a world of {self.world_size}")
        return range(rank * self.batch_size, (rank + 1) * self.batch_size)


@dataclass(frozen=True)
class Plan:
    """Which clips every rank trains on at every step: `plan.at(step)[i].clips_of(rank)`.

    sizes: clips in each bucket (0 is allowed); batch_sizes: the most clips per rank and micro-step in each. A bucket
    is known by its place in them, a clip by its place in the bucket: both orders must stay what they are.
    Raises ValueError where the numbers make no plan, and UserError where all buckets are empty.
    """

    sizes: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    world_size: int
    accumulation: int
    seed: int
    origin: Origin = Origin()

    def __post_init__(self) -> None:
        for name in ("sizes", "batch_sizes"):
            object.__setattr__(self, name, tuple(map(index, getattr(self, name))))
        for name in ("world_size", "accumulation", "seed"):
            object.__setattr__(self, name, index(getattr(self, name)))
        if len(self.batch_sizes) != len(self.sizes):
            raise ValueError(f"{len(self.sizes)} buckets have {len(self.batch_sizes)} batch sizes: give each its own")
        if min(self.world_size, self.accumulation) < 1:
            raise ValueError(f"world_size {self.world_size} and accumulation {self.accumulation} must be at least 1")
        if min(self.batch_sizes, default=1) < 1:
            raise ValueError(f"batch sizes must be at least 1, found {min(self.batch_sizes)}")
        if min(self.sizes, default=0) < 0:
            raise ValueError(f"a bucket cannot hold {min(self.sizes)} clips")
        if not any(self.sizes):
            raise UserError(
                f"there is nothing to train on: none of the {len(self.sizes)} buckets holds a clip; "
                "look at what the manifest lists as unusable, and at the buckets of the config"
            )
        self._check_origin()

    def _check_origin(self) -> None:
        if not self.origin.offsets:
            object.__setattr__(self, "origin", replace(self.origin, offsets=(0,) * len(self.sizes)))
        epoch, offsets = self.origin.epoch, self.origin.offsets
        if len(offsets) != len(self.sizes):
            raise ValueError(f"the plan's origin has {len(offsets)} buckets, the plan {len(self.sizes)}")
        for bucket, (offset, n) in enumerate(zip(offsets, self.sizes)):
            # What a plan can have drawn within this epoch: less than one pass behind its start, at most at its end.
            if not max(0, (epoch - 1) * n) <= offset <= (epoch + 1) * n:
                raise ValueError(
                    f"the plan's origin has drawn {offset} clips of bucket {bucket}, which holds {n}: that does not "
                    f"belong to epoch {epoch}; the origin comes from another set of clips"
                )

    @cached_property
    def local_batch_sizes(self) -> tuple[int, ...]:
        """B: clips per rank and micro-step in each bucket, smaller than asked where the bucket is too small."""
        return tuple(min(batch, max(1, n // self.world_size)) for n, batch in zip(self.sizes, self.batch_sizes))

    @cached_property
    def num_draws(self) -> tuple[int, ...]:
        """D: distinct stream positions that one micro-step takes from each bucket, over all ranks."""
        return tuple(min(self.world_size * local, n) for n, local in zip(self.sizes, self.local_batch_sizes))

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in an epoch, on average."""
        micro_steps = sum(Fraction(n, draws) for n, draws in zip(self.sizes, self.num_draws) if n)
        return float(micro_steps / self.accumulation)

    def step_of_epoch(self, epoch: int) -> int:
        """The first optimizer step to begin at or after the start of `epoch`: train until there for `epoch` epochs."""
        return self.origin.step + -(-sum(self._turns_before(epoch)) // self.accumulation)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, in which optimizer step `step` begins."""
        return self._epoch_at(self._micro_step(step)).number

    def coverage(self, step: int) -> tuple[int, ...]:
        """How far each bucket's stream has come before optimizer step `step`: positions drawn since step 0."""
        micro_step = self._micro_step(step)
        epoch = self._epoch_at(micro_step)
        return self._offsets(epoch.turns_after(micro_step - epoch.first))

    def at(self, step: int) -> tuple[MicroBatch, ...]:
        """The `accumulation` micro-steps of optimizer step `step`.

        Raises ValueError where the step lies before the plan's origin.
        """
        first = self._micro_step(step)
        epoch = self._epoch_at(first)
        before = epoch.turns_after(first - epoch.first)
        turns = []
        for micro_step in range(first, first + self.accumulation):
            if micro_step >= epoch.end:
                epoch = self._epoch_at(micro_step)
            after = epoch.turns_after(micro_step + 1 - epoch.first)
            bucket = next(b for b, (was, now) in enumerate(zip(before, after)) if now > was)
            turns.append((bucket, epoch.number, self.origin.offsets[bucket] + before[bucket] * self.num_draws[bucket]))
            before = after

        step_slots = self.world_size * sum(self.local_batch_sizes[bucket] for bucket, _, _ in turns)
        step_draws = sum(self.num_draws[bucket] for bucket, _, _ in turns)
        batches, first_slot = [], 0
        for bucket, number, start in turns:
            batches.append(
                MicroBatch(
                    bucket=bucket,
                    epoch=number,
                    start=start,
                    num_draws=self.num_draws[bucket],
                    num_clips=self.sizes[bucket],
                    batch_size=self.local_batch_sizes[bucket],
                    world_size=self.world_size,
                    accumulation=self.accumulation,
                    first_slot=first_slot,
                    step_slots=step_slots,
                    step_draws=step_draws,
                    seed=self.seed,
                )
            )
            first_slot += self.world_size * self.local_batch_sizes[bucket]
        return tuple(batches)

    def resized(
        self, step: int, world_size: int, accumulation: int, batch_sizes: Sequence[int] | None = None
    ) -> "Plan":
        """The plan that goes on from optimizer step `step` with another layout: it repeats and loses no clip.

        With the same layout it is this very plan, so resuming may always ask, and stays bit for bit the same run.
        """
        batch_sizes = self.batch_sizes if batch_sizes is None else tuple(batch_sizes)
        if (world_size, accumulation, batch_sizes) == (self.world_size, self.accumulation, self.batch_sizes):
            return self
        origin = Origin(step, self.epoch_of(step), self.coverage(step))
        return replace(self, world_size=world_size, accumulation=accumulation, batch_sizes=batch_sizes, origin=origin)

    def _micro_step(self, step: int) -> int:
        """The first micro-step of an optimizer step, counted from the origin (accumulation was another before it)."""
        if step < self.origin.step:
            raise ValueError(f"step {step} lies before step {self.origin.step}, where this plan begins")
        return (index(step) - self.origin.step) * self.accumulation

    def _offsets(self, turns: Sequence[int]) -> tuple[int, ...]:
        return tuple(o + t * draws for o, t, draws in zip(self.origin.offsets, turns, self.num_draws))

    def _turns_before(self, epoch: int) -> list[int]:
        """Micro-steps of each bucket between the origin and the start of `epoch`."""
        if epoch <= self.origin.epoch:
            return [0] * len(self.sizes)
        return [
            (epoch * n - offset) // draws if n else 0
            for n, offset, draws in zip(self.sizes, self.origin.offsets, self.num_draws)
        ]

    def _epoch_at(self, micro_step: int) -> "_Epoch":
        """The epoch that holds a micro-step: the last one that begins at or before it."""
        # A whole epoch has at least this many micro-steps, and only the first may not be whole.
        fewest = sum(n // draws for n, draws in zip(self.sizes, self.num_draws) if n)
        candidates = range(self.origin.epoch + 1, self.origin.epoch + 2 + micro_step // fewest)
        passed = bisect_right(candidates, micro_step, key=lambda e: sum(self._turns_before(e)))
        number = self.origin.epoch + passed
        return _Epoch(number, self._turns_before(number), self._turns_before(number + 1), self.seed)


class _Epoch:
    """The order of one epoch's micro-steps, [first, end) counted from the plan's origin."""

    def __init__(self, number: int, starts: Sequence[int], ends: Sequence[int], seed: int) -> None:
        self.number, self.starts = number, starts
        self.first, self.end = sum(starts), sum(ends)
        # Huffman: the two smallest join until one is left. Nodes follow the leaves in number, the root comes last.
        heap = [(end - start, bucket) for bucket, (start, end) in enumerate(zip(starts, ends)) if end > start]
        heapify(heap)
        self.root = heap[0][1]
        # (node, left child, right child, turns of the left, turns of both, phase), the root first.
        self.nodes: list[tuple[int, int, int, int, int, int]] = []
        for node in range(len(starts), len(starts) + len(heap) - 1):
            (num_left, left), (num_right, right) = heappop(heap), heappop(heap)
            total = num_left + num_right
            phase = keyed_hash("cogds.turns", seed, number, node) % total
            self.nodes.append((node, left, right, num_left, total, phase))
            self.root = node
            heappush(heap, (total, node))
        self.nodes.reverse()

    def turns_after(self, num_turns: int) -> list[int]:
        """Micro-steps of each bucket since the plan's origin, after the first `num_turns` of this epoch."""
        turns = [0] * (len(self.starts) + len(self.nodes))
        turns[self.root] = num_turns
        for node, left, right, num_left, total, phase in self.nodes:
            turns[left] = (turns[node] * num_left + phase) // total
            turns[right] = turns[node] - turns[left]
        return [start + turn for start, turn in zip(self.starts, turns)]

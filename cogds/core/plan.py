"""Training plan: which clips each rank trains at step N, computed from integers alone. No state and no replay.

Each bucket holds clips of one shape. A **micro-step** is one forward and backward pass on all ranks. `accumulation`
micro-steps make an optimizer step. The clips that one rank trains in a micro-step, B clips of one bucket, are a
**batch**. The plan is built from four parts:

**Streams.** Bucket b, with n clips, is an endless stream of positions. Position k is clip `permute(k % n)` of pass
k // n, reshuffled in every pass. Batch i of the bucket is positions i * B to (i + 1) * B - 1. The last clips of a pass
are never dropped: the next pass begins in the same batch.

**Groups.** All ranks of a micro-step train batches of one group of buckets. Without `costs`, every bucket is its own
group, so all ranks train the same shape. With costs, buckets whose batches cost the same, within `tolerance`, form a
group, so ranks may train different shapes. The batches of a group are an endless stream in which its buckets take
turns. A micro-step takes the next D = min(world_size, batches that the group can provide without repeating a clip). If
D < world_size, the remaining ranks train copies with different noise, and all copies of a clip share its weight. B is
reduced if the group would otherwise have fewer batches than there are ranks.

**Epochs.** By the start of epoch e, a group has trained U(e) = sum_b floor((e * n_b - o_b) / B_b) batches, minus those
that do not fill a micro-step (o_b: stream position of the bucket at the plan's origin). Batches that complete the
previous pass come first in each pass. So when epoch e (counted from 0) starts, each clip has been trained e or e - 1
times, and during it e - 1 to e + 1 times. This holds for any number of epochs, without drift.

**Turns.** Within an epoch, a binary tree over the groups determines the order. Consider a node with n turns, L of them
for its left child: after t turns, the left child has had floor((t * L + phase) / n) and the right child the rest. Turn
t belongs to the child whose count it increases, so one walk down the tree gives both the current group and its number
of earlier turns. phase, a keyed hash modulo n, gives every epoch a different order. Each node is off by less than 1
from an exactly proportional split, and a parent's error reaches a child in proportion. In a Huffman tree, the sizes
above a leaf grow at least like Fibonacci numbers, so a group always stays less than `UNEVENNESS` micro-steps from its
proportional share, for any number of groups. The buckets of a group take turns by the same kind of tree.

A different world size, accumulation, batch size or grouping starts a new plan at the current position of the old one
(`Plan.resized`). Its `Origin` is a few integers in the checkpoint, and its first epoch is the rest of the current one.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import accumulate, pairwise
from operator import index

from cogds.core.permutation import keyed_hash, permute
from cogds.errors import UserError

# The sum of the reciprocal Fibonacci numbers, 1 + 1 + 1/2 + 1/3 + 1/5 + ..., rounded up.
UNEVENNESS = 3.36

# Largest relative difference between the costs of one group, which is the time that a rank may wait for another.
TOLERANCE = 0.03


@dataclass(frozen=True)
class Origin:
    """Start of a plan: the optimizer step, its epoch, and the stream position of each bucket.

    Saved in checkpoints as `dataclasses.asdict(origin)` and restored by `Origin(**fields)`. Without offsets, all are 0.
    """

    step: int = 0
    epoch: int = 0
    offsets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("step", "epoch"):
            object.__setattr__(self, name, index(getattr(self, name)))
        object.__setattr__(self, "offsets", tuple(map(index, self.offsets)))
        if self.step < 0 or self.epoch < 0:
            raise ValueError(f"a plan cannot start at step {self.step}, epoch {self.epoch}: neither can be negative")


def clip_at(position: int, num_clips: int, bucket: int, seed: int) -> int:
    """The clip, in [0, num_clips), at a position of the bucket's stream, which is reshuffled in every pass."""
    return permute(position % num_clips, num_clips, seed, bucket, position // num_clips)


def max_batches_per_micro_step(sizes: Sequence[int], batch_sizes: Sequence[int]) -> int:
    """Number of batches that buckets of these sizes can provide to one micro-step within one pass.

    For a single bucket this is n // B. If batches hold several clips, one batch of the bucket may span the end of a
    pass and the start of the next, so that it lies completely in neither. With several such buckets, all but one of
    these batches are subtracted.
    """
    num_spanning = sum(n > 0 and batch > 1 for n, batch in zip(sizes, batch_sizes))
    return sum(n // batch for n, batch in zip(sizes, batch_sizes)) - max(0, num_spanning - 1)


@dataclass(frozen=True, slots=True)
class Part:
    """The batches of one bucket in a micro-step: num_batches x batch_size stream positions, from `start`."""

    bucket: int
    start: int
    num_batches: int
    batch_size: int
    num_clips: int

    @property
    def num_draws(self) -> int:
        """Number of stream positions in the part."""
        return self.num_batches * self.batch_size


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One micro-step: parts of the buckets of one group, with one batch per rank.

    Batches are assigned to ranks in order. If there are fewer batches than ranks, the assignment wraps around. A slot
    is one clip of a rank's batch, numbered over the whole optimizer step.

    Attributes:
        first_slot: number of slots in the optimizer step before this micro-step.
        step_slots: number of slots in the optimizer step.
        step_draws: number of stream positions that the optimizer step draws.
    """

    epoch: int
    parts: tuple[Part, ...]
    world_size: int
    accumulation: int
    first_slot: int
    step_slots: int
    step_draws: int
    seed: int

    @property
    def num_batches(self) -> int:
        """D: number of distinct batches. Ranks from D on train copies."""
        return sum(part.num_batches for part in self.parts)

    @property
    def num_draws(self) -> int:
        """Number of distinct stream positions over all ranks."""
        return sum(part.num_draws for part in self.parts)

    @property
    def num_slots(self) -> int:
        """Number of clips over all ranks, including copies."""
        return self._slots_before(self.world_size)

    def bucket_of(self, rank: int) -> int:
        """The bucket that the rank trains."""
        return self.batch_of(rank)[0].bucket

    def batch_size_of(self, rank: int) -> int:
        """Number of clips that the rank trains."""
        return self.batch_of(rank)[0].batch_size

    def slots_of(self, rank: int) -> range:
        """The rank's slots, numbered over the whole optimizer step: a subset of range(step_slots)."""
        first = self.first_slot + self._slots_before(rank)
        return range(first, first + self.batch_size_of(rank))

    def positions_of(self, rank: int) -> tuple[int, ...]:
        """Stream positions of the rank's slots. position // num_clips is the pass over the bucket."""
        part, batch = self.batch_of(rank)
        first = part.start + batch * part.batch_size
        return tuple(range(first, first + part.batch_size))

    def clips_of(self, rank: int) -> tuple[int, ...]:
        """Indices of the rank's clips within their bucket, one per slot."""
        part, _ = self.batch_of(rank)
        return tuple(clip_at(k, part.num_clips, part.bucket, self.seed) for k in self.positions_of(rank))

    def weights_of(self, rank: int) -> tuple[float, ...]:
        """Loss weight of each slot, so that every clip drawn counts the same in the optimizer step.

        The mean over the rank's batch, the division by accumulation and the mean over ranks divide a slot's loss by
        W * A * B (B: this rank's batch size). The mean over the step's distinct draws, D_j in micro-step j, divides it
        by copies * sum_j D_j instead. Hence

            weight = W * A * B / (copies * sum_j D_j)

        This is exactly 1.0 if no rank trains copies and all ranks have the same batch size.
        """
        part, _ = self.batch_of(rank)
        copies = len(range(rank % self.num_batches, self.world_size, self.num_batches))
        weight = self.world_size * self.accumulation * part.batch_size / (copies * self.step_draws)
        return (weight,) * part.batch_size

    def batch_of(self, rank: int) -> tuple[Part, int]:
        """The part that the rank trains, and the index of its batch within the part."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is out of range for world size {self.world_size}")
        batch = rank % self.num_batches
        for part in self.parts:
            if batch < part.num_batches:
                break
            batch -= part.num_batches
        return part, batch

    def _slots_before(self, rank: int) -> int:
        rounds, batches = divmod(rank, self.num_batches)
        slots = rounds * self.num_draws
        for part in self.parts:
            slots += min(batches, part.num_batches) * part.batch_size
            batches -= min(batches, part.num_batches)
        return slots


@dataclass(frozen=True)
class Plan:
    """The clips that every rank trains at every step: `plan.at(step)[i].clips_of(rank)`.

    Buckets and clips are identified by their index, so the order of both must not change during a run.

    Attributes:
        sizes: number of clips in each bucket, may be 0.
        batch_sizes: largest number of clips per rank and micro-step, for each bucket.
        costs: cost of one clip of each bucket, in any unit of time or work. Empty: all ranks train the same bucket.
        tolerance: the most expensive batch of a group costs at most 1 + tolerance times the cheapest.

    Raises:
        ValueError: the values contradict each other or are out of range.
        UserError: all buckets are empty.
    """

    sizes: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    world_size: int
    accumulation: int
    seed: int
    origin: Origin = Origin()
    costs: tuple[float, ...] = ()
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        for name in ("sizes", "batch_sizes"):
            object.__setattr__(self, name, tuple(map(index, getattr(self, name))))
        for name in ("world_size", "accumulation", "seed"):
            object.__setattr__(self, name, index(getattr(self, name)))
        object.__setattr__(self, "costs", tuple(map(float, self.costs)))
        if len(self.batch_sizes) != len(self.sizes):
            raise ValueError(f"batch_sizes: {len(self.batch_sizes)} values for {len(self.sizes)} buckets")
        if self.costs and len(self.costs) != len(self.sizes):
            raise ValueError(f"costs: {len(self.costs)} values for {len(self.sizes)} buckets")
        # These comparisons also reject NaN.
        if not all(0 < cost < float("inf") for cost in self.costs):
            raise ValueError(f"costs {self.costs} must be finite and positive")
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance {self.tolerance} must be finite and not negative")
        if min(self.world_size, self.accumulation) < 1:
            raise ValueError(f"world_size {self.world_size} and accumulation {self.accumulation} must be at least 1")
        if min(self.batch_sizes, default=1) < 1:
            raise ValueError(f"batch_sizes {self.batch_sizes} must be at least 1")
        if min(self.sizes, default=0) < 0:
            raise ValueError(f"sizes {self.sizes} must not be negative")
        if not any(self.sizes):
            raise UserError(
                f"data.buckets: none of the {len(self.sizes)} buckets has a clip. Check the unusable clips listed in "
                "the manifest, and data.buckets."
            )
        self._check_origin()

    def _check_origin(self) -> None:
        if not self.origin.offsets:
            object.__setattr__(self, "origin", replace(self.origin, offsets=(0,) * len(self.sizes)))
        epoch, offsets = self.origin.epoch, self.origin.offsets
        if len(offsets) != len(self.sizes):
            raise ValueError(f"the plan's origin has {len(offsets)} buckets, and the plan has {len(self.sizes)}")
        for bucket, (offset, n) in enumerate(zip(offsets, self.sizes)):
            # Within this epoch, a stream is at most one pass behind the epoch's start and at most at the epoch's end.
            if not max(0, (epoch - 1) * n) <= offset <= (epoch + 1) * n:
                raise ValueError(
                    f"the plan's origin has drawn {offset} clips of bucket {bucket}, which has {n} clips: impossible "
                    f"in epoch {epoch}. The origin belongs to a different set of clips."
                )

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The buckets of each group, ordered by the group's first bucket. An empty bucket is its own group."""
        return self._layout[0]

    @cached_property
    def local_batch_sizes(self) -> tuple[int, ...]:
        """B: clips per rank and micro-step for each bucket. Below `batch_sizes` if the group is too small."""
        return self._layout[1]

    @property
    def steps_per_epoch(self) -> float:
        """Mean number of optimizer steps per epoch."""
        return float(self._rate[0] / self.accumulation)

    def step_of_epoch(self, epoch: int) -> int:
        """The first optimizer step at or after the start of `epoch`. Training up to it trains `epoch` epochs."""
        return self.origin.step + -(-sum(self._turns_before(epoch)) // self.accumulation)

    def epoch_of(self, step: int) -> int:
        """The epoch, counted from 0, in which optimizer step `step` begins."""
        return self._epoch_at(self._micro_step(step))[0]

    def coverage(self, step: int) -> tuple[int, ...]:
        """For each bucket, number of stream positions drawn from step 0 up to optimizer step `step`."""
        micro_step = self._micro_step(step)
        epoch, turns = self._epoch_at(micro_step)
        drawn = list(self.origin.offsets)
        for group, num_turns in zip(self._groups, turns.after(micro_step - turns.first)):
            batches = group.batches_after(group.num_batches_before(num_turns), epoch)
            for bucket, offset, num_batches in zip(group.buckets, group.offsets, batches):
                drawn[bucket] = offset + num_batches * self.local_batch_sizes[bucket]
        return tuple(drawn)

    def at(self, step: int) -> tuple[MicroBatch, ...]:
        """The `accumulation` micro-steps of optimizer step `step`.

        Raises ValueError if the step is before the plan's origin.
        """
        first = self._micro_step(step)
        epoch, turns = self._epoch_at(first)
        before = turns.after(first - turns.first)
        parts: list[tuple[int, tuple[Part, ...]]] = []
        for micro_step in range(first, first + self.accumulation):
            if micro_step >= turns.end:
                epoch, turns = self._epoch_at(micro_step)
            after = turns.after(micro_step + 1 - turns.first)
            number = next(g for g, (old, new) in enumerate(zip(before, after)) if new > old)
            parts.append((epoch, self._groups[number].parts(before[number], epoch)))
            before = after

        batches = [
            MicroBatch(
                epoch=epoch,
                parts=group_parts,
                world_size=self.world_size,
                accumulation=self.accumulation,
                first_slot=0,
                step_slots=0,
                step_draws=sum(part.num_draws for _, group_parts in parts for part in group_parts),
                seed=self.seed,
            )
            for epoch, group_parts in parts
        ]
        first_slots = list(accumulate((batch.num_slots for batch in batches), initial=0))
        return tuple(
            replace(batch, first_slot=first, step_slots=first_slots[-1]) for batch, first in zip(batches, first_slots)
        )

    def resized(
        self,
        step: int,
        world_size: int,
        accumulation: int,
        batch_sizes: Sequence[int] | None = None,
        costs: Sequence[float] | None = None,
        tolerance: float | None = None,
    ) -> "Plan":
        """Return a plan that continues from optimizer step `step` with a new layout. No clip is repeated or lost.

        None keeps the current value. `costs=()` makes every bucket its own group. If nothing changes, this plan itself
        is returned, so resuming with the same layout continues exactly the same run.
        """
        changed = replace(
            self,
            world_size=world_size,
            accumulation=accumulation,
            batch_sizes=self.batch_sizes if batch_sizes is None else tuple(batch_sizes),
            costs=self.costs if costs is None else tuple(costs),
            tolerance=self.tolerance if tolerance is None else tolerance,
        )
        if changed == self:
            return self
        return replace(changed, origin=Origin(step, self.epoch_of(step), self.coverage(step)))

    @cached_property
    def _layout(self) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
        """Groups and batch sizes. A group with fewer batches than ranks gets smaller batches.

        Smaller batches cost less, which may split a group, so this repeats until nothing changes.
        """
        local = [min(batch, max(1, n)) for n, batch in zip(self.sizes, self.batch_sizes)]
        while True:
            groups = self._group_buckets(local)
            short = [
                buckets
                for buckets in groups
                if max(local[b] for b in buckets) > 1
                and max_batches_per_micro_step([self.sizes[b] for b in buckets], [local[b] for b in buckets])
                < self.world_size
            ]
            if not short:
                return groups, tuple(local)
            for buckets in short:
                num_batches = sum(Fraction(self.sizes[b], local[b]) for b in buckets)
                for b in buckets:
                    local[b] = max(1, min(local[b] - 1, int(local[b] * num_batches / self.world_size)))

    def _group_buckets(self, local: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Group buckets greedily, from the most expensive batch down. No other grouping has fewer groups."""
        groups: list[list[int]] = []
        if not self.costs:
            groups = [[bucket] for bucket in range(len(self.sizes))]
        else:
            max_cost = 0.0
            for bucket in sorted(range(len(self.sizes)), key=lambda b: (-self.costs[b] * local[b], b)):
                cost = self.costs[bucket] * local[bucket]
                if not self.sizes[bucket]:
                    groups.insert(0, [bucket])
                elif groups and self.sizes[groups[-1][0]] and max_cost <= cost * (1 + self.tolerance):
                    groups[-1].append(bucket)
                else:
                    max_cost = cost
                    groups.append([bucket])
        return tuple(sorted(tuple(sorted(buckets)) for buckets in groups))

    @cached_property
    def _groups(self) -> tuple["_Group", ...]:
        return tuple(
            _Group(
                buckets=buckets,
                sizes=tuple(self.sizes[b] for b in buckets),
                batch_sizes=tuple(self.local_batch_sizes[b] for b in buckets),
                offsets=tuple(self.origin.offsets[b] for b in buckets),
                origin_epoch=self.origin.epoch,
                world_size=self.world_size,
                seed=self.seed,
            )
            for buckets in self.groups
        )

    @cached_property
    def _rate(self) -> tuple[Fraction, int]:
        """Mean number of micro-steps per epoch, and the largest deviation from it by rounding."""
        slack = sum(
            2
            + len(group.buckets)
            + group.first_micro_steps * (group.first_batches_per_micro_step < group.batches_per_micro_step)
            for group in self._groups
        )
        return sum((group.micro_steps_per_epoch for group in self._groups), Fraction(0)), slack

    def _micro_step(self, step: int) -> int:
        """The first micro-step of an optimizer step, counted from the origin, since accumulation may change there."""
        if step < self.origin.step:
            raise ValueError(f"step {step} is before the plan's first step, {self.origin.step}")
        return (index(step) - self.origin.step) * self.accumulation

    def _turns_before(self, epoch: int) -> list[int]:
        """Number of micro-steps of each group between the origin and the start of `epoch`."""
        return [group.micro_steps_before(epoch) for group in self._groups]

    def _epoch_at(self, micro_step: int) -> tuple[int, "_Turns"]:
        """The epoch of a micro-step, which is the last that begins at or before it, and the epoch's turns."""
        # (e - origin.epoch) * rate micro-steps precede epoch e, up to the lead or lag of the origin (at most an epoch)
        # and rounding. That leaves a few candidates to check.
        rate, slack = self._rate
        fewest, most = ((micro_step + sign * slack) // rate + sign for sign in (-1, 1))
        candidates = range(self.origin.epoch + 1 + max(0, fewest), self.origin.epoch + 2 + most)
        passed = bisect_right(candidates, micro_step, key=lambda e: sum(self._turns_before(e)))
        number = candidates.start + passed - 1
        starts, ends = self._turns_before(number), self._turns_before(number + 1)
        return number, _Turns(starts, ends, "cogds.turns", self.seed, number)


@dataclass(frozen=True)
class _Group:
    """Buckets whose batches may be trained in the same micro-step, as one endless stream of batches from the origin."""

    buckets: tuple[int, ...]
    sizes: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    origin_epoch: int
    world_size: int
    seed: int

    @cached_property
    def batches_per_micro_step(self) -> int:
        """D: number of distinct batches in a micro-step."""
        return min(self.world_size, max_batches_per_micro_step(self.sizes, self.batch_sizes))

    @cached_property
    def first_batches_per_micro_step(self) -> int:
        """D in the plan's first epoch: smaller if some buckets of the group lag and others are ahead.

        Fewer batches than a micro-step takes are left over at the end of the epoch, and none of them may be a batch
        that completes the previous pass.
        """
        num_behind = sum(self._batches_begun(self.origin_epoch))
        if not num_behind:
            return self.batches_per_micro_step
        return min(self.batches_per_micro_step, 1 + sum(self._batches_done(self.origin_epoch + 1)) - num_behind)

    @cached_property
    def first_micro_steps(self) -> int:
        """Number of micro-steps in the plan's first epoch."""
        if not any(self.sizes):
            return 0
        return sum(self._batches_done(self.origin_epoch + 1)) // self.first_batches_per_micro_step

    @property
    def micro_steps_per_epoch(self) -> Fraction:
        """Mean number of micro-steps per epoch."""
        num_batches = sum((Fraction(n, batch) for n, batch in zip(self.sizes, self.batch_sizes)), Fraction(0))
        return num_batches / max(1, self.batches_per_micro_step)

    def micro_steps_before(self, epoch: int) -> int:
        """Number of micro-steps between the origin and the start of `epoch`."""
        if epoch <= self.origin_epoch or not any(self.sizes):
            return 0
        later = sum(self._batches_done(epoch)) - self.first_micro_steps * self.first_batches_per_micro_step
        return self.first_micro_steps + later // self.batches_per_micro_step

    def num_batches_before(self, micro_step: int) -> int:
        """Number of batches before the given micro-step of the group."""
        first = min(micro_step, self.first_micro_steps)
        return first * self.first_batches_per_micro_step + (micro_step - first) * self.batches_per_micro_step

    def batches_after(self, count: int, epoch: int) -> list[int]:
        """Number of batches of each bucket among the group's first `count`, if micro-steps of `epoch` reach `count`.

        Between the boundaries, the buckets take turns in the same order in every pass. So a bucket's share of a
        micro-step never exceeds the bucket.
        """
        if len(self.buckets) == 1:
            return [count]
        boundaries = [self._batches_done(epoch), self._batches_begun(epoch), self._batches_done(epoch + 1)]
        if epoch > self.origin_epoch:
            boundaries.insert(0, self._batches_begun(epoch - 1))
        starts, ends = next(span for span in pairwise(boundaries) if count <= sum(span[1]))
        turns = _Turns(starts, ends, "cogds.ranks", self.seed, self.buckets[0])
        return turns.after(count - turns.first)

    def parts(self, micro_step: int, epoch: int) -> tuple[Part, ...]:
        """The parts of the group's given micro-step, which lies in `epoch`."""
        before, after = (
            self.batches_after(self.num_batches_before(number), epoch) for number in (micro_step, micro_step + 1)
        )
        return tuple(
            Part(bucket, offset + old * batch, new - old, batch, n)
            for bucket, offset, old, new, batch, n in zip(
                self.buckets, self.offsets, before, after, self.batch_sizes, self.sizes
            )
            if new > old
        )

    def _batches_done(self, epoch: int) -> list[int]:
        """Batches of each bucket that end before its pass `epoch` begins: an upper bound at the start of that epoch."""
        if epoch <= self.origin_epoch:
            return [0] * len(self.sizes)
        return [(epoch * n - o) // batch for n, o, batch in zip(self.sizes, self.offsets, self.batch_sizes)]

    def _batches_begun(self, epoch: int) -> list[int]:
        """Batches of each bucket that begin before its pass `epoch`: a lower bound at the start of epoch + 1."""
        return [max(0, -((o - epoch * n) // batch)) for n, o, batch in zip(self.sizes, self.offsets, self.batch_sizes)]


class _Turns:
    """An order of the turns [first, end) in which each member's number of turns rises from `starts` to `ends`."""

    def __init__(self, starts: Sequence[int], ends: Sequence[int], purpose: str, *key: int) -> None:
        self.starts = starts
        self.first, self.end = sum(starts), sum(ends)
        # Huffman tree: merge the two smallest nodes until one is left. Inner nodes are numbered after the leaves.
        heap = [(end - start, leaf) for leaf, (start, end) in enumerate(zip(starts, ends)) if end > start]
        heapify(heap)
        self.root = heap[0][1] if heap else 0
        # (node, left child, right child, turns of the left child, turns of both, phase), with the root first.
        self.nodes: list[tuple[int, int, int, int, int, int]] = []
        for node in range(len(starts), len(starts) + len(heap) - 1):
            (num_left, left), (num_right, right) = heappop(heap), heappop(heap)
            total = num_left + num_right
            phase = keyed_hash(purpose, *key, node) % total
            self.nodes.append((node, left, right, num_left, total, phase))
            self.root = node
            heappush(heap, (total, node))
        self.nodes.reverse()

    def after(self, num_turns: int) -> list[int]:
        """Number of turns of each member after the first `num_turns` of this order, including `starts`."""
        turns = [0] * (len(self.starts) + len(self.nodes))
        turns[self.root] = num_turns
        for node, left, right, num_left, total, phase in self.nodes:
            turns[left] = (turns[node] * num_left + phase) // total
            turns[right] = turns[node] - turns[left]
        return [start + turn for start, turn in zip(self.starts, turns)]

"""Plan: which clips every rank trains on at step N, as arithmetic on integers. No replay, no state.

Clips lie in buckets of one shape. A **micro-step** is one forward and backward on all ranks; `accumulation`
micro-steps make an optimizer step. What one rank trains in a micro-step, B clips of one bucket, is a **batch** here.
Everything follows from four ideas:

**Streams.** Bucket b, of n clips, is an endless row of positions; position k is clip `permute(k % n)` of pass k // n,
reshuffled every pass. The bucket's batch i is positions i * B to (i + 1) * B - 1: a tail is never dropped, the next
pass begins in the same batch.

**Groups.** All ranks of a micro-step train in one group of buckets. Without `costs` every bucket is a group of its own,
so all ranks train the same shape; with them, buckets whose batches cost the same, give or take `tolerance`, are one
group, and ranks train different shapes. The group's batches are an endless row in which its buckets take turns, and
a micro-step takes the next D = min(world_size, what the group can give without a clip twice). Where D < world_size,
the ranks left over train copies, with other noise, and copies share their clip's weight. B is as asked, but smaller
where the group would have fewer batches than there are ranks.

**Epochs.** By the start of epoch e, a group has been through U(e) = sum_b floor((e * n_b - o_b) / B_b) batches, less
those that do not fill a micro-step (o_b: where the bucket's stream stood when the plan began). The batches that end
the pass before come first in the row of each pass, so at every epoch's end each clip has been seen e or e - 1 times,
and e - 1 to e + 1 times within epoch e (counted from 0), for ever: nothing drifts.

**Turns.** Within an epoch a binary tree over the groups says whose turn it is: after t turns at a node of n turns, of
which L belong to the left child, the left has had floor((t * L + phase) / n), and the right the rest. Entry t goes
where the count rises, so both "whose turn" and "how often before" are one walk down the tree. phase, a keyed hash
modulo n, gives every epoch another order. Each node errs by less than 1 from proportional, and a parent's error
reaches a child in proportion; in a Huffman tree the sizes above a leaf grow at least like Fibonacci numbers, so a
group is never `UNEVENNESS` micro-steps or more from its even share, however many groups there are. The buckets of a
group take turns by the same kind of tree.

A changed world size, accumulation, batch size or grouping starts a new plan from where the old one stands
(`Plan.resized`): its `Origin` is a few integers for the checkpoint, and its first epoch is the rest of the current one.
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

# By how much costs of one group may differ: what a rank may wait for another.
TOLERANCE = 0.03


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


def clip_at(position: int, num_clips: int, bucket: int, seed: int) -> int:
    """The clip, in [0, num_clips), at a position of the bucket's stream: a new shuffle every pass."""
    return permute(position % num_clips, num_clips, seed, bucket, position // num_clips)


def max_batches_per_micro_step(sizes: Sequence[int], batch_sizes: Sequence[int]) -> int:
    """Batches that buckets of these sizes can give to one micro-step: one pass, and no clip falls behind.

    A bucket whose batches hold several clips may have one that ends a pass and begins the next, so is whole in
    neither; of several such all but one stay out. For one bucket it is n // B.
    """
    cut = sum(n > 0 and batch > 1 for n, batch in zip(sizes, batch_sizes))
    return sum(n // batch for n, batch in zip(sizes, batch_sizes)) - max(0, cut - 1)


@dataclass(frozen=True, slots=True)
class Part:
    """What one bucket gives to a micro-step: num_batches batches of batch_size stream positions each, from `start`."""

    bucket: int
    start: int
    num_batches: int
    batch_size: int
    num_clips: int

    @property
    def num_draws(self) -> int:
        """Stream positions of the part."""
        return self.num_batches * self.batch_size


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One micro-step: the parts of one group's buckets, one batch a rank.

    The parts' batches belong to the ranks in order; where there are fewer batches than ranks they begin anew. A rank's
    slots are the places of its batch. first_slot and step_slots place them among all slots of the optimizer step, and
    step_draws is the number of stream positions that the step draws.
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
        """D: distinct batches; ranks from there on train copies."""
        return sum(part.num_batches for part in self.parts)

    @property
    def num_draws(self) -> int:
        """Distinct stream positions over all ranks."""
        return sum(part.num_draws for part in self.parts)

    @property
    def num_slots(self) -> int:
        """Clips that all ranks train together, copies included."""
        return self._slots_before(self.world_size)

    def bucket_of(self, rank: int) -> int:
        """The bucket that the rank trains."""
        return self.batch_of(rank)[0].bucket

    def batch_size_of(self, rank: int) -> int:
        """Clips that the rank trains."""
        return self.batch_of(rank)[0].batch_size

    def slots_of(self, rank: int) -> range:
        """The rank's slots, numbered over the whole optimizer step: a subset of range(step_slots)."""
        first = self.first_slot + self._slots_before(rank)
        return range(first, first + self.batch_size_of(rank))

    def positions_of(self, rank: int) -> tuple[int, ...]:
        """Stream positions of the rank's slots; position // num_clips is the pass over the bucket."""
        part, batch = self.batch_of(rank)
        first = part.start + batch * part.batch_size
        return tuple(range(first, first + part.batch_size))

    def clips_of(self, rank: int) -> tuple[int, ...]:
        """The rank's clips: indices within the bucket, one a slot."""
        part, _ = self.batch_of(rank)
        return tuple(clip_at(k, part.num_clips, part.bucket, self.seed) for k in self.positions_of(rank))

    def weights_of(self, rank: int) -> tuple[float, ...]:
        """What to multiply each slot's loss with so that every clip drawn counts the same in the optimizer step.

        Mean over the rank's batch, / accumulation and mean over ranks divide a slot's loss by W * A * B, B being this
        rank's batch size. The mean over the step's distinct draws, of which micro-step j has D_j, divides it by
        copies * sum_j D_j instead. Hence

            weight = W * A * B / (copies * sum_j D_j)

        which is exactly 1.0 wherever no rank trains copies and all have the same batch size.
        """
        part, _ = self.batch_of(rank)
        copies = len(range(rank % self.num_batches, self.world_size, self.num_batches))
        weight = self.world_size * self.accumulation * part.batch_size / (copies * self.step_draws)
        return (weight,) * part.batch_size

    def batch_of(self, rank: int) -> tuple[Part, int]:
        """The part that the rank trains, and which of the part's batches."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a world of {self.world_size}")
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
    """Which clips every rank trains on at every step: `plan.at(step)[i].clips_of(rank)`.

    sizes: clips in each bucket (0 is allowed); batch_sizes: the most clips per rank and micro-step in each. A bucket
    is known by its place in them, a clip by its place in the bucket: both orders must stay what they are.
    costs: of one clip of each bucket, in any unit of time or work; none: all ranks train the same bucket. tolerance:
    the dearest batch of a group costs at most 1 + tolerance times the cheapest.
    Raises ValueError where the numbers make no plan, and UserError where all buckets are empty.
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
            raise ValueError(f"{len(self.sizes)} buckets have {len(self.batch_sizes)} batch sizes: give each its own")
        if self.costs and len(self.costs) != len(self.sizes):
            raise ValueError(f"{len(self.sizes)} buckets have {len(self.costs)} costs: give each its own")
        # Written so that a NaN is refused too.
        if not all(0 < cost < float("inf") for cost in self.costs) or not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"costs {self.costs} must be finite and positive, the tolerance {self.tolerance} too or 0")
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
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The buckets of each group, in order of their first; empty buckets are groups too."""
        return self._layout[0]

    @cached_property
    def local_batch_sizes(self) -> tuple[int, ...]:
        """B: clips per rank and micro-step in each bucket, smaller than asked where the group is too small."""
        return self._layout[1]

    @cached_property
    def cost_spreads(self) -> tuple[float, ...]:
        """Of each group, by how much its dearest batch costs more than its cheapest: 0.02 is 2%. 0 without costs."""
        return tuple(max(costs) / min(costs) - 1 for costs in map(self._batch_costs, self.groups))

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in an epoch, on average."""
        return float(self._rate[0] / self.accumulation)

    def step_of_epoch(self, epoch: int) -> int:
        """The first optimizer step to begin at or after the start of `epoch`: train until there for `epoch` epochs."""
        return self.origin.step + -(-sum(self._turns_before(epoch)) // self.accumulation)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, in which optimizer step `step` begins."""
        return self._epoch_at(self._micro_step(step))[0]

    def coverage(self, step: int) -> tuple[int, ...]:
        """How far each bucket's stream has come before optimizer step `step`: positions drawn since step 0."""
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

        Raises ValueError where the step lies before the plan's origin.
        """
        first = self._micro_step(step)
        epoch, turns = self._epoch_at(first)
        before = turns.after(first - turns.first)
        parts: list[tuple[int, tuple[Part, ...]]] = []
        for micro_step in range(first, first + self.accumulation):
            if micro_step >= turns.end:
                epoch, turns = self._epoch_at(micro_step)
            after = turns.after(micro_step + 1 - turns.first)
            number = next(g for g, (was, now) in enumerate(zip(before, after)) if now > was)
            parts.append((epoch, self._groups[number].parts(before[number], epoch)))
            before = after

        batches = [
            MicroBatch(
                epoch=epoch,
                parts=of_group,
                world_size=self.world_size,
                accumulation=self.accumulation,
                first_slot=0,
                step_slots=0,
                step_draws=sum(part.num_draws for _, of_group in parts for part in of_group),
                seed=self.seed,
            )
            for epoch, of_group in parts
        ]
        firsts = list(accumulate((batch.num_slots for batch in batches), initial=0))
        return tuple(replace(b, first_slot=first, step_slots=firsts[-1]) for b, first in zip(batches, firsts))

    def resized(
        self,
        step: int,
        world_size: int,
        accumulation: int,
        batch_sizes: Sequence[int] | None = None,
        costs: Sequence[float] | None = None,
        tolerance: float | None = None,
    ) -> "Plan":
        """The plan that goes on from optimizer step `step` with another layout: it repeats and loses no clip.

        None keeps what is; `costs=()` gives every bucket its own group. With the same layout it is this very plan, so
        resuming may always ask, and stays bit for bit the same run.
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
        """Groups and batch sizes: a group that has fewer batches than there are ranks gets smaller ones.

        Smaller batches cost less and may part a group, so this goes round until nothing changes.
        """
        local = [min(batch, max(1, n)) for n, batch in zip(self.sizes, self.batch_sizes)]
        while True:
            groups = self._grouped(local)
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

    def _grouped(self, local: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Windows over the batches' costs from the dearest down: no other grouping has fewer."""
        groups: list[list[int]] = []
        if not self.costs:
            groups = [[bucket] for bucket in range(len(self.sizes))]
        else:
            dearest = 0.0
            for bucket in sorted(range(len(self.sizes)), key=lambda b: (-self.costs[b] * local[b], b)):
                cost = self.costs[bucket] * local[bucket]
                if not self.sizes[bucket]:
                    groups.insert(0, [bucket])
                elif groups and self.sizes[groups[-1][0]] and dearest <= cost * (1 + self.tolerance):
                    groups[-1].append(bucket)
                else:
                    dearest = cost
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
        """Micro-steps of an epoch in the mean, and by how much the number made may differ from that, by rounding."""
        slack = sum(
            2 + len(group.buckets) + group.first_micro_steps * (group.first_most < group.most) for group in self._groups
        )
        return sum((group.micro_steps_per_epoch for group in self._groups), Fraction(0)), slack

    def _batch_costs(self, buckets: Sequence[int]) -> list[float]:
        return [(self.costs[b] if self.costs else 1.0) * self.local_batch_sizes[b] for b in buckets]

    def _micro_step(self, step: int) -> int:
        """The first micro-step of an optimizer step, counted from the origin (accumulation was another before it)."""
        if step < self.origin.step:
            raise ValueError(f"step {step} lies before step {self.origin.step}, where this plan begins")
        return (index(step) - self.origin.step) * self.accumulation

    def _turns_before(self, epoch: int) -> list[int]:
        """Micro-steps of each group between the origin and the start of `epoch`."""
        return [group.micro_steps_before(epoch) for group in self._groups]

    def _epoch_at(self, micro_step: int) -> tuple[int, "_Turns"]:
        """The epoch that holds a micro-step, the last one that begins at or before it; and its order of groups."""
        # By then (e - origin.epoch) * rate micro-steps have been made, give or take what the origin was behind or ahead
        # (at most an epoch) and what rounding adds: a few candidates are left to ask.
        rate, slack = self._rate
        fewest, most = ((micro_step + sign * slack) // rate + sign for sign in (-1, 1))
        candidates = range(self.origin.epoch + 1 + max(0, fewest), self.origin.epoch + 2 + most)
        passed = bisect_right(candidates, micro_step, key=lambda e: sum(self._turns_before(e)))
        number = candidates.start + passed - 1
        starts, ends = self._turns_before(number), self._turns_before(number + 1)
        return number, _Turns(starts, ends, "cogds.turns", self.seed, number)


@dataclass(frozen=True)
class _Group:
    """Buckets whose batches may be trained at the same moment, as one endless row of batches since the plan began."""

    buckets: tuple[int, ...]
    sizes: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    origin_epoch: int
    world_size: int
    seed: int

    @cached_property
    def most(self) -> int:
        """D: batches of one micro-step."""
        return min(self.world_size, max_batches_per_micro_step(self.sizes, self.batch_sizes))

    @cached_property
    def first_most(self) -> int:
        """D in the first epoch, smaller where buckets that lag and buckets that are ahead meet in a group.

        No more than one micro-step's batches are left over at the epoch's end, and none of them may be a batch that
        ends the pass before.
        """
        behind = sum(self._ending(self.origin_epoch))
        return min(self.most, 1 + sum(self._whole(self.origin_epoch + 1)) - behind) if behind else self.most

    @cached_property
    def first_micro_steps(self) -> int:
        """Micro-steps of the first epoch."""
        return sum(self._whole(self.origin_epoch + 1)) // self.first_most if any(self.sizes) else 0

    @property
    def micro_steps_per_epoch(self) -> Fraction:
        """On average."""
        num_batches = sum((Fraction(n, batch) for n, batch in zip(self.sizes, self.batch_sizes)), Fraction(0))
        return num_batches / max(1, self.most)

    def micro_steps_before(self, epoch: int) -> int:
        """Between the origin and the start of `epoch`."""
        if epoch <= self.origin_epoch or not any(self.sizes):
            return 0
        later = sum(self._whole(epoch)) - self.first_micro_steps * self.first_most
        return self.first_micro_steps + later // self.most

    def num_batches_before(self, micro_step: int) -> int:
        """Batches of the row before the group's micro-step of that number."""
        first = min(micro_step, self.first_micro_steps)
        return first * self.first_most + (micro_step - first) * self.most

    def batches_after(self, count: int, epoch: int) -> list[int]:
        """Of each bucket, among the first `count` batches of the row, which micro-steps of `epoch` have reached.

        Between the boundaries the buckets take turns, in the same order in every pass: so a bucket's share of a
        micro-step never exceeds the bucket.
        """
        if len(self.buckets) == 1:
            return [count]
        boundaries = [self._whole(epoch), self._ending(epoch), self._whole(epoch + 1)]
        if epoch > self.origin_epoch:
            boundaries.insert(0, self._ending(epoch - 1))
        starts, ends = next(span for span in pairwise(boundaries) if count <= sum(span[1]))
        turns = _Turns(starts, ends, "cogds.ranks", self.seed, self.buckets[0])
        return turns.after(count - turns.first)

    def parts(self, micro_step: int, epoch: int) -> tuple[Part, ...]:
        """What each bucket gives to the group's micro-step of that number, which lies in `epoch`."""
        before, after = (
            self.batches_after(self.num_batches_before(number), epoch) for number in (micro_step, micro_step + 1)
        )
        return tuple(
            Part(bucket, offset + was * batch, now - was, batch, n)
            for bucket, offset, was, now, batch, n in zip(
                self.buckets, self.offsets, before, after, self.batch_sizes, self.sizes
            )
            if now > was
        )

    def _whole(self, epoch: int) -> list[int]:
        """Batches of each bucket that end before its pass `epoch` begins: the most by the start of that epoch."""
        if epoch <= self.origin_epoch:
            return [0] * len(self.sizes)
        return [(epoch * n - o) // batch for n, o, batch in zip(self.sizes, self.offsets, self.batch_sizes)]

    def _ending(self, epoch: int) -> list[int]:
        """Batches of each bucket that begin before its pass `epoch`: the fewest by the start of the epoch after."""
        return [max(0, -((o - epoch * n) // batch)) for n, o, batch in zip(self.sizes, self.offsets, self.batch_sizes)]


class _Turns:
    """An order of turns [first, end) that starts where each taker has had `starts` and ends where it has `ends`."""

    def __init__(self, starts: Sequence[int], ends: Sequence[int], purpose: str, *key: int) -> None:
        self.starts = starts
        self.first, self.end = sum(starts), sum(ends)
        # Huffman: the two smallest join until one is left. Nodes follow the leaves in number, the root comes last.
        heap = [(end - start, leaf) for leaf, (start, end) in enumerate(zip(starts, ends)) if end > start]
        heapify(heap)
        self.root = heap[0][1] if heap else 0
        # (node, left child, right child, turns of the left, turns of both, phase), the root first.
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
        """What each taker has had after the first `num_turns` of this order, `starts` included."""
        turns = [0] * (len(self.starts) + len(self.nodes))
        turns[self.root] = num_turns
        for node, left, right, num_left, total, phase in self.nodes:
            turns[left] = (turns[node] * num_left + phase) // total
            turns[right] = turns[node] - turns[left]
        return [start + turn for start, turn in zip(self.starts, turns)]

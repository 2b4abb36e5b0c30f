"""Which clip and which of its captions a draw trains."""

from collections import Counter, defaultdict

import pytest

from cogds.core.mixture import Mixture
from cogds.core.plan import Plan
from cogds.data.cache.store import Cache, DamagedEntryError
from cogds.data.loading.dataset import BadClip, Choice, ClipDataset, ClipOrder
from cogds.data.loading.index import write_index
from cogds.data.loading.sampler import Draw, draws_of
from cogds.errors import UserError
from tests.data.loading.indexes import BUCKETS, PLACES, captions_of, rows

SIZES = ((5, 6), (0, 0), (9, 0))


@pytest.fixture
def make_order(tmp_path):
    """`make_order(repeats)`: the order of 20 clips with one to three captions."""
    index = write_index(tmp_path, [rows(20)], BUCKETS, SIZES, PLACES)
    return lambda repeats=(1.0, 1.0): ClipOrder(index, Mixture(SIZES, repeats, 3))


def trained(order, plan, steps):
    """The draws of these steps over all ranks, with their choices. Copies are counted once."""
    return {
        draw[:2]: next(order.choices(draw))
        for step in steps
        for micro_batch in plan.at(step)
        for rank in range(plan.world_size)
        for draw in draws_of(micro_batch, rank)
    }


@pytest.mark.parametrize("repeats", [(1.0, 1.0), (2.0, 0.5)])
def test_each_caption_of_a_clip_is_trained_equally_often(make_order, repeats):
    order, counts = make_order(repeats), defaultdict(Counter)
    for bucket, size in enumerate(order.mixture.virtual_sizes):
        for position in range(12 * size):
            row, caption = next(order.choices(Draw(bucket, position, 1)))
            counts[row][caption] += 1
    assert len(counts) == 20
    for row, captions in counts.items():
        assert len(captions) == len(captions_of(row))
        assert set(captions.values()) == {captions.total() // len(captions)}


def test_the_captions_do_not_depend_on_the_ranks_and_continue_after_a_change(make_order):
    order = make_order()
    plan = Plan(order.mixture.virtual_sizes, (1, 1, 1), 1, 4, 3)
    whole = trained(order, plan, range(40))
    assert trained(make_order(), plan, range(20, 40)).items() <= whole.items()  # resumed
    for world_size, accumulation in ((2, 2), (4, 1)):
        resized = trained(order, plan.resized(20, world_size, accumulation), range(20, 40))
        assert resized.items() <= whole.items()
        assert len(resized) == len(whole) - len(trained(order, plan, range(20)))


def load_unless(bad):
    """A loader that refuses rows, and choices of bad captions."""

    def load(choice):
        if choice.row in bad:
            return BadClip(choice.row, "", "damaged")
        if choice in bad:
            return BadClip(choice.row, "", "damaged", choice.caption)
        return "loaded"

    return load


def test_a_bad_clip_is_skipped_with_all_captions_and_a_bad_caption_alone(make_order):
    order, draw = make_order(), Draw(2, 4, 1)
    first, second, third = (list(order.choices(draw))[k] for k in range(3))
    known = set()
    loaded, bad, choice = order.first_good(draw, known, load_unless({first.row, second}))
    assert (loaded, [clip.row for clip in bad], choice) == ("loaded", [first.row, second.row], third)
    assert known == {first.row, second}
    assert order.first_good(draw, known, load_unless(set())) == ("loaded", (), third)
    assert len(captions_of(second.row)) > 1
    later = (Draw(2, position, 1) for position in range(9, 90))
    choices = [order.first_good(draw, known, load_unless({first.row, second}))[2] for draw in later]
    assert first.row not in {choice.row for choice in choices}
    others = [Choice(second.row, k) for k in range(len(captions_of(second.row))) if k != second.caption]
    assert {choice for choice in choices if choice.row == second.row} == set(others)


def test_a_substitute_has_a_caption_of_its_own(make_order):
    order = make_order()
    for position in range(30):
        draw = Draw(0, position, 2)
        bad = {next(order.choices(draw)).row}
        _, _, (row, caption) = order.first_good(draw, set(), load_unless(bad))
        assert row not in bad
        assert caption < len(captions_of(row))


def test_a_bucket_without_a_readable_clip_is_an_error(make_order):
    with pytest.raises(UserError, match=r"^bucket 1x64x64: "):
        make_order().first_good(Draw(2, 0, 1), set(), load_unless(set(range(20))))


def test_the_drawn_caption_is_read(make_order, tmp_path):
    dataset, read, damaged = ClipDataset(make_order(), Cache(tmp_path)), [], set()

    def read_entry(kind, key, place):
        if kind in damaged:
            raise DamagedEntryError("its checksum is wrong")
        read.append((kind, key))
        return {kind: place}

    dataset.cache.read = read_entry
    row = next(row for row in range(20) if len(captions_of(row)) == 3)
    clip = dataset.order.index[row]
    assert [dataset._load(Choice(row, k)) for k in range(3)] == [
        {"clips": clip.clip_place, "captions": caption.place} for caption in clip.captions
    ]
    assert read == [pair for text in clip.captions for pair in (("clips", clip.clip_key), ("captions", text.key))]
    for kind, caption in (("captions", 2), ("clips", None)):
        damaged.add(kind)
        assert dataset._load(Choice(row, 2)) == BadClip(row, clip.path, "its checksum is wrong", caption)

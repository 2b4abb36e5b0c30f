"""Batches made on the fly: the same as from the cache, ahead of time, with stand-ins for what cannot be read."""

import threading
import time

import pytest
import torch

from cogds.data.cache.store import Cache
from cogds.data.loading.dataset import ClipDataset, ClipOrder, collate, read_encoded
from cogds.data.loading.sampler import BucketBatchSampler
from cogds.data.video.drawn import draw_clips
from cogds.distributed.world import World
from cogds.encode.encoder import encode_dataset
from cogds.encode.on_the_fly import ahead
from cogds.train.batches import Run, load_batches
from cogds.train.tuning import Execution
from tests.jobs import make_job

ALONE = World(0, 1, 0, 1)


@pytest.fixture
def start(tiny_model, tmp_path):
    """`start(*overrides)`: a function that gives the batches of six steps, the plan's order, and its first draws."""
    draw_clips(tmp_path / "clips")

    def run(*overrides):
        job = make_job(
            f"model.path={tiny_model}", f"data.path={tmp_path / 'clips'}", f"data.cache_dir={tmp_path / 'cache'}",
            "data.buckets=[9x64x96, 9x96x64, 1x64x64]", "data.num_workers=1", "train.precision=fp32",
            "train.num_steps=6", "train.batch_size=2", *overrides,
        )  # fmt: skip
        data = encode_dataset(job)
        plan = job.plan(data.mixture)
        order = ClipOrder(data.index, data.mixture)
        draws = list(BucketBatchSampler(plan, 0, 0, 20))
        made = Run(job, data, plan, Execution("torch", False, ()), first_step=0)
        return lambda: list(load_batches(made)), order, draws

    return run


@pytest.mark.slow
def test_batches_are_those_of_the_cache(start):
    streamed, cached = (start(f"data.encode={mode}")[0]() for mode in ("on_the_fly", "cached"))
    assert len(streamed) == len(cached) == 6
    for ours, theirs in zip(streamed, cached):
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)
        assert ours.bad == theirs.bad == ()


@pytest.mark.slow
def test_a_file_that_goes_is_replaced_by_the_next_of_its_bucket(start, tmp_path):
    batches, order, draws = start("data.encode=on_the_fly", "train.batch_size=1")
    rows = [next(order.rows(draw)) for (draw,) in draws[:6]]
    bad = next(row for row in rows if sum(order.index.sizes[order.index.bucket_of(row)]) > 1)
    lost = order.index[bad]
    (tmp_path / "clips" / lost.path.rpartition("/")[2]).unlink()
    made = batches()
    assert len(made) == 6
    found = [one for batch in made for one in batch.bad]
    assert {(one.row, one.path) for one in found} == {(bad, lost.path)}
    # It is named once, and replaced by the same clips in a resumed run.
    assert len(found) == 1
    again = batches()
    assert all(torch.equal(one.tensors["moments"], two.tensors["moments"]) for one, two in zip(made, again))


@pytest.mark.slow
def test_a_damaged_entry_is_replaced_too(start, tmp_path):
    batches, order, draws = start("train.batch_size=1")
    shard = next((tmp_path / "cache/clips").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1  # in the data of the last entry
    shard.write_bytes(data)
    dataset = ClipDataset(order, tmp_path / "cache")
    items = [dataset[draw] for (draw,) in draws]
    bad = [one for item in items for one in item.bad]
    assert len(bad) == 1
    assert "--verify" in bad[0].reason
    # Each says which row it is of, which the plan alone does not know where one stands in for another.
    cache = Cache(tmp_path / "cache")
    for item in items:
        own = read_encoded(cache, order.index[item.row])
        assert all(torch.equal(tensor, own[name]) for name, tensor in item.tensors.items())
    planned = [next(order.rows(draw)) for (draw,) in draws]
    assert [one.row for one in items] != planned
    assert collate(items[:1]).rows == (items[0].row,)
    assert len(batches()) == 6


def test_items_are_made_ahead_but_not_too_far():
    made = []

    def items():
        for number in range(10):
            made.append(number)
            yield number

    taken = ahead(items(), 2)
    assert next(taken) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert made == [0, 1, 2, 3]  # one taken, two waiting, one in hand
    assert list(taken) == list(range(1, 10))


def test_an_error_comes_out_where_it_is_waited_for():
    def items():
        yield 1
        raise ValueError("no more")

    taken = ahead(items(), 2)
    assert next(taken) == 1
    with pytest.raises(ValueError, match="no more"):
        next(taken)


def test_the_thread_ends_with_its_reader():
    before, closed = threading.active_count(), []

    def items():
        try:
            yield from range(1000)
        finally:
            closed.append(True)

    taken = ahead(items(), 2)
    next(taken)
    taken.close()
    assert closed == [True]
    assert threading.active_count() == before

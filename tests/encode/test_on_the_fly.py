"""Batches encoded on the fly: equal to those of the cache, made ahead, with substitutes for bad clips."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from cogds.data.cache.store import Cache
from cogds.data.loading.dataset import ClipDataset, collate, read_encoded
from cogds.data.loading.sampler import BucketBatchSampler
from cogds.encode import on_the_fly
from cogds.encode.encoder import encode_dataset
from cogds.encode.on_the_fly import ahead, load_on_the_fly_models
from cogds.train.batches import Run, load_batches
from cogds.train.tuning import Execution
from tests.drawn import draw_clips
from tests.jobs import make_job


@pytest.fixture
def make_run(tiny_model, tmp_path):
    """`make_run(*overrides)`: a run of six steps."""
    draw_clips(tmp_path / "clips")

    def make(*overrides):
        job = make_job(
            f"model.path={tiny_model}", f"data.path={tmp_path / 'clips'}", f"data.cache_dir={tmp_path / 'cache'}",
            "data.buckets=[9x64x96, 9x96x64, 1x64x64]", "data.num_workers=1", "train.precision=fp32",
            "train.num_steps=6", "train.batch_size=2", *overrides,
        )  # fmt: skip
        data = encode_dataset(job)
        return Run(job, data, job.plan(data.mixture), Execution("torch", False, ()), first_step=0)

    return make


def batches_of(run):
    return list(load_batches(run, load_on_the_fly_models(run.job)))


def planned_draws(run, num_steps):
    """The draws of the first steps, with one clip per batch."""
    return [draw for (draw,) in BucketBatchSampler(run.plan, 0, 0, num_steps)]


@pytest.mark.slow
def test_batches_equal_those_of_the_cache(make_run):
    streamed, cached = (
        batches_of(make_run(f"data.encode={mode}", "data.mirror=true")) for mode in ("on_the_fly", "cached")
    )
    assert len(streamed) == len(cached) == 6
    for ours, theirs in zip(streamed, cached):
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)
        assert ours.bad == theirs.bad == ()


@pytest.mark.slow
def test_the_captions_are_those_of_the_cache(make_run, tmp_path):
    """Three captions per clip. Every clip is trained with all of them in three epochs."""
    rows = [
        {"path": f"clips/{name}", "captions": [f"{start} {name}" for start in "abc"]}
        for name in ("clip_0.mp4", "clip_1.mp4", "image_0.png")
    ]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"data.path={tmp_path / 'l.jsonl'}", "train.batch_size=1", "train.num_steps=9"
    streamed, cached = (batches_of(make_run(*data, f"data.encode={mode}")) for mode in ("on_the_fly", "cached"))
    for ours, theirs in zip(streamed, cached, strict=True):
        assert ours.choices == theirs.choices
        assert torch.equal(ours.tensors["text_states"], theirs.tensors["text_states"])
    assert len({choice for batch in streamed for choice in batch.choices}) == 9


@pytest.mark.slow
def test_nothing_is_loaded_when_the_first_batch_is_made(make_run, monkeypatch):
    """The memory check comes before that."""
    run = make_run("data.encode=on_the_fly", "train.num_steps=1")
    models = load_on_the_fly_models(run.job)
    for name in ("load_vae", "TextEncoder"):
        monkeypatch.delattr(on_the_fly, name)
    assert len(list(load_batches(run, models))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("tiling", ["on", "off"])
def test_tiles_are_those_of_the_job(make_run, monkeypatch, tiling):
    calls = []
    encode = on_the_fly.encode_pixels
    monkeypatch.setattr(on_the_fly, "encode_pixels", lambda *args: calls.append(args[2]) or encode(*args))
    batches_of(make_run("data.encode=on_the_fly", "train.num_steps=1", f"data.vae_tiling={tiling}"))
    assert calls == [tiling == "on"] * 2


@pytest.mark.slow
def test_a_missing_file_is_reported_once_and_replaced_by_the_next_of_its_bucket(make_run):
    run = make_run("data.encode=on_the_fly", "train.batch_size=1")
    index = run.order.index
    rows = [next(run.order.choices(draw)).row for draw in planned_draws(run, 6)]
    bad = next(row for row in rows if sum(index.sizes[index.bucket_of(row)]) > 1)
    path = Path(index[bad].path)
    path.unlink()
    batches = batches_of(run)
    assert len(batches) == 6
    assert [(clip.row, clip.path) for batch in batches for clip in batch.bad] == [(bad, str(path))]
    again = batches_of(run)
    for first, second in zip(batches, again):
        assert torch.equal(first.tensors["moments"], second.tensors["moments"])


@pytest.mark.slow
def test_a_damaged_entry_is_replaced(make_run, tmp_path):
    run = make_run("train.batch_size=1")
    draws = planned_draws(run, 20)
    shard = next((tmp_path / "cache/clips").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1  # in the data of the last entry
    shard.write_bytes(data)
    dataset = ClipDataset(run.order, Cache(tmp_path / "cache"))
    items = [dataset[draw] for draw in draws]
    (bad,) = (clip for item in items for clip in item.bad)
    assert "--verify" in bad.reason
    # An item's choice is that of its tensors, which differs from the planned one for a substitute.
    cache = Cache(tmp_path / "cache")
    for item in items:
        encoded = read_encoded(cache, run.order.index[item.choice.row])
        assert all(torch.equal(tensor, encoded[name]) for name, tensor in item.tensors.items())
    assert [item.choice for item in items] != [next(run.order.choices(draw)) for draw in draws]
    assert collate(items[:1]).choices == (items[0].choice,)
    assert len(list(load_batches(run))) == 6


def test_items_are_made_ahead_up_to_the_bound():
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
    assert made == [0, 1, 2, 3]  # one taken, two in the queue, one that waits for a place in it
    assert list(taken) == list(range(1, 10))


def test_an_error_is_raised_to_the_reader_in_its_turn():
    def items():
        yield 1
        raise ValueError("no more")

    taken = ahead(items(), 2)
    assert next(taken) == 1
    with pytest.raises(ValueError, match="no more"):
        next(taken)


def test_closing_the_iterator_ends_the_thread_and_closes_the_items():
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

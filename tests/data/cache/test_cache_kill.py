"""Writers that are killed at any moment lose at most one shard, and pruning removes the files they leave."""

import os
import random
import signal
import time

import pytest
import torch

from cogds.data.cache import shard as shard_module
from cogds.data.cache import store as store_module
from cogds.data.cache.keys import cache_key
from cogds.data.cache.maintenance import prune, stats, verify
from cogds.data.cache.shard import SHARD_FILE
from cogds.data.cache.store import Cache, key_array

NUM_ENTRIES, NUM_KILLS = 400, 20
ENTRIES_PER_SHARD = 5
SHARD_BYTES = 200_000 * ENTRIES_PER_SHARD
KEYS = [cache_key({"number": number}) for number in range(NUM_ENTRIES)]


def entry(number):
    return {"x": torch.full((100_000,), number, dtype=torch.int16)}


def start(root, numbers):
    """Fork a writer of these entries. Returns its process id and a pipe with the numbers of the entries written."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    status = 1
    try:
        os.close(reading)
        signal.alarm(60)
        with Cache(root).writer("clips", shard_bytes=SHARD_BYTES) as writer:
            for number in numbers:
                writer.write(KEYS[number], entry(number))
                os.write(writing, b"%04d" % number)
        status = 0
    finally:
        os._exit(status)


def read_numbers(pipe):
    with os.fdopen(pipe, "rb") as file:
        written = file.read()
    return [int(written[at : at + 4]) for at in range(0, len(written), 4)]


def missing(root):
    places = Cache(root).snapshot("clips").find(key_array(KEYS))
    return [number for number in range(NUM_ENTRIES) if places[number] < 0]


@pytest.mark.slow
@pytest.mark.parametrize("num_writers", [1, 2])
def test_a_kill_loses_at_most_one_shard(tmp_path, num_writers):
    generator = random.Random(num_writers)
    exits = []

    def run(lifetime_s):
        numbers = missing(tmp_path)
        writers = [start(tmp_path, numbers[rank::num_writers]) for rank in range(num_writers)]
        if lifetime_s is not None:
            time.sleep(lifetime_s)
            for process, _ in writers:
                os.kill(process, signal.SIGKILL)
        for process, pipe in writers:
            exits.append(os.waitpid(process, 0)[1])
            lost = set(read_numbers(pipe)) & set(missing(tmp_path))
            assert len(lost) <= ENTRIES_PER_SHARD

    for _ in range(NUM_KILLS):
        run(generator.uniform(0.002, 0.06))
    num_killed = sum(os.WIFSIGNALED(status) for status in exits)
    run(None)
    # Only the last run must complete.
    assert exits[-num_writers:] == [0] * num_writers
    assert num_killed >= NUM_KILLS // 2
    assert missing(tmp_path) == []
    report = verify(tmp_path)
    assert (report.num_entries, report.damaged) == (NUM_ENTRIES, ())
    cache = Cache(tmp_path)
    snapshot = cache.snapshot("clips")
    for number in range(NUM_ENTRIES):
        assert torch.equal(cache.read("clips", KEYS[number], snapshot.place(KEYS[number]))["x"], entry(number)["x"])
    prune(tmp_path)
    assert all(SHARD_FILE.fullmatch(name) for name in os.listdir(tmp_path / "clips"))
    assert os.listdir(tmp_path) == ["clips"]


@pytest.mark.slow
@pytest.mark.parametrize("owner, name", [(shard_module, "save_file"), (os, "fsync"), (os, "replace"), (os, "unlink")])
@pytest.mark.parametrize("is_after", [False, True])
def test_a_kill_at_each_step_of_writing_and_pruning(tmp_path, owner, name, is_after, monkeypatch):
    """The process is killed before or after the n-th call of a function, for each n."""
    original = getattr(owner, name)
    monkeypatch.setattr(store_module, "SHARD_ENTRIES", 2)
    for kill_at in range(1, 6):
        calls = []

        def stop(*args, calls=calls, kill_at=kill_at, **options):
            calls.append(1)
            if len(calls) == kill_at and not is_after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **options)
            if len(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        root = tmp_path / f"{kill_at}"
        process = os.fork()
        if not process:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, stop)
                with Cache(root).writer("clips") as writer:
                    for number in range(7):
                        writer.write(KEYS[number], entry(number))
                prune(root)
            os._exit(0)
        os.waitpid(process, 0)
        lost = set(missing(root)) & set(range(7))
        assert lost <= set(range(2 * (kill_at - 1), 7)) if name != "unlink" else not lost
        with Cache(root).writer("clips") as writer:
            for number in lost:
                writer.write(KEYS[number], entry(number))
        prune(root)
        assert all(SHARD_FILE.fullmatch(name) for name in os.listdir(root / "clips"))
        assert verify(root).num_entries == 7
        assert stats(root)["clips"]["duplicates"] == 0

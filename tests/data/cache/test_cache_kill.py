"""Writers killed at any moment: nothing that was written is lost, and nothing is left behind in the end."""

import os
import random
import signal
import time

import pytest
import torch

from cogds.data.cache import staging as staging_module
from cogds.data.cache.keys import digest
from cogds.data.cache.maintenance import stats, verify
from cogds.data.cache.shard import SHARD_FILE
from cogds.data.cache.store import Cache, key_array

NUM_ENTRIES, NUM_KILLS = 400, 20
SHARD_BYTES = 1_000_000  # five entries: a kill falls into packing about as often as into writing
KEYS = [digest({"number": number}) for number in range(NUM_ENTRIES)]


def entry(number):
    return {"x": torch.full((100_000,), number, dtype=torch.int16)}


def start(root, numbers):
    """A forked writer of these entries: (process, pipe). It says `s` before and `d` after each entry's write."""
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
                os.write(writing, b"s%04d" % number)
                writer.write(KEYS[number], entry(number))
                os.write(writing, b"d%04d" % number)
        status = 0
    finally:
        os._exit(status)


def read_all(pipe):
    """What a writer that has ended said: numbers of the entries it started, and of those it finished."""
    with os.fdopen(pipe, "rb") as file:
        said = file.read()
    words = [said[at : at + 5] for at in range(0, len(said), 5)]
    return [int(word[1:]) for word in words if word[:1] == b"s"], [int(word[1:]) for word in words if word[:1] == b"d"]


def missing(root):
    found = Cache(root).snapshot("clips").find(key_array(KEYS))
    return [number for number in range(NUM_ENTRIES) if found[number] < 0]


@pytest.mark.slow
@pytest.mark.parametrize("num_writers", [1, 2])
def test_a_kill_costs_at_most_the_entry_in_flight(tmp_path, num_writers):
    generator = random.Random(num_writers)
    started, finished, exits = [], set(), []

    def run(may_live_s):
        todo = missing(tmp_path)
        writers = [start(tmp_path, todo[rank::num_writers]) for rank in range(num_writers)]
        if may_live_s is not None:
            time.sleep(may_live_s)
            for process, _ in writers:
                os.kill(process, signal.SIGKILL)
        for process, pipe in writers:
            exits.append(os.waitpid(process, 0)[1])
            begun, done = read_all(pipe)
            started.extend(begun)
            finished.update(done)
        assert not finished & set(missing(tmp_path))

    for _ in range(NUM_KILLS):
        run(generator.uniform(0.002, 0.06))
    left = stats(tmp_path)["clips"]
    num_killed = sum(os.WIFSIGNALED(status) for status in exits)
    run(None)
    # The last run ended by itself; most of those before it did not.
    assert exits[-num_writers:] == [0] * num_writers
    assert num_killed >= NUM_KILLS // 2, (num_killed, left)
    assert missing(tmp_path) == []
    assert len(started) <= NUM_ENTRIES + num_killed
    report = verify(tmp_path)
    assert (report.num_entries, report.damaged) == (NUM_ENTRIES, ())
    cache = Cache(tmp_path)
    snapshot = cache.snapshot("clips")
    for number in range(NUM_ENTRIES):
        assert torch.equal(cache.read("clips", KEYS[number], snapshot.place(KEYS[number]))["x"], entry(number)["x"])
    assert all(SHARD_FILE.fullmatch(name) for name in os.listdir(tmp_path / "clips"))
    assert os.listdir(tmp_path) == ["clips"]


@pytest.mark.slow
@pytest.mark.parametrize("call", ["Staging.save", "Staging.clear", "os.rename", "os.fsync", "os.unlink", "_take_lock"])
def test_a_kill_at_each_step_of_packing(tmp_path, call, monkeypatch):
    """The n-th call of what packing is made of, for each n, never returns: the process is gone before or after it."""
    owner = staging_module
    for part in call.split(".")[:-1]:
        owner = getattr(owner, part)
    name = call.rsplit(".", 1)[-1]
    original = getattr(owner, name)
    for place in range(1, 8):
        for is_after in (False, True):
            calls = []

            def stop(*args, calls=calls, place=place, is_after=is_after, **options):
                calls.append(1)
                if len(calls) == place and not is_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = original(*args, **options)
                if len(calls) == place:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            root = tmp_path / f"{place}-{is_after}"
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, stop)
                process, pipe = start(root, range(7))
                os.waitpid(process, 0)
            _, finished = read_all(pipe)
            assert not set(finished) & set(missing(root))
            with Cache(root).writer("clips") as writer:
                for number in set(missing(root)) & set(range(7)):
                    writer.write(KEYS[number], entry(number))
            assert all(SHARD_FILE.fullmatch(name) for name in os.listdir(root / "clips"))
            assert verify(root).num_entries == 7
            assert stats(root)["clips"]["duplicates"] == 0

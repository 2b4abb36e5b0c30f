"""Every rank calls the transformer equally often, whatever becomes of its own video."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import cogds.videos.lockstep
from cogds.distributed.world import World
from cogds.videos.lockstep import Lockstep, Stopped


def engine(fails_at=None):
    """One that counts its calls, and fails at one of them."""
    calls = []

    def module(**inputs):
        calls.append(inputs)
        if len(calls) == fails_at:
            raise RuntimeError("out of memory")
        return (inputs["x"],)

    module.config = SimpleNamespace(patch_size_t=2)
    return SimpleNamespace(
        module=module, calls=calls, torch_autocast_dtype=lambda: torch.bfloat16, torch_autocast_enabled=lambda: False
    )


ALONE = World(0, 1, 0, 1)


def test_calls_that_are_left_are_made_with_the_idle_inputs():
    one = engine()
    lockstep = Lockstep(one, ALONE, 5, {"x": 0})
    assert lockstep(x=1) == (1,)
    lockstep(x=2)
    lockstep.finish(failed=True)
    assert [call["x"] for call in one.calls] == [1, 2, 0, 0, 0]
    with pytest.raises(RuntimeError, match="more than 5 calls"):
        lockstep(x=6)


def test_without_need_of_the_others_nothing_is_computed_for_nobody(monkeypatch):
    votes = []
    monkeypatch.setattr(cogds.videos.lockstep, "any_rank", lambda _world, *flags: votes.append(flags) or flags)
    one = engine(fails_at=2)
    lockstep = Lockstep(one, World(0, 2, 0, 2), 4)
    lockstep(x=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        lockstep(x=2)
    assert lockstep.in_forward
    assert not lockstep.needs_all
    lockstep.finish(failed=True)
    assert len(one.calls) == 2
    assert len(votes) == 4  # as many as the rank that had no trouble


@pytest.mark.parametrize("idle", [None, {"x": 0}])
def test_all_stop_before_the_same_call(idle):
    asked = iter([False, False, True])
    one, begun = engine(), []
    lockstep = Lockstep(one, ALONE, 9, idle, begun.append, lambda: next(asked))
    lockstep(x=1)
    lockstep(x=1)
    with pytest.raises(Stopped):
        lockstep(x=1)
    assert len(one.calls) == 2
    assert begun == [0, 1, 2]


def test_a_rank_that_shares_the_video_gives_up_with_the_one_that_failed(monkeypatch):
    """Ranks 0 and 1 share one, 2 and 3 another. Rank 1 fails after two calls."""
    failed = []
    world = [World(rank, 4, rank, 4, sequence_size=2) for rank in range(4)]

    def vote(_world, stop, *lost):
        failed.append(lost)
        return stop, *map(any, zip(*failed, lost))

    monkeypatch.setattr(cogds.videos.lockstep, "any_rank", vote)
    engines = [engine() for _ in world]
    ranks = [Lockstep(one, place, 5, {"x": 0}) for one, place in zip(engines, world)]
    for _ in range(2):
        for rank in ranks:
            rank(x=1)
    ranks[1].finish(failed=True)
    for number in (0, 2, 3):
        with contextlib.suppress(RuntimeError):
            while True:
                ranks[number](x=1)
        ranks[number].finish(failed=number == 0)
    assert [[call["x"] for call in one.calls] for one in engines] == [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 1]] * 2
    assert all(rank.needs_all for rank in ranks)

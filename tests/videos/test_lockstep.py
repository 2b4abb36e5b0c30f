"""Every rank calls the transformer equally often, even if its own video fails."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import cogds.videos.lockstep
from cogds.distributed.world import World
from cogds.videos.lockstep import LockstepTransformer, Stopped
from tests.jobs import ALONE


def make_engine(fails_at=None):
    """An engine that records its calls. fails_at: the call that raises."""
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


def test_remaining_calls_are_made_with_the_idle_inputs():
    engine = make_engine()
    transformer = LockstepTransformer(engine, ALONE, 5, idle_inputs={"x": 0})
    assert transformer(x=1) == (1,)
    transformer(x=2)
    transformer.finish(has_failed=True)
    assert [call["x"] for call in engine.calls] == [1, 2, 0, 0, 0]
    with pytest.raises(RuntimeError, match="5 calls"):
        transformer(x=6)


def test_if_calls_do_not_need_all_ranks_a_failed_rank_only_votes(monkeypatch):
    votes = []
    monkeypatch.setattr(cogds.videos.lockstep, "any_rank", lambda _world, *flags: votes.append(flags) or flags)
    engine = make_engine(fails_at=2)
    transformer = LockstepTransformer(engine, World(0, 2, 0, 2), 4)
    transformer(x=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        transformer(x=2)
    assert transformer.in_forward
    assert not transformer.needs_all_ranks
    transformer.finish(has_failed=True)
    assert len(engine.calls) == 2
    assert len(votes) == 4  # as many as on a rank that did not fail


@pytest.mark.parametrize("idle_inputs", [None, {"x": 0}])
def test_all_ranks_stop_before_the_same_call(idle_inputs):
    stops = iter([False, False, True])
    engine, numbers = make_engine(), []
    transformer = LockstepTransformer(
        engine, ALONE, 9, idle_inputs=idle_inputs, on_call=numbers.append, is_stopping=lambda: next(stops)
    )
    transformer(x=1)
    transformer(x=1)
    with pytest.raises(Stopped):
        transformer(x=1)
    assert len(engine.calls) == 2
    assert numbers == [0, 1, 2]


def test_ranks_that_share_a_video_abandon_it_together(monkeypatch):
    """Ranks 0 and 1 share a video, 2 and 3 another. Rank 1 fails after two calls."""
    votes = []
    worlds = [World(rank, 4, rank, 4, sequence_size=2) for rank in range(4)]

    def any_rank(_world, stop, *failures):
        votes.append(failures)
        return stop, *map(any, zip(*votes))

    monkeypatch.setattr(cogds.videos.lockstep, "any_rank", any_rank)
    engines = [make_engine() for _ in worlds]
    ranks = [LockstepTransformer(engine, world, 5, idle_inputs={"x": 0}) for engine, world in zip(engines, worlds)]
    for _ in range(2):
        for rank in ranks:
            rank(x=1)
    ranks[1].finish(has_failed=True)
    for number in (0, 2, 3):
        with contextlib.suppress(RuntimeError):
            while True:
                ranks[number](x=1)
        ranks[number].finish(has_failed=number == 0)
    calls = [[call["x"] for call in engine.calls] for engine in engines]
    assert calls == [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 1]] * 2
    assert all(rank.needs_all_ranks for rank in ranks)

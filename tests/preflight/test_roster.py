"""Ranks that speak through the store, here threads of one process."""

import threading

import pytest
import torch.distributed as dist

from cogds.distributed.process_group import open_store
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.preflight import roster as roster_module
from cogds.preflight.roster import Roster, bounded
from tests.conftest import free_port


def as_ranks(size, play, present=None):
    """`play(roster, rank)` on every rank that is present, each with a client of its own; returns what they returned."""
    port, results = str(free_port()), {}

    def run(rank):
        environ = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        world = World(rank, size, rank, size)
        store = open_store(world, 10, environ)
        try:
            results[rank] = play(Roster(world, store), rank)
        except UserError as error:
            results[rank] = error
        stores.append(store)

    stores: list[dist.Store] = []  # rank 0's must outlive the others
    threads = [threading.Thread(target=run, args=(rank,)) for rank in (present or range(size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(roster_module, "POLL_S", 0.02)


def test_gather_and_share():
    def play(roster, rank):
        first = roster.gather({"rank": rank}, 10)
        told = roster.share(f"from {rank}", 10)
        return first, told, roster.gather(rank * 2, 10)

    results = as_ranks(3, play)
    assert results[0] == ([{"rank": 0}, {"rank": 1}, {"rank": 2}], "from 0", [0, 2, 4])
    assert results[1] == results[2] == ([], "from 0", [])


def test_who_does_not_answer_is_named_on_all_ranks_and_told_by_rank_0():
    results = as_ranks(5, lambda roster, rank: roster.call(f"n{rank // 2}", 0.5), present=[0, 2])
    for rank in (0, 2):
        assert "3 of 5 ranks did not answer within 0.5 s: 1, 3-4; those that did are on n0, n1" in str(results[rank])
    assert (results[0].shared, results[2].shared) == (False, True)


def test_an_absent_rank_is_waited_for_once():
    def play(roster, rank):
        answers = [roster.gather(rank, 0.3) for _ in range(4)] if rank < 2 else []
        return answers, roster.absent

    results = as_ranks(3, play)
    assert results[0] == ([[0, 1, None]] * 4, {2})


def test_alone_a_roster_needs_no_store():
    roster = Roster(World(0, 1, 0, 1), None)
    assert (roster.gather("x", 1), roster.share("y", 1), roster.call("n1", 1)) == (["x"], "y", ["n1"])
    roster.give_up("step")
    assert not roster.given_up("step")
    roster.leave()


def test_a_rank_that_gives_up_frees_the_others():
    never = threading.Event()

    def play(roster, rank):
        if rank == 1:
            roster.give_up("step")
            return None
        return bounded(lambda: never.wait(60), 60, lambda: roster.given_up("step"))

    results = as_ranks(2, play)
    never.set()
    assert results[0].error == roster_module.GIVEN_UP
    assert results[0].hung


def test_a_bounded_call_is_a_value_an_error_or_a_thread_that_hangs():
    assert bounded(lambda: 5, 10).value == 5

    def fail(error):
        raise error

    assert bounded(lambda: fail(UserError("no disk")), 10).error == "no disk"
    assert bounded(lambda: fail(ValueError("\nbad\nmore")), 10).error == "ValueError: bad"
    assert bounded(lambda: fail(RuntimeError()), 10).error == "RuntimeError"
    for error in (TypeError("planted"), AttributeError("planted")):
        assert bounded(lambda error=error: fail(error), 10).bug is error
    assert bounded(lambda: fail(OSError("full")), 10).bug is None
    never = threading.Event()
    outcome = bounded(lambda: never.wait(60), 0.05)
    never.set()
    assert (outcome.value, outcome.error, outcome.hung) == (None, "no answer within 0.05 s", True)

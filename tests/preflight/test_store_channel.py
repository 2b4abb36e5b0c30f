"""Messages between ranks through the store (the ranks are threads of one process), and calls with a time limit."""

import threading

import pytest
import torch.distributed as dist

from cogds.distributed.process_group import open_store
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.preflight import store_channel, timeouts
from cogds.preflight.store_channel import StoreChannel
from cogds.preflight.timeouts import STOPPED, call_with_timeout
from tests.conftest import free_port


def run_ranks(size, function, present=None):
    """Run `function(channel, rank)` on every rank that is present. Returns the results or UserErrors by rank."""
    port, results = str(free_port()), {}
    stores: list[dist.Store] = []  # rank 0's must outlive the others

    def run(rank):
        environ = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        world = World(rank, size, rank, size)
        store = open_store(world, 10, environ)
        stores.append(store)
        try:
            results[rank] = function(StoreChannel(world, store), rank)
        except UserError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in (present or range(size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch):
    monkeypatch.setattr(store_channel, "POLL_S", 0.02)
    monkeypatch.setattr(timeouts, "POLL_S", 0.02)


def test_gather_and_broadcast():
    def function(channel, rank):
        first = channel.gather({"rank": rank}, 10)
        received = channel.broadcast(f"from {rank}", 10)
        return first, received, channel.gather(rank * 2, 10)

    results = run_ranks(3, function)
    assert results[0] == ([{"rank": 0}, {"rank": 1}, {"rank": 2}], "from 0", [0, 2, 4])
    assert results[1] == results[2] == ([], "from 0", [])


def test_all_ranks_name_the_missing_ranks_and_rank_0_reports_them():
    results = run_ranks(5, lambda channel, rank: channel.gather_hosts(f"n{rank // 2}", 0.5), present=[0, 2])
    for rank in (0, 2):
        message = str(results[rank])
        assert message.startswith("ranks 1, 3-4: ")
        assert "3 of 5" in message
        assert "n0, n1" in message
        assert "--wait" in message
    assert (results[0].shared, results[2].shared) == (False, True)


def test_a_missing_rank_is_awaited_only_once():
    def function(channel, rank):
        answers = [channel.gather(rank, timeout_s) for timeout_s in (0.3, 100, 100)] if rank < 2 else []
        return answers, channel.missing_ranks

    results = run_ranks(3, function)
    assert results[0] == ([[0, 1, None]] * 3, {2})


def test_a_single_rank_needs_no_store():
    channel = StoreChannel(World(0, 1, 0, 1), None)
    assert (channel.gather("x", 1), channel.broadcast("y", 1), channel.gather_hosts("n1", 1)) == (["x"], "y", ["n1"])
    channel.abort("step")
    assert not channel.is_aborted("step")
    channel.close()


def test_the_abort_of_one_rank_stops_the_others():
    never = threading.Event()

    def function(channel, rank):
        if rank == 1:
            channel.abort("step")
            return None
        return call_with_timeout(lambda: never.wait(60), 60, lambda: channel.is_aborted("step"))

    results = run_ranks(2, function)
    never.set()
    assert results[0].error == STOPPED
    assert results[0].is_hung


def test_a_call_with_a_timeout_returns_a_value_an_error_or_a_hung_thread():
    assert call_with_timeout(lambda: 5, 10).value == 5

    def fail(error):
        raise error

    assert call_with_timeout(lambda: fail(UserError("no disk")), 10).error == "no disk"
    assert call_with_timeout(lambda: fail(ValueError("\nbad\nmore")), 10).error == "ValueError: bad"
    assert call_with_timeout(lambda: fail(RuntimeError()), 10).error == "RuntimeError"
    for error in (TypeError("planted"), AttributeError("planted")):
        assert call_with_timeout(lambda error=error: fail(error), 10).bug is error
    assert call_with_timeout(lambda: fail(OSError("full")), 10).bug is None
    never = threading.Event()
    result = call_with_timeout(lambda: never.wait(60), 0.05)
    never.set()
    assert (result.value, result.is_hung) == (None, True)
    assert "0.05 s" in result.error

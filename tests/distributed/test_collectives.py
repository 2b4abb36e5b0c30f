import pytest

from cogds.distributed.collectives import (
    all_gather,
    any_rank,
    broadcast,
    disagreeing_data_ranks,
    on_all_ranks,
    on_rank0,
    rank0_only,
    scatter_from_rank0,
)
from cogds.distributed.world import World
from cogds.errors import UserError

ALONE = World(0, 1, 0, 1)


def test_in_a_world_of_one_rank_every_collective_is_the_identity():
    assert on_rank0(ALONE, lambda: 5) == rank0_only(ALONE, lambda: 5) == scatter_from_rank0(ALONE, lambda: [5]) == 5
    assert all_gather(ALONE, "x") == ["x"]
    assert on_all_ranks(ALONE, lambda: 6) == [6]
    assert broadcast(ALONE, 0, 7) == 7
    assert any_rank(ALONE, True, False) == (True, False)
    assert disagreeing_data_ranks(ALONE, 5) == []


@pytest.mark.parametrize("collective", [on_rank0, rank0_only, scatter_from_rank0, on_all_ranks])
@pytest.mark.parametrize("error", [UserError("no"), OSError("full")], ids=["UserError", "OSError"])
def test_a_rank_raises_its_own_error_unchanged(collective, error):
    def fail():
        raise error

    with pytest.raises(type(error)) as raised:
        collective(ALONE, fail)
    assert raised.value is error
    assert not getattr(error, "shared", False)

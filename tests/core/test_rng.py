import itertools

import pytest
import torch

from cogds.core.rng import generator, seed_global


def draw(*key):
    return tuple(torch.rand(4, generator=generator(*key)).tolist())


def draw_globally(*key):
    seed_global(*key)
    return tuple(torch.rand(4).tolist())


@pytest.mark.parametrize(
    "draw, keys",
    [
        (draw, list(itertools.product((0, 1), (0, 1), (0, 1), ("noise", "dropout")))),
        (draw_globally, list(itertools.product((0, 1), repeat=3))),
    ],
)
def test_draws_depend_on_every_part_of_the_key_and_on_nothing_else(draw, keys):
    with torch.random.fork_rng(devices=[]):
        drawn = [draw(*key) for key in keys]
        assert len(set(drawn)) == len(keys)
        assert [draw(*key) for key in keys] == drawn


def test_seeds_do_not_change_between_versions():
    # If these values change, a run cannot be resumed with a new version of cogds.
    assert generator(0, 5, 1, "noise").initial_seed() == 6154930350676789344
    assert generator(42, 10**6, 511, "image posterior").initial_seed() == 7408540104903672028
    with torch.random.fork_rng(devices=[]):
        seed_global(42, 7, 3)
        assert torch.initial_seed() == 1643603386266465673

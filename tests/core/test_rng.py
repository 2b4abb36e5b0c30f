import itertools

import torch

from cogds.core.rng import generator, seed_global


def first_draws(*place):
    return torch.rand(4, generator=generator(*place))


def test_the_same_key_draws_the_same():
    assert torch.equal(first_draws(0, 5, 1, "noise"), first_draws(0, 5, 1, "noise"))


def test_every_part_of_the_key_matters():
    places = list(itertools.product((0, 1), (0, 1), (0, 1), ("noise", "dropout")))
    assert len({tuple(first_draws(*place).tolist()) for place in places}) == len(places)


def test_the_global_seed_depends_on_every_part_of_the_key_and_nothing_else():
    def first_draws(*place):
        seed_global(*place)
        return tuple(torch.rand(4).tolist())

    places = list(itertools.product((0, 1), repeat=3))
    with torch.random.fork_rng(devices=[]):
        drawn = [first_draws(*place) for place in places]
        assert len(set(drawn)) == len(places)
        assert [first_draws(*place) for place in places] == drawn


def test_seeds_do_not_change_between_versions():
    # A run resumed with another version of this code must draw the same: change these and you break resume.
    assert generator(0, 5, 1, "noise").initial_seed() == 6154930350676789344
    assert generator(42, 10**6, 511, "image posterior").initial_seed() == 7408540104903672028
    with torch.random.fork_rng(devices=[]):
        seed_global(42, 7, 3)
        assert torch.initial_seed() == 1643603386266465673

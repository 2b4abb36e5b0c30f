import itertools

import torch

from cogds.core.rng import generator


def first_draws(*place):
    return torch.rand(4, generator=generator(*place))


def test_the_same_place_draws_the_same():
    assert torch.equal(first_draws(0, 5, 1, "noise"), first_draws(0, 5, 1, "noise"))


def test_every_part_of_the_place_matters():
    places = list(itertools.product((0, 1), (0, 1), (0, 1), ("noise", "dropout")))
    assert len({tuple(first_draws(*place).tolist()) for place in places}) == len(places)

import pytest

from cogds.core.coverage import share_seen
from cogds.core.mixture import Mixture


def counted_share(mixture, drawn):
    seen = {(bucket, mixture.visit(bucket, k).clip) for bucket, num in enumerate(drawn) for k in range(num)}
    return len(seen) / sum(map(sum, mixture.sizes))


@pytest.mark.parametrize("drawn", [(0, 0, 0), (3, 0, 1), (10, 0, 5), (25, 0, 50)])
def test_coverage_is_exact_for_one_data_set(drawn):
    mixture = Mixture(sizes=((10,), (0,), (5,)), repeats=(1.0,), seed=3)
    assert share_seen(drawn, mixture) == pytest.approx(counted_share(mixture, drawn))


def test_coverage_is_exact_after_whole_passes():
    mixture = Mixture(sizes=((10, 40), (6, 3)), repeats=(2.0, 0.25), seed=1)
    for passes in range(1, 6):
        drawn = [passes * num for num in mixture.virtual_sizes]
        assert share_seen(drawn, mixture) == pytest.approx(counted_share(mixture, drawn))
    assert share_seen((0, 0), Mixture(((0,), (0,)), (1.0,), 0)) == 0.0

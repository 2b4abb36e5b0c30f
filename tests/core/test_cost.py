import pytest

from cogds.core.cost import clip_flops


def test_the_real_models_figures():
    """Counts published for the model's geometry: 42 layers of 3072."""
    assert clip_flops(45_104, 42, 3072) == pytest.approx(1479e12, rel=1e-3)
    assert clip_flops(15_074, 42, 3072) == pytest.approx(261e12, rel=4e-3)
    assert clip_flops(9_674, 42, 3072) == pytest.approx(140e12, rel=4e-3)

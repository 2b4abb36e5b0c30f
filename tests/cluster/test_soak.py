"""soak.py as it stands: 2,000 steps, something every hundred, and nobody looks after it."""

import pytest

from tests.cluster.faults import RANDOM_FAULTS
from tests.cluster.soak import soak

pytestmark = pytest.mark.endurance


def test_a_job_that_is_struck_every_hundred_steps_comes_to_its_end_unchanged(lab, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "endurance"
    folder.mkdir(exist_ok=True)
    table, result = soak(lab, folder, num_steps=2000, every=100, seed=0)
    assert result["ok"], result
    assert result["faults"] >= 15
    assert {row["fault"] for row in table} == {fault.name for fault in RANDOM_FAULTS}

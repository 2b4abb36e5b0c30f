"""soak.py: one job of 2,000 steps with a fault about every hundred steps."""

import pytest

from tests.cluster.faults import RANDOM_FAULTS
from tests.cluster.soak import soak

pytestmark = pytest.mark.endurance


def test_a_job_with_faults_finishes_and_equals_the_reference(lab, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "endurance"
    folder.mkdir(exist_ok=True)
    table, result = soak(lab, folder, num_steps=2000, every=100, seed=0)
    assert result["ok"], result
    assert result["faults"] >= 15
    assert {row["fault"] for row in table} == {fault.name for fault in RANDOM_FAULTS}

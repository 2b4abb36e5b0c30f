"""soak.py: one job of 1,500 steps with a fault about every hundred steps, each kind at least once."""

import pytest

from tests.cluster.faults import NUM_STEPS, RANDOM_FAULTS
from tests.cluster.soak import soak

pytestmark = pytest.mark.release


def test_a_job_with_faults_finishes_and_equals_the_reference(lab, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "endurance"
    folder.mkdir(exist_ok=True)
    table, result = soak(lab, folder, num_steps=NUM_STEPS, every=100, seed=0)
    assert result["ok"], result
    assert result["faults"] >= len(RANDOM_FAULTS)
    assert {row["fault"] for row in table} == {fault.name for fault in RANDOM_FAULTS}

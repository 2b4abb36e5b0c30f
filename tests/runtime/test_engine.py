"""What needs no process group; loading and training under each stage stand in tests/dist."""

from cogds.runtime.engine import zero_stage


def test_stage_of_a_config():
    assert zero_stage({"zero_optimization": {"stage": 3}}) == 3
    assert zero_stage({}) == 0

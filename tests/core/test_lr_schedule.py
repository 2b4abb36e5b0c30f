import pytest

from cogds.core.lr_schedule import learning_rate


def rates(schedule, num_steps=11, warmup_steps=0, final_lr_ratio=0.0):
    return [learning_rate(step, 1.0, schedule, num_steps, warmup_steps, final_lr_ratio) for step in range(num_steps)]


def test_warmup_rises_to_lr_and_starts_above_zero():
    assert rates("constant", 6, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_evenly_to_the_end():
    assert rates("linear") == pytest.approx([1 - step / 10 for step in range(11)])


def test_cosine_is_at_half_in_the_middle():
    falling = rates("cosine")
    assert falling[0] == 1.0
    assert falling[5] == pytest.approx(0.5)
    assert falling[10] == pytest.approx(0.0)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_last_step_has_the_final_ratio(schedule):
    assert rates(schedule, warmup_steps=2, final_lr_ratio=0.1)[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_as_long_as_the_run_or_longer(schedule):
    assert all(0 < rate < 1 for rate in rates(schedule, 3, warmup_steps=5))


def test_a_run_of_one_step():
    assert rates("cosine", 1) == [1.0]

"""A full fine-tuning run that is killed during saves continues as if it had not. 20 kills: `tests/dist/kills.py`."""

import pytest

from tests.dist.kills import create_inputs, run_with_kills
from tests.warm import Server

pytestmark = [pytest.mark.dist, pytest.mark.release]
NUM_KILLS = 2


def test_a_run_that_is_killed_during_two_saves_equals_the_uninterrupted_run(tmp_path):
    create_inputs(tmp_path)
    server = Server()
    try:
        kills, steps, errors = run_with_kills(server, tmp_path, "zero3", NUM_KILLS)
    finally:
        server.close()
    assert errors == []
    assert len(kills) == len(steps) == NUM_KILLS
    assert steps == sorted(steps)
    assert all(kill.saving and kill.phase for kill in kills)

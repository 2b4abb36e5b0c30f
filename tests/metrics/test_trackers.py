import json
import math
import sys

import pytest

from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.metrics.jsonl import metrics_line
from cogds.metrics.monitor import Monitor
from cogds.metrics.step_metrics import StepLosses
from cogds.metrics.trackers import Trackers, check_monitors


class Kept:
    """Takes events as DeepSpeed's monitors do; `fails` as a service that cannot be reached."""

    def __init__(self, fails=False):
        self.enabled, self.events, self.fails = True, [], fails

    def write_events(self, events):
        if self.fails:
            raise ConnectionError("no route to host")
        self.events += events


def step(number, loss=1.0):
    return metrics_line(number, {"train/loss": loss})


def test_steps_never_go_back():
    kept = Kept()
    relay = Trackers(kept)
    relay.write([metrics_line(0, {"eval/loss": 3.0})])  # before the first step
    assert kept.events == []
    relay.write([metrics_line(2, {"eval/loss": 2.0})])  # evaluated before the lines of steps 1 and 2 were read
    relay.write([step(1), step(2), step(3)])
    relay.write([metrics_line(2, {"checkpoint/write_s": 9.0})])  # written behind the back of step 3
    relay.write([step(4)])
    relay.write([metrics_line(6, {"eval/loss": 1.0})])
    relay.close()
    assert kept.events == [
        ("eval/loss", 3.0, 0), ("train/loss", 1.0, 1), ("eval/loss", 2.0, 2), ("train/loss", 1.0, 2),
        ("train/loss", 1.0, 3), ("checkpoint/write_s", 9.0, 3), ("train/loss", 1.0, 4), ("eval/loss", 1.0, 6),
    ]  # fmt: skip


def test_what_is_not_finite_arrives_as_such():
    kept = Kept()
    Trackers(kept).write([step(1, math.inf)])
    assert math.isnan(kept.events[0][1])


def test_a_service_that_cannot_be_reached_is_told_once(capsys):
    relay = Trackers(Kept(fails=True))
    for number in range(5):
        relay.write([step(number)])
    relay.close()
    assert capsys.readouterr().err == (
        "warning: DeepSpeed's monitor failed (ConnectionError: no route to host): training goes on, and what it lacks "
        "stands in metrics.jsonl and tensorboard/\n"
    )


def test_it_gets_the_lines_of_the_file(tmp_path):
    kept = Kept()
    monitor = Monitor(World(0, 1, 0, 1), tmp_path, [], 0, 10, 2, False, Trackers(kept))
    for number in (1, 2, 3):
        losses = StepLosses(0, "cpu")
        monitor.record(number, {"train/lr": 0.5}, losses)
    monitor.note(3, {"eval/loss": 2.0})
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    written = [(line["step"], name) for line in lines for name in line if name != "step"]
    assert sorted((number, name) for name, _, number in kept.events) == sorted(written)


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_monitors({"wandb": {"enabled": False}, "csv_monitor": {"enabled": True}})
    with pytest.raises(UserError, match=r"wandb.enabled is true .* pip install wandb"):
        check_monitors({"wandb": {"enabled": True}})

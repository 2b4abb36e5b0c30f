import json
import math
import sys

import pytest

from cogds.config.schema import MetricsConfig
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.metrics.jsonl import metrics_line
from cogds.metrics.monitor import Monitor
from cogds.metrics.step_metrics import StepLosses
from cogds.metrics.trackers import Trackers, check_tracker_packages


class ServiceMonitor:
    """A stand-in for DeepSpeed's monitors. fails: as if the service could not be reached."""

    def __init__(self, fails=False):
        self.events, self.fails = [], fails

    def write_events(self, events):
        if self.fails:
            raise ConnectionError("no route to host")
        self.events += events


def step(number, loss=1.0):
    return metrics_line(number, {"train/loss": loss})


def test_trackers_get_steps_in_order():
    service = ServiceMonitor()
    trackers = Trackers(service)
    trackers.write([metrics_line(0, {"eval/loss": 3.0})])  # before the first step
    assert service.events == []
    trackers.write([metrics_line(2, {"eval/loss": 2.0})])  # before the lines of steps 1 and 2
    trackers.write([step(1), step(2), step(3)])
    trackers.write([metrics_line(2, {"checkpoint/write_s": 9.0})])  # by a background thread, during step 3
    trackers.write([step(4)])
    trackers.write([metrics_line(6, {"eval/loss": 1.0})])
    trackers.close()
    assert service.events == [
        ("eval/loss", 3.0, 0), ("train/loss", 1.0, 1), ("eval/loss", 2.0, 2), ("train/loss", 1.0, 2),
        ("train/loss", 1.0, 3), ("checkpoint/write_s", 9.0, 3), ("train/loss", 1.0, 4), ("eval/loss", 1.0, 6),
    ]  # fmt: skip


def test_a_value_that_is_not_finite_becomes_nan():
    service = ServiceMonitor()
    Trackers(service).write([step(1, math.inf)])
    assert math.isnan(service.events[0][1])


def test_a_service_that_cannot_be_reached_is_reported_once(capsys):
    trackers = Trackers(ServiceMonitor(fails=True))
    for number in range(5):
        trackers.write([step(number)])
    trackers.close()
    (warning,) = capsys.readouterr().err.splitlines()
    assert "ConnectionError: no route to host" in warning


def test_trackers_get_the_lines_of_the_file(tmp_path):
    service = ServiceMonitor()
    config = MetricsConfig(every=2, progress_bar=False)
    monitor = Monitor(World(0, 1, 0, 1), tmp_path, [], range(10), config, Trackers(service))
    for number in (1, 2, 3):
        monitor.add_step(number, {"train/lr": 0.5}, StepLosses(0, "cpu"))
    monitor.add_scalars(3, {"eval/loss": 2.0})
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    written = [(line["step"], name) for line in lines for name in line if name != "step"]
    assert sorted((number, name) for name, _, number in service.events) == sorted(written)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_tracker_packages({"wandb": {"enabled": False}, "csv_monitor": {"enabled": True}})
    with pytest.raises(UserError, match=r"^wandb\.enabled: .*pip install wandb"):
        check_tracker_packages({"wandb": {"enabled": True}})

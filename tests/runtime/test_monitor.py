import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cogds.core.geometry import ClipShape
from cogds.runtime.monitor import Monitor, StepLosses, rewind_metrics
from cogds.runtime.world import World

BUCKETS = (ClipShape(9, 64, 64), ClipShape(17, 64, 96))


def make(tmp_path, first_step=0, every=1):
    return Monitor(World(0, 1, 0, 1), tmp_path, BUCKETS, first_step, 10, every, progress_bar=False)


def losses(value, bucket=0):
    one = StepLosses(len(BUCKETS), torch.device("cpu"))
    one.add(torch.tensor(value), torch.tensor([value, value + 2]), bucket, torch.tensor([0, 3]))
    return one


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_one_object_per_step_and_the_same_scalars_in_tensorboard(tmp_path):
    monitor = make(tmp_path)
    monitor.record(1, {"train/lr": 0.5, "train/grad_norm": None}, losses(1.0))
    monitor.record(2, {"train/lr": 0.25, "train/grad_norm": torch.tensor(3.0)}, losses(2.0, bucket=1))
    monitor.close()
    first, second = lines(tmp_path)
    assert first == {
        "step": 1,
        "train/loss": 1.0,
        "train/loss/bucket=9x64x64": 2.0,
        "train/loss/t_q1": 1.0,
        "train/loss/t_q4": 3.0,
        "train/lr": 0.5,
    }
    assert second["train/loss/bucket=17x64x96"] == 3.0
    assert second["train/grad_norm"] == 3.0
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {name: [e.value for e in board.Scalars(name)] for name in ("train/loss", "train/lr")} == {
        "train/loss": [1.0, 2.0],
        "train/lr": [0.5, 0.25],
    }


def test_losses_of_several_micro_steps_are_collected():
    one = StepLosses(2, torch.device("cpu"))
    one.add(torch.tensor(0.5), torch.tensor([1.0]), 0, torch.tensor([2]))
    one.add(torch.tensor(0.25), torch.tensor([3.0, 5.0]), 0, torch.tensor([2, 2]))
    assert one.vector.tolist() == [0.75, 9.0, 3.0, 0, 0, 0, 0, 0, 0, 9.0, 3.0, 0, 0]


def test_nothing_is_written_before_the_flush(tmp_path):
    monitor = make(tmp_path, every=3)
    for step in (1, 2):
        monitor.record(step, {"train/lr": 0.1}, losses(1.0))
    assert lines(tmp_path) == []
    monitor.record(3, {"train/lr": 0.1}, losses(1.0))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    monitor.record(4, {"train/lr": 0.1}, losses(1.0))
    monitor.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("step, kept", [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_a_resumed_run_rewinds_and_drops_a_line_cut_short(tmp_path, step, kept):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": n}) + "\n" for n in (1, 2, 3)) + '{"step": 4, "tr')
    rewind_metrics(file, step)
    assert [line["step"] for line in lines(tmp_path)] == kept


def test_a_resumed_run_appends(tmp_path):
    monitor = make(tmp_path)
    for step in (1, 2, 3):
        monitor.record(step, {"train/lr": 0.1}, losses(1.0))
    monitor.close()
    monitor = make(tmp_path, first_step=2)
    monitor.record(3, {"train/lr": 0.2}, losses(1.0))
    monitor.close()
    assert [(line["step"], line["train/lr"]) for line in lines(tmp_path)] == [(1, 0.1), (2, 0.1), (3, 0.2)]

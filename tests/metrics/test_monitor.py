import contextlib
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cogds.config.schema import MetricsConfig
from cogds.core.geometry import ClipShape
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.metrics.jsonl import rewind_metrics, step_lines
from cogds.metrics.monitor import Monitor
from cogds.metrics.step_metrics import StepLosses
from tests.board import event_folder

BUCKETS = (ClipShape(9, 64, 64), ClipShape(17, 64, 96))


class DrainedMonitor(Monitor):
    """A monitor whose calls return after its thread has tried to write."""

    def add_step(self, *args, **options):
        super().add_step(*args, **options)
        assert self.writer.drain(10)

    def add_scalars(self, *args):
        super().add_scalars(*args)
        assert self.writer.drain(10)


def make_monitor(folder, first_step=0, every=1):
    return DrainedMonitor(World(0, 1, 0, 1), folder, BUCKETS, range(first_step, 10), MetricsConfig(every=every))


def losses(value, bucket=0):
    losses = StepLosses(len(BUCKETS), torch.device("cpu"))
    losses.add(torch.tensor(value), torch.tensor([value, value + 2]), bucket, torch.tensor([0, 3]))
    return losses


def add_steps(monitor, steps):
    for step in steps:
        monitor.add_step(step, {"train/lr": step / 8}, losses(float(step)))


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_steps(folder):
    return [line["step"] for line in read_lines(folder)]


def load_board(folder):
    board = EventAccumulator(str(event_folder(folder)), purge_orphaned_data=True)
    board.Reload()
    return board


def read_board(folder, name):
    return [(event.step, event.value) for event in load_board(folder).Scalars(name)]


def test_each_step_is_a_line_and_the_same_scalars_are_in_tensorboard(tmp_path):
    monitor = make_monitor(tmp_path)
    monitor.add_step(1, {"train/lr": 0.5, "train/grad_norm": None}, losses(1.0))
    monitor.add_step(2, {"train/lr": 0.25, "train/grad_norm": torch.tensor(3.0)}, losses(2.0, bucket=1))
    monitor.close()
    first, second = read_lines(tmp_path)
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
    assert read_board(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert read_board(tmp_path, "train/lr") == [(1, 0.5), (2, 0.25)]


def test_losses_of_several_micro_steps_add_up():
    losses = StepLosses(2, torch.device("cpu"))
    losses.add(torch.tensor(0.5), torch.tensor([1.0]), 0, torch.tensor([2]))
    losses.add(torch.tensor(0.25), torch.tensor([3.0, 5.0]), 0, torch.tensor([2, 2]))
    assert losses.vector.tolist() == [0.75, 9.0, 3.0, 0, 0, 0, 0, 0, 0, 9.0, 3.0, 0, 0]


def test_nothing_is_written_before_the_flush(tmp_path):
    monitor = make_monitor(tmp_path, every=3)
    add_steps(monitor, [1, 2])
    assert read_lines(tmp_path) == []
    add_steps(monitor, [3])
    assert read_steps(tmp_path) == [1, 2, 3]
    add_steps(monitor, [4])
    monitor.close()
    assert read_steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("step, kept", [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_rewinding_drops_later_lines_and_an_incomplete_one(tmp_path, step, kept):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": n}) + "\n" for n in (1, 2, 3)) + '{"step": 4, "tr')
    rewind_metrics(file, step)
    assert read_steps(tmp_path) == kept


def test_a_text_is_only_in_tensorboard(tmp_path):
    monitor = make_monitor(tmp_path)
    monitor.add_text("config/run", "seed: 7\nlr: 1")
    monitor.close()
    (event,) = load_board(tmp_path).Tensors("config/run/text_summary")
    assert event.tensor_proto.string_val == [b"    seed: 7\n    lr: 1"]
    assert read_lines(tmp_path) == []


def test_a_note_is_a_line_of_its_own_and_not_a_step(tmp_path):
    monitor = make_monitor(tmp_path)
    monitor.add_scalars(0, {"eval/loss": 0.75})
    monitor.add_step(1, {"train/lr": 0.1}, losses(1.0))
    monitor.add_scalars(1, {"eval/loss": 0.5, "eval/odd": math.nan})
    monitor.add_scalars(1, {})
    monitor.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert read_lines(tmp_path)[0] == {"step": 0, "eval/loss": 0.75}
    assert read_lines(tmp_path)[2:] == [{"step": 1, "eval/loss": 0.5, "eval/odd": None}]
    assert [line["step"] for line in step_lines(text + '{"step": 2, "train/lo')] == [1]
    assert read_board(tmp_path, "eval/loss") == [(0, 0.75), (1, 0.5)]


def test_a_resumed_run_continues_after_its_step(tmp_path):
    monitor = make_monitor(tmp_path)
    for step in (1, 2, 3):
        monitor.add_step(step, {"train/lr": 0.125}, losses(1.0))
        monitor.add_scalars(step, {"eval/loss": 1.0 / step})
    monitor.close()
    rewind_metrics(tmp_path / "metrics.jsonl", 2)
    monitor = make_monitor(tmp_path, first_step=2)
    monitor.add_step(3, {"train/lr": 0.25}, losses(1.0))
    monitor.add_scalars(3, {"eval/loss": 7.0})
    monitor.close()
    for name, values in {"train/lr": [0.125, 0.125, 0.25], "eval/loss": [1.0, 0.5, 7.0]}.items():
        expected = list(zip((1, 2, 3), values))
        assert [(line["step"], line[name]) for line in read_lines(tmp_path) if name in line] == expected
        assert read_board(tmp_path, name) == expected
    assert len(list(event_folder(tmp_path).iterdir())) == 2


def test_a_note_that_a_resumed_run_repeats_is_written_once(tmp_path):
    """An evaluation after the step of the checkpoint runs before the save and again after the resume."""
    monitor = make_monitor(tmp_path)
    for step in (1, 2, 3):
        add_steps(monitor, [step])
        monitor.add_scalars(step, {"eval/loss": 1.0 / step})
        monitor.add_scalars(step, {"checkpoint/pause_s": 1.0})
    monitor.close()
    rewind_metrics(tmp_path / "metrics.jsonl", 2, ("eval/",))
    monitor = make_monitor(tmp_path, first_step=2)
    monitor.add_scalars(2, {"eval/loss": 0.5})
    monitor.close()
    lines = read_lines(tmp_path)
    assert [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line] == [(1, 1.0), (2, 0.5)]
    for name in ("train/loss", "checkpoint/pause_s"):
        assert [line["step"] for line in lines if name in line] == [1, 2]
    # TensorBoard hides what came after step 2. It has the note of step 2 twice, at the same place.
    assert read_board(tmp_path, "eval/loss") == [(1, 1.0), (2, 0.5), (2, 0.5)]
    assert read_board(tmp_path, "train/lr") == [(1, 0.125), (2, 0.25)]


def test_a_value_that_is_not_finite_is_null_in_json_and_itself_in_tensorboard(tmp_path):
    monitor = make_monitor(tmp_path)
    monitor.add_step(1, {"train/lr": 0.1, "train/grad_norm": math.inf}, losses(math.nan))
    monitor.close()
    assert not {"NaN", "Infinity"} & set((tmp_path / "metrics.jsonl").read_text().replace(",", " ").split())
    (line,) = read_lines(tmp_path)
    assert line["train/grad_norm"] is None
    assert line["train/loss"] is None
    assert read_board(tmp_path, "train/grad_norm") == [(1, math.inf)]
    assert math.isnan(read_board(tmp_path, "train/loss")[0][1])


def fill(folder):
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


def test_records_that_a_full_disk_refuses_are_written_later(small_disk, capsys):
    monitor = make_monitor(small_disk)
    add_steps(monitor, [1])
    fill(small_disk)
    # More than fits into the last page of either file, so one record is written in part.
    add_steps(monitor, range(2, 60))
    written = read_steps(small_disk)  # only whole lines
    assert written == list(range(1, len(written) + 1))
    assert len(written) < 59
    warnings = sorted(capsys.readouterr().err.splitlines())
    assert ["metrics.jsonl: cannot" in line for line in warnings] == [True, False]
    assert "/events.out.tfevents" in warnings[1]
    assert "No space left on device" in warnings[0]
    (small_disk / "filler").unlink()
    add_steps(monitor, [60])
    monitor.close()
    warnings = capsys.readouterr().err.splitlines()
    assert ["is written again" in line for line in warnings] == [True, True]
    assert read_steps(small_disk) == list(range(1, 61))
    assert read_board(small_disk, "train/lr") == [(step, step / 8) for step in range(1, 61)]


def test_records_that_are_never_written_are_reported_at_the_end(small_disk, capsys):
    monitor = make_monitor(small_disk)
    fill(small_disk)
    add_steps(monitor, range(1, 60))
    monitor.close()
    of_metrics, of_events = capsys.readouterr().err.splitlines()[2:]
    assert f"{small_disk}/metrics.jsonl: the last {59 - len(read_lines(small_disk))} records" in of_metrics
    assert f"{event_folder(small_disk)}/events" in of_events


def test_a_disk_that_turns_read_only_does_not_end_the_run(small_disk, capsys):
    monitor = make_monitor(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    add_steps(monitor, [1])
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    add_steps(monitor, [2])
    monitor.close()
    assert capsys.readouterr().err.count("Read-only file system") == 2
    assert read_steps(small_disk) == [1, 2]
    assert read_board(small_disk, "train/lr") == [(1, 0.125), (2, 0.25)]


@pytest.mark.parametrize("gone", ["tensorboard", "."])
def test_a_missing_folder_is_created_again_and_a_file_in_its_place_reported(tmp_path, gone, capsys):
    output = tmp_path / "run"
    output.mkdir()
    monitor = make_monitor(output)
    add_steps(monitor, [1])
    shutil.rmtree(output / gone)
    add_steps(monitor, [2])
    assert read_board(output, "train/lr") == [(2, 0.25)]
    assert capsys.readouterr().err == ""
    shutil.rmtree(output / gone)
    (output / gone).touch()
    add_steps(monitor, [3])
    monitor.close()
    assert f"warning: {event_folder(output)}/events" in capsys.readouterr().err
    if gone == "tensorboard":
        assert read_steps(output) == [1, 2, 3]


def test_a_broken_pipe_does_not_end_the_run(tmp_path, monkeypatch):
    """stdout and stderr have no reader when the terminal or the launcher is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    # Line buffering leaves nothing in the buffer that would fail when the pipe is closed.
    pipe = open(writer, "w", buffering=1)  # noqa: SIM115
    with pytest.raises(BrokenPipeError):
        print("a line", file=pipe, flush=True)
    monitor = make_monitor(tmp_path)
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(sys, "stderr", pipe)
    add_steps(monitor, [1])
    (tmp_path / "tensorboard").rename(tmp_path / "moved")
    (tmp_path / "tensorboard").touch()
    add_steps(monitor, [2])
    monitor.close()
    monkeypatch.undo()
    assert read_steps(tmp_path) == [1, 2]
    with contextlib.suppress(BrokenPipeError):
        pipe.close()


def test_lines_of_a_damaged_file_are_dropped(tmp_path):
    """A power cut may leave zeros and other bytes. The last line lacks only its newline."""
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + bytes(40) + b'\n\xff\xfe\n{"step": []}\n[]\n{"step": 2}')
    rewind_metrics(file, 3)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_metrics_that_cannot_be_rewound_are_an_error_before_the_run(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rewind_metrics(file, 3)  # does nothing without a file
    assert not list(tmp_path.iterdir())
    file.mkdir()
    with pytest.raises(UserError, match=str(file)):
        rewind_metrics(file, 3)

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

BUCKETS = (ClipShape(9, 64, 64), ClipShape(17, 64, 96))


class DrainedMonitor(Monitor):
    """A monitor whose thread has tried everything when a call returns."""

    def add_step(self, *args, **options):
        super().add_step(*args, **options)
        assert self.writer.drain(10)

    def add_scalars(self, *args):
        super().add_scalars(*args)
        assert self.writer.drain(10)


def make(tmp_path, first_step=0, every=1):
    return DrainedMonitor(World(0, 1, 0, 1), tmp_path, BUCKETS, range(first_step, 10), MetricsConfig(every=every))


def losses(value, bucket=0):
    one = StepLosses(len(BUCKETS), torch.device("cpu"))
    one.add(torch.tensor(value), torch.tensor([value, value + 2]), bucket, torch.tensor([0, 3]))
    return one


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def loaded(tmp_path):
    board = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    board.Reload()
    return board


def board_of(tmp_path, name):
    return [(event.step, event.value) for event in loaded(tmp_path).Scalars(name)]


def step_of(step):
    return {"train/lr": step / 8}, losses(float(step))


def test_each_step_is_a_line_and_the_same_scalars_are_in_tensorboard(tmp_path):
    monitor = make(tmp_path)
    monitor.add_step(1, {"train/lr": 0.5, "train/grad_norm": None}, losses(1.0))
    monitor.add_step(2, {"train/lr": 0.25, "train/grad_norm": torch.tensor(3.0)}, losses(2.0, bucket=1))
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
    assert board_of(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert board_of(tmp_path, "train/lr") == [(1, 0.5), (2, 0.25)]


def test_losses_of_several_micro_steps_add_up():
    one = StepLosses(2, torch.device("cpu"))
    one.add(torch.tensor(0.5), torch.tensor([1.0]), 0, torch.tensor([2]))
    one.add(torch.tensor(0.25), torch.tensor([3.0, 5.0]), 0, torch.tensor([2, 2]))
    assert one.vector.tolist() == [0.75, 9.0, 3.0, 0, 0, 0, 0, 0, 0, 9.0, 3.0, 0, 0]


def test_nothing_is_written_before_the_flush(tmp_path):
    monitor = make(tmp_path, every=3)
    for step in (1, 2):
        monitor.add_step(step, {"train/lr": 0.1}, losses(1.0))
    assert lines(tmp_path) == []
    monitor.add_step(3, {"train/lr": 0.1}, losses(1.0))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    monitor.add_step(4, {"train/lr": 0.1}, losses(1.0))
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
        monitor.add_step(step, {"train/lr": 0.1}, losses(1.0))
    monitor.close()
    rewind_metrics(tmp_path / "metrics.jsonl", 2)
    monitor = make(tmp_path, first_step=2)
    monitor.add_step(3, {"train/lr": 0.2}, losses(1.0))
    monitor.close()
    assert [(line["step"], line["train/lr"]) for line in lines(tmp_path)] == [(1, 0.1), (2, 0.1), (3, 0.2)]
    assert board_of(tmp_path, "train/loss") == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert [value for _, value in board_of(tmp_path, "train/lr")] == pytest.approx([0.1, 0.1, 0.2])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_text_is_only_in_tensorboard(tmp_path):
    monitor = make(tmp_path)
    monitor.add_text("config/run", "seed: 7\nlr: 1")
    monitor.close()
    (event,) = loaded(tmp_path).Tensors("config/run/text_summary")
    assert event.tensor_proto.string_val == [b"    seed: 7\n    lr: 1"]
    assert lines(tmp_path) == []


def test_a_note_is_a_line_of_its_own_and_not_a_step(tmp_path):
    monitor = make(tmp_path)
    monitor.add_scalars(0, {"eval/loss": 0.75})
    monitor.add_step(1, {"train/lr": 0.1}, losses(1.0))
    monitor.add_scalars(1, {"eval/loss": 0.5, "eval/odd": math.nan})
    monitor.add_scalars(1, {})
    monitor.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert lines(tmp_path)[0] == {"step": 0, "eval/loss": 0.75}
    assert lines(tmp_path)[2:] == [{"step": 1, "eval/loss": 0.5, "eval/odd": None}]
    assert [line["step"] for line in step_lines(text + '{"step": 2, "train/lo')] == [1]
    assert board_of(tmp_path, "eval/loss") == [(0, 0.75), (1, 0.5)]


def test_a_resumed_run_keeps_the_notes_up_to_its_step(tmp_path):
    monitor = make(tmp_path)
    for step in (1, 2, 3):
        monitor.add_step(step, {"train/lr": 0.1}, losses(1.0))
        monitor.add_scalars(step, {"eval/loss": 1.0 / step})
    monitor.close()
    rewind_metrics(tmp_path / "metrics.jsonl", 2)
    monitor = make(tmp_path, first_step=2)
    monitor.add_scalars(3, {"eval/loss": 7.0})
    monitor.close()
    noted = [(line["step"], line["eval/loss"]) for line in lines(tmp_path) if "eval/loss" in line]
    assert noted == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert board_of(tmp_path, "eval/loss") == noted


def test_a_repeated_note_is_there_once(tmp_path):
    """An evaluation that is due where the run goes on: step 2 is evaluated before it was saved, and after that."""
    monitor = make(tmp_path)
    for step in (1, 2, 3):
        monitor.add_step(step, {"train/lr": step / 8}, losses(1.0))
        monitor.add_scalars(step, {"eval/loss": 1.0 / step})
        monitor.add_scalars(step, {"checkpoint/pause_s": 1.0})
    monitor.close()
    rewind_metrics(tmp_path / "metrics.jsonl", 2, ("eval/",))
    monitor = make(tmp_path, first_step=2)
    monitor.add_scalars(2, {"eval/loss": 0.5})
    monitor.close()
    noted = [(line["step"], line["eval/loss"]) for line in lines(tmp_path) if "eval/loss" in line]
    assert noted == [(1, 1.0), (2, 0.5)]
    assert [line["step"] for line in lines(tmp_path) if "train/loss" in line] == [1, 2]
    assert [line["step"] for line in lines(tmp_path) if "checkpoint/pause_s" in line] == [1, 2]
    # TensorBoard hides what came after step 2, and has that step's twice in one place: its own step stays.
    assert board_of(tmp_path, "eval/loss") == [(1, 1.0), (2, 0.5), (2, 0.5)]
    assert board_of(tmp_path, "train/lr") == [(1, 0.125), (2, 0.25)]


def test_a_value_that_is_not_finite_is_null_in_json_and_itself_in_tensorboard(tmp_path):
    monitor = make(tmp_path)
    monitor.add_step(1, {"train/lr": 0.1, "train/grad_norm": math.inf}, losses(math.nan))
    monitor.close()
    assert not {"NaN", "Infinity"} & set((tmp_path / "metrics.jsonl").read_text().replace(",", " ").split())
    (line,) = lines(tmp_path)
    assert line["train/grad_norm"] is None
    assert line["train/loss"] is None
    assert board_of(tmp_path, "train/grad_norm") == [(1, math.inf)]
    assert math.isnan(board_of(tmp_path, "train/loss")[0][1])


# ----------------------------------------------------------------------------------------------- disks that fail


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 kB, which can be filled, and made read-only; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "cogds-test", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


def test_a_full_disk_ends_nothing_and_its_records_are_written_later(small_disk, capsys):
    monitor = make(small_disk)
    monitor.add_step(1, *step_of(1))
    fill(small_disk)
    # More than fits into the last page of either file: some of it is written in part.
    for step in range(2, 60):
        monitor.add_step(step, *step_of(step))
    shown = lines(small_disk)  # whole lines all the while
    assert [line["step"] for line in shown] == list(range(1, len(shown) + 1))
    assert len(shown) < 59
    warnings = capsys.readouterr().err.splitlines()
    # Which one first depends on how full their last pages were.
    assert {line.partition(": cannot")[0].split("/")[-1][:12] for line in warnings} == {"metrics.json", "events.out.t"}
    assert len(warnings) == 2
    assert "No space left on device" in warnings[0]
    (small_disk / "filler").unlink()
    monitor.add_step(60, *step_of(60))
    monitor.close()
    warnings = capsys.readouterr().err.splitlines()
    assert ["is written again" in line for line in warnings] == [True, True]
    assert [line["step"] for line in lines(small_disk)] == list(range(1, 61))
    assert board_of(small_disk, "train/lr") == [(step, step / 8) for step in range(1, 61)]


def test_records_that_a_full_disk_never_took_are_reported_at_the_end(small_disk, capsys):
    monitor = make(small_disk)
    fill(small_disk)
    for step in range(1, 60):
        monitor.add_step(step, *step_of(step))
    monitor.close()
    of_metrics, of_events = capsys.readouterr().err.splitlines()[2:]
    assert f"{small_disk}/metrics.jsonl: the last {59 - len(lines(small_disk))} records" in of_metrics
    assert f"{small_disk}/tensorboard/events" in of_events


def test_a_disk_that_turns_read_only_ends_nothing(small_disk, capsys):
    monitor = make(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    monitor.add_step(1, *step_of(1))
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    monitor.add_step(2, *step_of(2))
    monitor.close()
    assert capsys.readouterr().err.count("Read-only file system") == 2
    assert [line["step"] for line in lines(small_disk)] == [1, 2]
    assert board_of(small_disk, "train/lr") == [(1, 0.125), (2, 0.25)]


@pytest.mark.parametrize("gone", ["tensorboard", "."])
def test_a_missing_folder_is_created_again_and_a_file_in_its_place_reported(tmp_path, gone, capsys):
    output = tmp_path / "run"
    output.mkdir()
    monitor = make(output)
    monitor.add_step(1, *step_of(1))
    shutil.rmtree(output / gone)
    monitor.add_step(2, *step_of(2))
    assert board_of(output, "train/lr") == [(2, 0.25)]
    assert capsys.readouterr().err == ""
    shutil.rmtree(output / gone)
    (output / gone).touch()
    monitor.add_step(3, *step_of(3))
    monitor.close()
    assert f"warning: {output}/tensorboard/events" in capsys.readouterr().err


def test_an_output_without_a_reader_ends_nothing(tmp_path, monkeypatch):
    """The terminal is gone, or the launcher at the other end of the pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    # Line by line, so that nothing is left in its buffer to fail when it is closed.
    pipe = open(writer, "w", buffering=1)  # noqa: SIM115
    with pytest.raises(BrokenPipeError):
        print("a line", file=pipe, flush=True)
    monitor = make(tmp_path)
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(sys, "stderr", pipe)
    monitor.add_step(1, *step_of(1))
    (tmp_path / "tensorboard").rename(tmp_path / "aside")
    (tmp_path / "tensorboard").touch()
    monitor.add_step(2, *step_of(2))
    monitor.close()
    monkeypatch.undo()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    with contextlib.suppress(BrokenPipeError):
        pipe.close()


@pytest.mark.parametrize("bad", ["folder", "bytes"])
def test_metrics_that_cannot_be_kept_are_an_error_before_the_run(tmp_path, bad):
    file = tmp_path / "metrics.jsonl"
    rewind_metrics(file, 3)  # not there: nothing to take over
    assert not list(tmp_path.iterdir())
    if bad == "folder":
        file.mkdir()
        with pytest.raises(UserError, match=str(file)):
            rewind_metrics(file, 3)
        return
    # What a power cut leaves; the last line has all but its end of line.
    file.write_bytes(b'{"step": 1}\n' + bytes(40) + b'\n\xff\xfe\n{"step": []}\n[]\n{"step": 2}')
    rewind_metrics(file, 3)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'

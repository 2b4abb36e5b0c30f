"""Checkpoint folders: writing, finding, verifying and removing them. Resumed runs are tested in tests/dist."""

import collections
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch

from cogds.distributed.world import World
from cogds.engine import checkpoint
from cogds.engine.state import TrainState
from cogds.errors import UserError

ALONE = World(0, 1, 0, 1)
TENSORS = {"weight/a": torch.arange(6.0), "exp_avg/a": torch.zeros(6)}


def save(folder, *steps, keep_last=3, keep_every=None):
    for step in steps:
        state = TrainState({name: tensor + step for name, tensor in TENSORS.items()}, step)
        checkpoint.write(folder, step, state, {"identity": {"seed": 0}}, keep_last, keep_every)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def find_path(folder, resume="auto"):
    """Find a checkpoint, check that it has the state of its step, and return its path."""
    path, header, state = checkpoint.find(folder, resume)
    assert header["step"] == checkpoint.step_of(path)
    assert torch.equal(state.tensors["weight/a"], TENSORS["weight/a"] + header["step"])
    return path


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    assert checkpoint.find(tmp_path, "auto") is None
    save(tmp_path, 5, 10)
    assert (tmp_path / "latest").read_text() == "step-000010\n"
    assert find_path(tmp_path) == tmp_path / "step-000010"
    assert checkpoint.find(tmp_path, "none") is None


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path):
    save(tmp_path, 999_999, 1_000_000)
    assert find_path(tmp_path).name == "step-1000000"


def test_a_users_folder_is_not_a_checkpoint(tmp_path):
    save(tmp_path, 3)
    copies = {"step-000003-2", "step-000003-backup", "step-3", "old-step-000009"}
    for name in copies:
        shutil.copytree(tmp_path / "step-000003", tmp_path / name)
    save(tmp_path, 4, 5, keep_last=1)
    assert find_path(tmp_path).name == "step-000005"
    assert copies <= set(names(tmp_path))
    assert checkpoint.set_aside(tmp_path.parent, tmp_path / "step-000005", 1) is None


def test_a_run_that_started_from_a_checkpoint_continues_from_its_own(tmp_path):
    """The user or SLURM may run the same command again."""
    save(tmp_path / "a", 3)
    start = tmp_path / "a/step-000003"
    assert find_path(tmp_path / "b", str(start)) == start
    save(tmp_path / "b", 4)  # from an earlier run
    assert find_path(tmp_path / "b", str(start)) == start
    header = {"identity": {}, "start": checkpoint.start_point(str(start), {})}
    state = TrainState({name: tensor + 7 for name, tensor in TENSORS.items()}, 7)
    checkpoint.write(tmp_path / "b", 7, state, header, 3, None)
    assert find_path(tmp_path / "b", str(start)) == find_path(tmp_path / "b", "auto") == tmp_path / "b/step-000007"
    assert checkpoint.start_point("auto", header) == header["start"]
    assert checkpoint.start_point("none", {}) == ""


def test_a_checkpoint_has_the_header_and_state_that_were_saved(tmp_path):
    save(tmp_path, 7)
    _, header, state = checkpoint.find(tmp_path, "auto")
    assert header["identity"] == {"seed": 0}
    assert state.num_updates == 7
    assert state.kinds == ["weight", "exp_avg"]
    assert state.weights({"a": torch.bfloat16})["a"].dtype is torch.bfloat16


@pytest.mark.parametrize("keep_last, keep_every, kept", [(2, None, {6, 7}), (1, 3, {3, 6, 7})])
def test_old_checkpoints_are_removed(tmp_path, keep_last, keep_every, kept):
    save(tmp_path, *range(1, 8), keep_last=keep_last, keep_every=keep_every)
    assert set(names(tmp_path)) == {"latest", *map(checkpoint.step_name, kept)}


def test_a_step_saved_again_replaces_its_checkpoint(tmp_path):
    save(tmp_path, 1, 2, 1, keep_last=1)
    assert (tmp_path / "latest").read_text() == "step-000001\n"
    assert find_path(tmp_path, str(tmp_path / "step-000001"))


def test_a_failed_save_does_not_change_the_previous_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == ["latest", "step-000001", "step-000002.tmp"]
    assert find_path(tmp_path).name == "step-000001"
    save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step-000001", "step-000002"]


def test_files_are_flushed_before_they_are_renamed(tmp_path, monkeypatch):
    """This matters only if the power fails. A killed process loses nothing that it has written."""
    save(tmp_path, 1)
    events = []

    def name(path):
        return Path(path).relative_to(tmp_path).as_posix()

    def sync(descriptor, fsync=os.fsync):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        files = filter(Path.is_file, path.iterdir() if path.is_dir() else [path])
        events.append(("sync", name(path), {file.name: file.read_bytes() for file in files}))
        fsync(descriptor)

    def recorded(move):
        return lambda old, new: events.append(("move", name(new), {})) or move(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", recorded(os.rename))
        patch.setattr(os, "replace", recorded(os.replace))
        patch.setattr(os, "fsync", sync)
        save(tmp_path, 2, keep_last=1)
    assert [event[:2] for event in events] == [
        ("sync", "step-000002.tmp/trainable.safetensors"),
        ("sync", "step-000002.tmp/state.json"),
        ("sync", "step-000002.tmp"),  # the names of the two files
        ("move", "step-000002"),
        ("sync", "."),  # the name of the folder
        ("move", "latest"),
        ("move", "step-000001.old.tmp"),  # the previous checkpoint is removed last
    ]
    tensors, state, folder = (content for _, _, content in events[:3])
    final = {path.name: path.read_bytes() for path in (tmp_path / "step-000002").iterdir()}
    assert tensors | state == folder == final  # nothing was written after the flush


def test_incomplete_checkpoints_are_not_found(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-000002/state.json").unlink()
    assert find_path(tmp_path).name == "step-000001"


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def edit_state(folder, **changes):
    header = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(header | changes))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, file",
    [
        (lambda folder: truncate(folder / "trainable.safetensors"), "trainable.safetensors"),
        (lambda folder: flip_bit(folder / "trainable.safetensors"), "trainable.safetensors"),
        (lambda folder: (folder / "trainable.safetensors").unlink(), "trainable.safetensors"),
        (lambda folder: (folder / "state.json").write_text("{"), "state.json"),
        (lambda folder: (folder / "state.json").write_text("[]"), "state.json"),
        (lambda folder: edit_state(folder, num_updates=300), "state.json"),
        (lambda folder: edit_state(folder, step="3"), "state.json"),
        (lambda folder: (folder / "state.json").write_text('{"step": 3, "identity": {}}'), "state.json"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(tmp_path, capsys, damage, file):
    save(tmp_path, 2, 3)
    damage(tmp_path / "step-000003")
    assert find_path(tmp_path).name == "step-000002"
    damaged = tmp_path / "step-000003" / file
    assert capsys.readouterr().err.startswith(f"warning: {damaged}: ")
    with pytest.raises(UserError, match=f"^{damaged}: "):  # no other checkpoint replaces the requested one
        checkpoint.find(tmp_path, str(tmp_path / "step-000003"))
    damage(tmp_path / "step-000002")
    with pytest.raises(UserError, match=r"checkpoint\.resume: all 2 checkpoints"):
        checkpoint.find(tmp_path, "auto")


@pytest.mark.parametrize("name", ["_file_digest", "_header_digest"])
@pytest.mark.parametrize("error", [TypeError("planted"), KeyError("planted"), ValueError("planted")])
def test_a_bug_is_not_damage(tmp_path, monkeypatch, error, name):
    """Otherwise a bug would skip an undamaged checkpoint and resume from an older one."""
    save(tmp_path, 2, 3)

    def fail(_):
        raise error

    monkeypatch.setattr(checkpoint, name, fail)
    with pytest.raises(type(error), match="planted"):
        find_path(tmp_path)


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("write", [lambda obj, file: file.write_bytes(pickle.dumps(obj)), torch.save])
def test_a_pickled_object_is_refused_and_not_opened(tmp_path, write):
    """Even if its digest is correct."""
    save(tmp_path / "runs", 1)
    file = tmp_path / "runs/step-000001/trainable.safetensors"
    write({"weight/a": Harmful(tmp_path / "executed")}, file)
    header = json.loads((file.parent / "state.json").read_text())
    header["files"][file.name] = checkpoint._file_digest(file)
    header["digest"] = checkpoint._header_digest({name: value for name, value in header.items() if name != "digest"})
    (file.parent / "state.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match=str(file)):
        checkpoint.find(tmp_path / "runs", str(file.parent))
    with pytest.raises(UserError, match="all 1 checkpoints"):
        checkpoint.find(tmp_path / "runs", "auto")
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Harmful(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()  # unpickling does create the file


def test_a_wrong_path_is_an_error_and_does_not_start_from_scratch(tmp_path):
    with pytest.raises(UserError, match=r"^checkpoint\.resume: "):
        checkpoint.find(tmp_path, str(tmp_path / "step-000009"))
    save(tmp_path, 4)
    assert find_path(tmp_path / "other", str(tmp_path / "step-000004")) == tmp_path / "step-000004"


def test_a_nearly_full_disk_is_reported_before_writing(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10e9, 8e9, 2e9))
    checkpoint.check_space(tmp_path, 1.9e9)
    with pytest.raises(UserError, match=r"2\.06 GB.* 2\.00 GB"):
        checkpoint.check_space(tmp_path, 2e9)


def test_the_saver_writes_in_the_background(tmp_path):
    saver, may_continue = checkpoint.Saver(), threading.Event()
    assert saver.finish(ALONE) is None
    saver.start(lambda _: (may_continue.wait(10), save(tmp_path, 1))[0])
    assert saver.is_saving
    assert saver.is_busy
    assert checkpoint.find(tmp_path, "auto") is None
    may_continue.set()
    assert saver.finish(ALONE) > 0
    assert find_path(tmp_path).name == "step-000001"


def test_a_failure_in_the_background_is_raised_by_finish():
    def full(_):
        raise OSError(28, "No space left on device")

    saver = checkpoint.Saver()
    saver.start(full, lambda _: pytest.fail("a later phase ran"))
    with pytest.raises(UserError, match=r"^output_dir: .*No space left"):
        saver.finish(ALONE)
    assert not saver.is_saving


def test_a_phase_gets_the_results_of_the_one_before():
    saver, calls = checkpoint.Saver(), []
    saver.start(lambda results: calls.append(results) or "first", lambda results: calls.append(results))
    assert saver.advance(ALONE) is None
    assert saver.is_saving
    assert saver.advance(ALONE) > 0
    assert calls == [[], ["first"]]
    assert saver.advance(ALONE) is None


def test_a_run_from_scratch_keeps_the_earlier_run(tmp_path):
    assert checkpoint.set_aside(tmp_path, None, 0) is None
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(str(number))
        (tmp_path / "run.yaml").touch()
        assert checkpoint.set_aside(tmp_path, None, 0) == tmp_path / f"previous-{number}"
    assert (tmp_path / "previous-1/metrics.jsonl").read_text() == "1"
    assert (tmp_path / "previous-1/run.yaml").exists()


def test_resuming_from_an_earlier_step_keeps_the_later_files(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    save(checkpoints, 1, 2, 3)
    for step in (1, 3):
        (tmp_path / "lora" / checkpoint.step_name(step)).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("lines")
    assert checkpoint.set_aside(tmp_path, checkpoints / "step-000003", 3) is None
    aside = checkpoint.set_aside(tmp_path, checkpoints / "step-000001", 1)
    assert names(aside / "checkpoints") == ["step-000002", "step-000003"]
    assert (aside / "lora/step-000003").is_dir()
    assert (aside / "metrics.jsonl").read_text() == (tmp_path / "metrics.jsonl").read_text() == "lines"
    assert find_path(checkpoints) == checkpoints / "step-000001"


def test_files_of_interrupted_saves_are_removed(tmp_path):
    """At the start of a run, because they may be what fills the disk."""
    checkpoint.remove_all_partial(tmp_path)
    save(tmp_path / "checkpoints", 1)
    for kind in ("checkpoints", "lora", "model", "model_ema"):
        (tmp_path / kind / "step-000002.tmp/transformer").mkdir(parents=True)
    (tmp_path / "previous-1/model/step-000001.tmp").mkdir(parents=True)
    checkpoint.remove_all_partial(tmp_path)
    assert [path.parent.parent.name for path in tmp_path.rglob("*.tmp")] == ["previous-1"]
    assert find_path(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-000001"


def test_starting_from_another_run_moves_all_files(tmp_path):
    save(tmp_path / "a/checkpoints", 1)
    save(tmp_path / "b/checkpoints", 5)
    aside = checkpoint.set_aside(tmp_path / "b", tmp_path / "a/checkpoints/step-000001", 1)
    assert (aside / "checkpoints/step-000005").is_dir()
    assert not (tmp_path / "b/checkpoints").exists()

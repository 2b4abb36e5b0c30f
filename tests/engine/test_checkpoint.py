"""Files and names; that a resumed run is the same run stands in tests/dist."""

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


def found(folder, resume="auto"):
    path, facts, state = checkpoint.find(folder, resume)
    assert facts["step"] == checkpoint.step_of(path)
    assert torch.equal(state.tensors["weight/a"], TENSORS["weight/a"] + facts["step"])
    return path


def test_the_newest_complete_one_is_found(tmp_path):
    assert checkpoint.find(tmp_path, "auto") is None
    save(tmp_path, 5, 10)
    assert (tmp_path / "latest").read_text() == "step-000010\n"
    assert found(tmp_path) == tmp_path / "step-000010"
    assert checkpoint.find(tmp_path, "none") is None


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path):
    save(tmp_path, 999_999, 1_000_000)
    assert found(tmp_path).name == "step-1000000"


def test_a_folder_that_a_user_made_is_no_checkpoint(tmp_path):
    save(tmp_path, 3)
    for name in ("step-000003-2", "step-000003-backup", "step-3", "old-step-000009"):
        shutil.copytree(tmp_path / "step-000003", tmp_path / name)
    save(tmp_path, 4, 5, keep_last=1)
    assert found(tmp_path).name == "step-000005"
    assert {"step-000003-2", "step-000003-backup", "step-3", "old-step-000009"} <= set(names(tmp_path))
    assert checkpoint.set_aside(tmp_path.parent, tmp_path / "step-000005", 1) is None


def test_a_run_that_was_told_where_to_begin_goes_on_from_its_own(tmp_path):
    """The same command is given again, by its user or by SLURM: it must not begin again."""
    save(tmp_path / "a", 3)
    start = tmp_path / "a/step-000003"
    assert found(tmp_path / "b", str(start)) == start
    save(tmp_path / "b", 4)  # of an earlier run
    assert found(tmp_path / "b", str(start)) == start
    about = {"identity": {}, "start": checkpoint.start_point(str(start), {})}
    state = TrainState({name: tensor + 7 for name, tensor in TENSORS.items()}, 7)
    checkpoint.write(tmp_path / "b", 7, state, about, 3, None)
    assert found(tmp_path / "b", str(start)) == found(tmp_path / "b", "auto") == tmp_path / "b/step-000007"
    assert checkpoint.start_point("auto", about) == about["start"]
    assert checkpoint.start_point("none", {}) == ""


def test_what_was_saved_comes_back(tmp_path):
    save(tmp_path, 7)
    _, facts, state = checkpoint.find(tmp_path, "auto")
    assert facts["identity"] == {"seed": 0}
    assert state.num_updates == 7
    assert state.kinds == ["weight", "exp_avg"]
    assert state.weights({"a": torch.bfloat16})["a"].dtype is torch.bfloat16


def test_old_ones_are_pruned_after_the_new_one_is_there(tmp_path):
    save(tmp_path, 1, 2, 3, keep_last=2)
    assert names(tmp_path) == ["latest", "step-000002", "step-000003"]


def test_some_are_kept_for_good(tmp_path):
    save(tmp_path, *range(1, 8), keep_last=1, keep_every=3)
    assert names(tmp_path) == ["latest", "step-000003", "step-000006", "step-000007"]


def test_a_step_saved_again_replaces_itself(tmp_path):
    save(tmp_path, 1, 2, 1, keep_last=1)
    assert (tmp_path / "latest").read_text() == "step-000001\n"
    assert found(tmp_path, str(tmp_path / "step-000001"))


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == ["latest", "step-000001", "step-000002.tmp"]
    assert found(tmp_path).name == "step-000001"
    save(tmp_path, 2)  # what the failed one left is no obstacle
    assert names(tmp_path) == ["latest", "step-000001", "step-000002"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """No kill shows it, since what was written stays in memory: it is for when the power fails."""
    save(tmp_path, 1)
    done = []

    def name(path):
        return Path(path).relative_to(tmp_path).as_posix()

    def sync(handle, right=os.fsync):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        content = {one.name: one.read_bytes() for one in (path.iterdir() if path.is_dir() else [path]) if one.is_file()}
        done.append(("sync", name(path), content))
        right(handle)

    def moving(right):
        return lambda old, new: done.append(("move", name(new))) or right(old, new)

    with monkeypatch.context() as patch:
        for call in ("rename", "replace"):
            patch.setattr(os, call, moving(getattr(os, call)))
        patch.setattr(os, "fsync", sync)
        save(tmp_path, 2, keep_last=1)
    assert [event[:2] for event in done] == [
        ("sync", "step-000002.tmp/trainable.safetensors"),
        ("sync", "step-000002.tmp/state.json"),
        ("sync", "step-000002.tmp"),  # the names of the two
        ("move", "step-000002"),
        ("sync", "."),  # its own name
        ("move", "latest"),
        ("move", "step-000001.old.tmp"),  # the one before goes last
    ]
    tensors, state, folder = (content for _, _, content in done[:3])
    final = {path.name: path.read_bytes() for path in (tmp_path / "step-000002").iterdir()}
    assert tensors | state == folder == final  # nothing was written after it was synced


def test_incomplete_ones_are_not_found(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-000002/state.json").unlink()
    assert found(tmp_path).name == "step-000001"


def flip(file, place=-5):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def edit_state(folder, **changes):
    facts = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(facts | changes))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda folder: truncate(folder / "trainable.safetensors"), "bytes instead of"),
        (lambda folder: flip(folder / "trainable.safetensors"), "other content than was written"),
        (lambda folder: (folder / "trainable.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "state.json").write_text("{"), "state.json is damaged"),
        (lambda folder: (folder / "state.json").write_text("[]"), "names no files"),
        (lambda folder: edit_state(folder, num_updates=300), "is not what was written"),
        (lambda folder: edit_state(folder, step="3"), "is not what was written"),
        (lambda folder: (folder / "state.json").write_text('{"step": 3, "identity": {}}'), "names no files"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_taken(tmp_path, capsys, damage, says):
    save(tmp_path, 2, 3)
    damage(tmp_path / "step-000003")
    assert found(tmp_path).name == "step-000002"
    said = capsys.readouterr().err
    assert said.startswith("warning: ")
    assert says in said
    assert "step-000003" in said
    with pytest.raises(UserError, match=says):  # one that was asked for by name is not replaced by another
        checkpoint.find(tmp_path, str(tmp_path / "step-000003"))
    damage(tmp_path / "step-000002")
    with pytest.raises(UserError, match=r"not one of the 2 checkpoints in .* is sound.*resume=none starts afresh"):
        checkpoint.find(tmp_path, "auto")


class Harmful:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


@pytest.mark.parametrize("write", [lambda obj, file: file.write_bytes(pickle.dumps(obj)), torch.save])
def test_a_pickled_object_is_refused_and_not_opened(tmp_path, write):
    """Even where its digest is right: somebody may have written both."""
    save(tmp_path / "runs", 1)
    file = tmp_path / "runs/step-000001/trainable.safetensors"
    write({"weight/a": Harmful(tmp_path / "executed")}, file)
    facts = json.loads((file.parent / "state.json").read_text())
    facts["files"][file.name] = checkpoint._fingerprint(file)
    facts["digest"] = checkpoint._digest({name: value for name, value in facts.items() if name != "digest"})
    (file.parent / "state.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"is not a safetensors file .* least of all pickled objects"):
        checkpoint.find(tmp_path / "runs", str(file.parent))
    with pytest.raises(UserError, match="not one of the 1 checkpoints"):
        checkpoint.find(tmp_path / "runs", "auto")
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Harmful(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()  # it would have been


def test_a_wrong_path_is_an_error_not_a_fresh_start(tmp_path):
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.find(tmp_path, str(tmp_path / "step-000009"))
    save(tmp_path, 4)
    assert found(tmp_path / "other", str(tmp_path / "step-000004")) == tmp_path / "step-000004"


def test_a_nearly_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10e9, 8e9, 2e9))
    checkpoint.check_space(tmp_path, 1.9e9)
    with pytest.raises(UserError, match=r"nearly full: .* need 2.06 GB, 2.00 GB are free: make room"):
        checkpoint.check_space(tmp_path, 2e9)


def test_the_saver_writes_behind_the_trainings_back(tmp_path):
    saver, may_go_on = checkpoint.Saver(), threading.Event()
    assert saver.finish(ALONE) is None
    saver.start(lambda: (may_go_on.wait(10), save(tmp_path, 1)))
    assert not saver.done
    assert checkpoint.find(tmp_path, "auto") is None
    may_go_on.set()
    assert saver.finish(ALONE) > 0
    assert found(tmp_path).name == "step-000001"


def test_a_save_that_fails_behind_its_back_is_known():
    def full():
        raise OSError(28, "No space left on device")

    saver = checkpoint.Saver()
    saver.start(full)
    with pytest.raises(UserError, match=r"saving failed .*No space left.*goes on from the checkpoint before"):
        saver.finish(ALONE)
    assert not saver.done


def test_a_fresh_start_keeps_the_earlier_run(tmp_path):
    assert checkpoint.set_aside(tmp_path, None, 0) is None
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(str(number))
        (tmp_path / "run.yaml").touch()
        assert checkpoint.set_aside(tmp_path, None, 0) == tmp_path / f"previous-{number}"
    assert (tmp_path / "previous-1/metrics.jsonl").read_text() == "1"
    assert (tmp_path / "previous-1/run.yaml").exists()


def test_going_back_keeps_what_lies_past_the_step(tmp_path):
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
    assert found(checkpoints) == checkpoints / "step-000001"


def test_resuming_from_another_run_sets_ones_own_aside(tmp_path):
    save(tmp_path / "a/checkpoints", 1)
    save(tmp_path / "b/checkpoints", 5)
    aside = checkpoint.set_aside(tmp_path / "b", tmp_path / "a/checkpoints/step-000001", 1)
    assert (aside / "checkpoints/step-000005").is_dir()
    assert not (tmp_path / "b/checkpoints").exists()

"""Files and names; that a resumed run is the same run stands in tests/dist."""

from pathlib import Path

import pytest

from cogds.errors import UserError
from cogds.runtime import checkpoint
from cogds.runtime.world import World

ALONE = World(0, 1, 0, 1)


class Engine:
    """Writes one file where DeepSpeed writes many."""

    def __init__(self, fails=False):
        self.fails = fails

    def save_checkpoint(self, folder, tag, save_latest, exclude_frozen_parameters):
        assert not save_latest
        assert exclude_frozen_parameters
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "weights").write_text("x")
        if self.fails:
            raise OSError("disk full")


def save(folder, *steps, keep_last=3):
    for step in steps:
        checkpoint.save(Engine(), ALONE, folder, step, {"step": step, "identity": {"seed": 0}}, keep_last)


def test_the_newest_complete_one_is_found(tmp_path):
    assert checkpoint.find(tmp_path, "auto") is None
    save(tmp_path, 5, 10)
    assert (tmp_path / "latest").read_text() == "step-000010\n"
    assert checkpoint.find(tmp_path, "auto") == tmp_path / "step-000010"
    assert checkpoint.read_state(tmp_path / "step-000010")["step"] == 10
    assert checkpoint.find(tmp_path, "none") is None


def test_old_ones_are_pruned_after_the_new_one_is_there(tmp_path):
    save(tmp_path, 1, 2, 3, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000002", "step-000003"]


def test_a_save_that_fails_leaves_the_one_before(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(Engine(fails=True), ALONE, tmp_path, 2, {"step": 2}, 1)
    assert checkpoint.find(tmp_path, "auto") == tmp_path / "step-000001"
    save(tmp_path, 2)  # what the failed one left is no obstacle
    assert checkpoint.find(tmp_path, "auto") == tmp_path / "step-000002"


def test_a_step_saved_again_replaces_itself(tmp_path):
    save(tmp_path, 1, 2, 1, keep_last=1)
    assert (tmp_path / "latest").read_text() == "step-000001\n"
    assert (tmp_path / "step-000001/weights").exists()


def test_incomplete_ones_are_not_found(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-000002/state.json").unlink()
    assert checkpoint.find(tmp_path, "auto") == tmp_path / "step-000001"


def test_a_wrong_path_is_an_error_not_a_fresh_start(tmp_path):
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.find(tmp_path, str(tmp_path / "step-000009"))
    save(tmp_path, 4)
    assert checkpoint.find(tmp_path / "other", str(tmp_path / "step-000004")) == tmp_path / "step-000004"


def test_a_damaged_state_is_named(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-000001/state.json").write_text("{")
    with pytest.raises(UserError, match=r"state.json is damaged"):
        checkpoint.read_state(tmp_path / "step-000001")


def test_every_changed_field_is_named(tmp_path):
    saved = {"step": 1, "identity": {"rank": 4, "seed": 0, "zero_stage": 2}}
    checkpoint.save(Engine(), ALONE, tmp_path, 1, saved, 3)
    with pytest.raises(UserError, match=r"rank: 4 then, 8 now; seed: 0 then, 1 now\.") as error:
        checkpoint.check_matching(tmp_path / "step-000001", saved, {"rank": 8, "seed": 1, "zero_stage": 2})
    assert "zero_stage" not in str(error.value)


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
    assert sorted(path.name for path in (aside / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert (aside / "lora/step-000003").is_dir()
    assert (aside / "metrics.jsonl").read_text() == (tmp_path / "metrics.jsonl").read_text() == "lines"
    assert checkpoint.find(checkpoints, "auto") == checkpoints / "step-000001"


def test_resuming_from_another_run_sets_ones_own_aside(tmp_path):
    save(tmp_path / "a/checkpoints", 1)
    save(tmp_path / "b/checkpoints", 5)
    aside = checkpoint.set_aside(tmp_path / "b", tmp_path / "a/checkpoints/step-000001", 1)
    assert (aside / "checkpoints/step-000005").is_dir()
    assert not (tmp_path / "b/checkpoints").exists()


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path):
    save(tmp_path, 999_999, 1_000_000)
    (tmp_path / "latest").unlink()
    assert checkpoint.find(tmp_path, "auto").name == "step-1000000"


def test_a_checkpoint_that_cannot_be_loaded_is_named_with_the_one_before(tmp_path):
    save(tmp_path, 1, 2)

    class Torn(Engine):
        def load_checkpoint(self, *_, **__):
            raise RuntimeError("PytorchStreamReader failed\nmore")

    with pytest.raises(UserError, match=r"step-000002 cannot be loaded .*resume=.*step-000001"):
        checkpoint.load(Torn(), tmp_path / "step-000002")

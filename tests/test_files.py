import os
import time

import pytest

from cogds.errors import UserError
from cogds.files import (
    ABANDONED_AFTER_S,
    check_creatable,
    is_abandoned,
    make_folders,
    process_tag,
    remove_abandoned,
    whole_file,
    whole_folder,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_that_cannot_be_created_is_named_by_its_key(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output_dir: "):
        make_folders({"output_dir": str(tmp_path / "file/run")})
    with pytest.raises(UserError, match=r"^data\.cache_dir: "):
        make_folders({"output_dir": str(tmp_path / "run"), "data.cache_dir": str(tmp_path / "file")})


def test_a_file_appears_whole(tmp_path):
    with whole_file(tmp_path / "new/a.json") as partial:
        partial.write_text("1")
        assert partial.suffix == ".json"
        assert not (tmp_path / "new/a.json").exists()
    assert (tmp_path / "new/a.json").read_text() == "1"
    assert names(tmp_path / "new") == ["a.json"]


def test_a_failed_write_keeps_the_old_file_and_removes_the_temporary_one(tmp_path):
    (tmp_path / "a").write_text("old")

    def write_half():
        with whole_file(tmp_path / "a") as partial:
            partial.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_the_first_of_two_folders_with_the_same_name_is_kept(tmp_path):
    with whole_folder(tmp_path / "a") as slow, whole_folder(tmp_path / "a") as fast:
        (slow / "x").write_text("slow")
        (fast / "x").write_text("fast")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a/x").read_text() == "fast"


def test_a_failed_folder_is_removed(tmp_path):
    with pytest.raises(ValueError, match="no"), whole_folder(tmp_path / "a"):
        raise ValueError("no")
    assert names(tmp_path) == []


def test_temporary_files_of_ended_processes_are_removed(tmp_path):
    host = process_tag().split("@")[0]
    ended, old = tmp_path / f"a.{host}@999999999-1.tmp", tmp_path / "b.00000000@1-1.tmp.json"
    recent, own = tmp_path / "c.00000000@1-1.tmp", tmp_path / f"d.{process_tag()}-1.tmp"
    other = tmp_path / f"e.{host}@999999999-1.json"  # not a temporary file
    for path in (ended, old, recent, own, other):
        path.touch()
    day_ago = time.time() - ABANDONED_AFTER_S - 1
    os.utime(old, (day_ago, day_ago))
    assert [is_abandoned(path) for path in (ended, old, recent, own, other)] == [True, True, False, False, True]
    remove_abandoned(tmp_path)
    assert names(tmp_path) == sorted(path.name for path in (recent, own, other))
    remove_abandoned(tmp_path / "nowhere")


def test_a_folder_can_be_checked_without_creating_it(tmp_path):
    check_creatable("output_dir", str(tmp_path / "a/b"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output_dir: "):
        check_creatable("output_dir", str(tmp_path / "file/b"))

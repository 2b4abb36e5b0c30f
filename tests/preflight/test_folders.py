"""Marker files find folders that the ranks do not share."""

import threading
from pathlib import Path

from cogds.data.storage.access import is_folder
from cogds.preflight.findings import FAIL, OK
from cogds.preflight.folders import (
    assess_folders,
    create_folders,
    find_unseen_ranks,
    inspect_folders,
    marker_path,
    remove_markers,
)


def check_folders(folders_of_rank0, *folders_of_others):
    """Run the whole check for ranks with these folders, and delete the marker files. Returns the findings of rank 0."""
    all_folders = [folders_of_rank0, *folders_of_others]
    errors = create_folders(folders_of_rank0, "t")
    keys = [key for key in folders_of_rank0 if key not in errors]
    results = [
        {"rank": rank, "host": f"n{rank}", **inspect_folders({key: folders[key] for key in keys}, "t", rank, 0.0)}
        for rank, folders in enumerate(all_folders)
    ]
    unseen = find_unseen_ranks({key: folders_of_rank0[key] for key in keys}, "t", results, 0.0)
    for rank, folders in enumerate(all_folders):
        remove_markers(folders, "t", range(len(all_folders)) if rank == 0 else [rank])
    return assess_folders(results, errors, unseen)


def test_shared_folders_are_created_and_left_empty(tmp_path):
    shared = {"output_dir": str(tmp_path / "new/out"), "data.cache_dir": str(tmp_path / "cache")}
    findings = check_folders(shared, shared, shared)
    assert [finding.level for finding in findings] == [OK, OK]
    assert [finding.text.partition(":")[0] for finding in findings] == ["output_dir", "data.cache_dir"]
    assert "3 ranks" in findings[0].text
    assert [*(tmp_path / "new/out").iterdir(), *(tmp_path / "cache").iterdir()] == []


def test_different_and_missing_folders_name_the_rank(tmp_path):
    (tmp_path / "b").mkdir()
    different, missing = check_folders(*({"output_dir": str(tmp_path / name)} for name in ("a", "a", "b", "c")))
    assert (different.level, missing.level) == (FAIL, FAIL)
    assert different.text.startswith("output_dir: ")
    for part in ("rank 2 (n2)", f"{tmp_path}/b", f"{tmp_path}/a"):
        assert part in different.text
    for part in ("rank 3 (n3)", f"{tmp_path}/c", f"{tmp_path}/a"):
        assert part in missing.text
    # Nothing is created or written on ranks that do not share the folder.
    assert not (tmp_path / "c").exists()
    assert list((tmp_path / "b").iterdir()) == []


def test_a_marker_that_rank_0_does_not_see_fails(tmp_path):
    """The folder of that rank may be a copy or a snapshot."""
    shared = {"output_dir": str(tmp_path)}
    assert create_folders(shared, "t") == {}
    results = [{"rank": rank, "host": "n1", **inspect_folders(shared, "t", rank, 0.0)} for rank in (0, 1)]
    Path(marker_path(tmp_path, "t", 1)).unlink()
    unseen = find_unseen_ranks(shared, "t", results, 0.0)
    assert unseen == {"output_dir": [1]}
    (finding,) = assess_folders(results, {}, unseen)
    assert finding.level == FAIL
    assert "rank 1 (n1)" in finding.text


def test_a_folder_that_cannot_be_created_fails(tmp_path):
    (tmp_path / "file").touch()
    folders = {"output_dir": str(tmp_path / "file/out"), "data.cache_dir": str(tmp_path / "cache")}
    failed, sound = check_folders(folders, folders)
    assert (failed.level, sound.level) == (FAIL, OK)
    assert failed.text.startswith("output_dir: ")
    assert sound.text.startswith("data.cache_dir: ")


def test_a_late_marker_is_awaited(tmp_path):
    shared = {"output_dir": str(tmp_path)}
    timer = threading.Timer(0.3, lambda: create_folders(shared, "t"))
    timer.start()
    state = inspect_folders(shared, "t", 1, 30.0)["folders"]["output_dir"]
    timer.join()
    assert state["is_marker_visible"]


def test_a_folder_at_a_url(s3):
    root = s3.new_bucket()
    shared = {"data.cache_dir": f"{root}/cache"}
    (finding,) = check_folders(shared, shared)
    assert (finding.level, finding.text) == (OK, f"data.cache_dir: {root}/cache, the same on 2 ranks")
    assert not is_folder(f"{root}/cache")  # nothing is left
    (finding,) = check_folders(shared, {"data.cache_dir": "s3://no-such-bucket/cache"})
    assert finding.level == FAIL
    assert "rank 1 (n1): cannot write to s3://no-such-bucket/cache" in finding.text
    (finding,) = check_folders({"data.cache_dir": "s3://no-such-bucket/cache"})
    assert finding.level == FAIL
    assert finding.text.startswith("data.cache_dir: cannot write to s3://no-such-bucket/cache")

"""Digests: of the content that was surveyed, and of no other."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cogds.data.manifest import file_digests as contents
from cogds.data.manifest import scan_state as journal
from cogds.data.manifest import table as manifest
from cogds.data.manifest.scan_state import ALONE
from cogds.data.video.media import write_video
from tests.data.surveyed import leftovers, names_of, rows_of_list, survey


def test_digests_are_of_the_content(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "manifest.parquet"
    survey(folder, file)
    contents.fill_digests(file)
    first = [row["digest"] for row in manifest.read(file).to_pylist()]
    assert first[0] == first[1] == first[2] != first[3]
    write_video(folder / "b.mp4", np.ones((7, 32, 48, 3), np.uint8), 10)
    rows = survey(folder, file)
    assert [row["digest"] for row in rows] == [first[0], None, first[2], first[3]]
    (folder / "c.mp4").write_bytes(b"other")  # after the survey, before the digests
    (folder / "b.mp4").unlink()
    contents.fill_digests(file)
    rows = manifest.read(file).to_pylist()
    assert rows[1]["reason"] == "file missing: the file does not exist"
    assert names_of(rows, "ok") == ["a.mp4", "c.mp4", "d.png"]  # c has the digest of what was surveyed
    os.utime(folder / "c.mp4", ns=(5, 5))
    rows = survey(folder, file)
    assert rows[1]["reason"].startswith("cannot be opened: ")


def test_a_digest_counts_only_for_what_was_digested(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "manifest.parquet"
    survey(folder, file)
    contents.fill_digests_share(contents.fill_digests_begin(file), ALONE)  # and killed
    content = bytearray((folder / "b.mp4").read_bytes())
    content[-1] ^= 1
    (folder / "b.mp4").write_bytes(content)  # the same size, another time
    survey(folder, file)
    assert [row["digest"] is None for row in manifest.read(file).to_pylist()] == [False, True, False, False]
    contents.fill_digests(file)
    digests = [row["digest"] for row in manifest.read(file).to_pylist()]
    assert len(set(digests)) == 3
    assert digests[0] == digests[2] != digests[1]


def test_a_file_that_changes_before_its_digest_is_unusable(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "manifest.parquet"
    survey(folder, file)
    os.utime(folder / "c.mp4", ns=(5, 5))
    contents.fill_digests(file)
    row = manifest.read(file).to_pylist()[2]
    assert (row["status"], row["reason"].split(":")[0]) == ("unusable", "file changed")
    survey(folder, file)
    contents.fill_digests(file)
    assert manifest.read(file)["digest"].null_count == 0


def test_digests_of_a_killed_run_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    monkeypatch.setattr(journal, "JOURNAL_FILES", 1)
    file = tmp_path / "manifest.parquet"
    survey(folder, file)
    contents.fill_digests_share(contents.fill_digests_begin(file), (0, 2))
    # Both ways to go on: with the digests, and with another survey in between.
    copy = tmp_path / "copy.parquet"
    shutil.copy(file, copy)
    shutil.copytree(tmp_path / "manifest.parquet.work", tmp_path / "copy.parquet.work")
    opened.clear()
    survey(folder, copy)
    assert opened == []
    assert manifest.read(copy)["digest"].null_count == 2
    job = contents.fill_digests_begin(file)
    assert job.num_files == 2
    contents.fill_digests_share(job, ALONE)
    contents.fill_digests_finish(job)
    assert manifest.read(file)["digest"].null_count == 0


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_ranks_share_the_files(folder: Path, tmp_path: Path, num_ranks: int) -> None:
    file = tmp_path / "manifest.parquet"
    survey(folder, file)
    job = contents.fill_digests_begin(file)
    assert sum(contents.fill_digests_share(job, (rank, num_ranks)) for rank in range(num_ranks)) == 4
    contents.fill_digests_finish(job)
    assert manifest.read(file)["digest"].null_count == 0
    assert leftovers(file) == ["clips"]


@pytest.mark.parametrize("rows_at_once", [2, 100])
def test_each_file_that_cannot_be_digested_costs_the_rows_that_have_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(manifest, "ROWS_AT_ONCE", rows_at_once)
    shutil.copy(folder / "d.png", folder / "e.png")
    pairs = [("a.mp4", "d.png"), ("b.mp4", None), ("c.mp4", "e.png"), ("a.mp4", "e.png"), ("d.png", None)]
    rows: list[dict] = [{"path": str(folder / clip), "image": image and str(folder / image)} for clip, image in pairs]
    rows[4]["kind"] = "image"
    file = tmp_path / "manifest.parquet"
    assert names_of(rows_of_list(tmp_path, file, rows), "unusable") == []
    (folder / "b.mp4").unlink()
    os.utime(folder / "e.png", ns=(5, 5))
    contents.fill_digests(file)
    found = manifest.read(file).to_pylist()
    image = "conditioning image unusable: file changed"
    for row, start in zip(found, [None, "file missing: ", image, image, None], strict=True):
        assert row["reason"] == start or row["reason"].startswith(start)
    assert [(row["digest"] is None, row["image_digest"] is None) for row in found] == [
        (False, False), (True, True), (False, True), (False, True), (False, True)
    ]  # fmt: skip
    assert found[0]["image_digest"] == found[4]["digest"] != found[0]["digest"] == found[2]["digest"]

"""The scan: which files are opened again, digests, sharing by ranks, and many batches."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from cogds.data.layouts import parts as parts_module
from cogds.data.manifest import scan as scan_module
from cogds.data.manifest import scan_state
from cogds.data.manifest import table as table_module
from cogds.data.manifest.scan import finish_scan, scan_share
from cogds.data.manifest.scan_state import read_entries, remove_state
from cogds.data.manifest.table import DataSet, read_manifest, read_skipped, write_manifest
from cogds.data.storage.location import display_name
from cogds.data.video.media import DecodeError, VideoInfo, write_video
from cogds.data.video.probe_task import ProbeTask, probe_file
from tests.data.scanned import listed, names_beside, names_of, rows_of_list, scan_folder, scan_sets


def test_only_new_and_changed_files_are_opened(folder: Path, tmp_path: Path, opened: list[str], clip: Path) -> None:
    file = tmp_path / "manifest.parquet"
    first = scan_folder(folder, file)
    assert opened == ["a.mp4", "b.mp4", "c.mp4", "d.png"]
    opened.clear()
    (folder / "a.txt").write_text("another caption")
    second = scan_folder(folder, file)
    assert opened == []
    assert second == [first[0] | {"caption": "another caption"}, *first[1:]]
    shutil.copy(clip, folder / "e.mp4")
    write_video(folder / "b.mp4", np.zeros((7, 32, 48, 3), np.uint8), 10)
    rows = scan_folder(folder, file)
    assert opened == ["b.mp4", "e.mp4"]
    assert [row["frames"] for row in rows] == [5, 7, 5, 1, 5]


def test_digests_follow_the_content(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "manifest.parquet"
    first = [row["digest"] for row in scan_folder(folder, file)]
    assert first[0] == first[1] == first[2] != first[3]
    content = bytearray((folder / "b.mp4").read_bytes())
    content[-1] ^= 1
    (folder / "b.mp4").write_bytes(content)  # of the same size, at another time
    second = [row["digest"] for row in scan_folder(folder, file)]
    assert second[1] not in (None, first[1])
    assert [second[row] == first[row] for row in (0, 2, 3)] == [True] * 3


def test_files_without_a_digest_are_scanned_again(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    """cogds 0.1 wrote the digests in a later step."""
    file = tmp_path / "manifest.parquet"
    rows = scan_folder(folder, file)
    digests = pa.array([None, *(row["digest"] for row in rows[1:])], pa.binary(16))
    table = read_manifest(file)
    table = table.set_column(table.column_names.index("digest"), table.schema.field("digest"), digests)
    write_manifest(file, table.to_batches())
    opened.clear()
    assert scan_folder(folder, file) == rows
    assert opened == ["a.mp4"]


def test_a_manifest_of_cogds_0_2_is_updated_without_opening_files(
    folder: Path, tmp_path: Path, opened: list[str]
) -> None:
    """It has one caption per clip."""
    file = tmp_path / "manifest.parquet"
    rows = scan_folder(folder, file)
    pq.write_table(read_manifest(file).drop_columns(["more_captions"]), file)
    opened.clear()
    assert scan_folder(folder, file) == rows
    assert opened == []


def test_a_file_that_changes_while_it_is_scanned_is_unusable_until_the_next_scan(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(task: ProbeTask) -> VideoInfo:
        properties = probe_file(task)
        if task.path.endswith("b.mp4"):
            os.utime(task.path, ns=(5, 5))
        if task.path.endswith("c.mp4"):
            os.unlink(task.path)
        return properties

    file = tmp_path / "manifest.parquet"
    shutil.copy(folder / "d.png", folder / "e.png")
    (tmp_path / "c.mp4").write_bytes((folder / "c.mp4").read_bytes())
    lines = [
        {"path": str(folder / "a.mp4"), "image": str(folder / "e.png")},
        {"path": str(folder / "b.mp4")},
        {"path": str(folder / "c.mp4")},
    ]
    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "probe_file", probe)
        rows = rows_of_list(tmp_path, file, lines)
    assert [row["status"] for row in rows] == ["ok", "unusable", "unusable"]
    assert [row["reason"].split(":")[0] for row in rows[1:]] == ["file changed", "file missing"]
    (tmp_path / "c.mp4").rename(folder / "c.mp4")
    rows = rows_of_list(tmp_path, file, lines)
    assert names_of(rows, "unusable") == []
    assert all(row["digest"] for row in rows)


def test_unusable_files_are_opened_again_if_they_change_or_retry_failed_is_set(
    folder: Path, tmp_path: Path, opened: list[str], clip: Path
) -> None:
    file = tmp_path / "manifest.parquet"
    (folder / "b.mp4").write_bytes(b"")
    rows = scan_folder(folder, file)
    assert rows[1]["reason"].startswith("empty file: ")
    opened.clear()
    assert scan_folder(folder, file) == rows
    assert opened == []
    assert scan_folder(folder, file, retry_failed=True) == rows
    assert opened == ["b.mp4"]
    opened.clear()
    shutil.copy(clip, folder / "b.mp4")
    assert names_of(scan_folder(folder, file), "unusable") == []
    assert opened == ["b.mp4"]


def test_a_file_that_was_away_is_not_opened_again(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    file = tmp_path / "manifest.parquet"
    lines = [{"path": str(folder / f"{name}.mp4"), "text": "x"} for name in "ab"]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first = scan_folder(tmp_path / "l.jsonl", file)
    for _ in range(2):
        os.rename(folder / "a.mp4", tmp_path / "away.mp4")
        rows = scan_folder(tmp_path / "l.jsonl", file)
        assert rows[0]["reason"].startswith("file missing: ")
        assert names_of(rows, "ok") == ["b.mp4"]
        os.rename(tmp_path / "away.mp4", folder / "a.mp4")
    opened.clear()
    assert scan_folder(tmp_path / "l.jsonl", file) == first
    assert opened == []


def test_several_data_sets(folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [str(folder / "a.mp4")], "words": ["another caption"]}), tmp_path / "t.parquet")
    sets = [DataSet(str(folder)), DataSet(str(tmp_path / "t.parquet"), {"path": "url", "caption": "words"})]
    rows = scan_sets(sets, tmp_path / "m.parquet")
    assert [row["set"] for row in rows] == [0, 0, 0, 0, 1]
    assert rows[4]["caption"] == "another caption"


@pytest.mark.parametrize("num_ranks", [2, 7])
def test_ranks_share_the_files(folder: Path, tmp_path: Path, num_ranks: int, opened: list[str]) -> None:
    by_one_rank = scan_folder(folder, tmp_path / "one_rank.parquet")
    opened.clear()
    file = tmp_path / "shared.parquet"
    scan = listed([DataSet(str(folder))], file, num_ranks)
    assert scan.num_files == 4
    assert sum(scan_share(scan, (rank, num_ranks), 0) for rank in range(num_ranks)) == 4
    assert sorted(opened) == ["a.mp4", "b.mp4", "c.mp4", "d.png"]
    finish_scan(scan)
    assert read_manifest(file).to_pylist() == by_one_rank
    assert names_beside(file) == ["clips", "one_rank.parquet"]


def write_tar(file: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_tars_and_nested_folders_are_listed_by_all_ranks(
    tmp_path: Path, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order does not depend on the number of ranks, nor on how the listing is divided."""
    monkeypatch.setattr(scan_module, "probe_file", lambda _: VideoInfo(5, 10.0, 16, 16, 0.5))
    monkeypatch.setattr(parts_module, "CLIPS_PER_PART", 2)
    data = tmp_path / "data"
    for name in ("a.mp4", "b/0.mp4", "b/c/1.mp4", "b/c/2.mp4", "b/d/3.mp4", "e.mp4", "f.mp4", "g.mp4"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(name.encode())
        (data / name).with_suffix(".txt").write_text(f"caption of {name}")
    (data / "b/notes.md").write_text("x")
    write_tar(
        data / "b/z.tar",
        {
            "1.json": b'{"caption": ["first", "second"]}',
            "1.mp4": b"video 1",
            "1.jpg": b"poster",
            "2.txt": b"\xff",
            "2.mp4": b"video 2",
            "3.jpg": b"image",
            "sub/4.x.y.mp4": b"video 4",
            "sub/4.txt": b" four ",
            "readme": b"",
        },
    )
    scan = listed([DataSet(str(data))], tmp_path / "m.parquet", num_ranks)
    assert scan.skipped == {".md file": 1, "poster image of a video": 1, "file without a suffix": 1}
    for rank in range(num_ranks):
        scan_share(scan, (rank, num_ranks), 0)
    finish_scan(scan)
    rows = read_manifest(tmp_path / "m.parquet").to_pylist()
    names = [display_name(row["path"]).removeprefix(f"{data}/") for row in rows]
    assert names == [
        *("a.mp4", "b/0.mp4", "b/c/1.mp4", "b/c/2.mp4", "b/d/3.mp4"),
        *("b/z.tar/1.mp4", "b/z.tar/2.mp4", "b/z.tar/3.jpg", "b/z.tar/sub/4.x.y.mp4", "e.mp4", "f.mp4", "g.mp4"),
    ]
    in_tar = rows[5:9]
    assert [row["caption"] for row in in_tar] == ["first", None, None, "four"]
    assert "cannot be read as UTF-8" in in_tar[1]["reason"]
    assert [row["kind"] for row in in_tar] == ["video", "video", "image", "video"]
    contents = [b"video 1", b"video 2", b"image", b"video 4"]
    assert [row["digest"] for row in in_tar] == [hashlib.blake2b(text, digest_size=16).digest() for text in contents]
    assert [row["size"] for row in in_tar] == list(map(len, contents))
    (data / "b/z.tar").write_bytes((data / "b/z.tar").read_bytes())  # only its time changes
    assert scan_share(listed([DataSet(str(data))], tmp_path / "m.parquet"), (0, 1), 0) == 4


def probe_by_name(task: ProbeTask) -> VideoInfo:
    """Instead of `probe_file`: a video with as many frames as its name says."""
    number = int(Path(task.path).stem)
    if not number:
        raise DecodeError("the file is empty (0 bytes)")
    return VideoInfo(number, 10.0, 16, 16, number / 10)


def test_many_rows_in_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order and each file's own properties are right across the borders of small batches."""
    monkeypatch.setattr(scan_module, "ENTRIES_PER_BATCH", 64)
    monkeypatch.setattr(scan_module, "probe_file", probe_by_name)
    monkeypatch.setattr(table_module, "ROWS_PER_BATCH", 30)
    monkeypatch.setattr(scan_state, "FLUSH_FILES", 50)
    for i in range(300):
        (tmp_path / f"{i}.mp4").write_bytes(b"x" * i)
    numbers = np.random.default_rng(0).integers(0, 300, 1000).tolist()
    (tmp_path / "l.csv").write_text("path,text\n" + "".join(f"{i}.mp4,caption {i}\n" for i in numbers))
    for _ in range(2):  # probed, then from the manifest
        scan = listed([DataSet(str(tmp_path / "l.csv"))], tmp_path / "m.parquet")
        assert scan.num_files == len(set(numbers))
        for rank in (0, 1):
            scan_share(scan, (rank, 2), 0)
        finish_scan(scan)
        table = read_manifest(tmp_path / "m.parquet")
        assert table["size"].to_pylist() == numbers
        assert table["caption"].to_pylist() == [f"caption {i}" for i in numbers]
        assert table["frames"].to_pylist() == [i or None for i in numbers]
        assert len(pc.unique(table["digest"])) == len(set(numbers))
        assert pc.sum(pc.equal(table["status"], "unusable")).as_py() == numbers.count(0)


def test_controls_are_opened_only_if_they_are_used(folder: Path, tmp_path: Path, opened: list[str], clip: Path) -> None:
    file = tmp_path / "manifest.parquet"
    shutil.copy(clip, folder / "a.control.mp4")
    scan_folder(folder, file, with_controls=False)
    assert opened == ["a.mp4", "b.mp4", "c.mp4", "d.png"]
    opened.clear()
    used = scan_folder(folder, file)
    assert opened == ["a.control.mp4"]
    assert [(row["control_frames"], row["control_reason"]) for row in used[:2]] == [(5, None), (None, None)]
    assert used[0]["control_digest"] == used[0]["digest"]
    # A run without controls loses nothing of what a run with them needs, or has just scanned.
    opened.clear()
    assert scan_folder(folder, file, with_controls=False) == used
    assert scan_folder(folder, file) == used
    assert opened == []


def test_what_the_listing_skips_is_in_the_manifest(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.parquet"
    (folder / ".Trash-1000").mkdir()
    (folder / ".Trash-1000" / "deleted.mp4").touch()
    (folder / "notes.md").touch()
    scan_folder(folder, file)
    assert read_skipped(file) == {"hidden or system folder": 1, ".md file": 1}
    (folder / "notes.md").unlink()
    scan_folder(folder, file)
    assert read_skipped(file) == {"hidden or system folder": 1}


def test_all_captions_of_a_clip_are_listed(tmp_path: Path) -> None:
    rows = [{"path": "a.mp4", "captions": ["one", "uno"]}, {"path": "b.mp4", "text": "two"}]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scan = listed([DataSet(str(tmp_path / "l.jsonl"))], tmp_path / "m.parquet")
    columns = [batch.column("more_captions").to_pylist() for batch in read_entries(scan)]
    assert columns == [[["uno"], None]]
    remove_state(scan)

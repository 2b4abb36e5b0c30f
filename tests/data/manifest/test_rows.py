"""The manifest's rows: what they say of a clip, and why it cannot be used."""

from pathlib import Path

import pytest

from cogds.data.manifest import file_digests as contents
from cogds.data.manifest import scan as inventory
from cogds.data.manifest import table as manifest
from cogds.data.manifest.table import DataSet
from tests.data.surveyed import leftovers, names_of, rows_of_list, survey


def test_a_row_holds_what_the_file_holds(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "m" / "manifest.parquet"
    inventory.update([DataSet(str(folder))], file, 2)
    table = manifest.read(file)
    assert table.schema.equals(manifest.SCHEMA)
    first, last = table.to_pylist()[0], table.to_pylist()[-1]
    stat = (folder / "a.mp4").stat()
    assert first == dict.fromkeys(table.column_names) | {
        "path": str(folder / "a.mp4"), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "kind": "video",
        "frames": 5, "fps": 10.0, "width": 48, "height": 32, "rotation": 0, "duration_s": pytest.approx(0.5),
        "caption": "clip a", "status": "ok", "set": 0,
    }  # fmt: skip
    assert (last["kind"], last["frames"], last["width"], last["height"]) == ("image", 1, 8, 6)
    assert leftovers(file) == []


def test_captions(folder: Path, tmp_path: Path) -> None:
    (folder / "a.txt").unlink()
    (folder / "b.txt").write_text(" \n")
    (folder / "c.txt").write_bytes(b"\xff\xfe\xfa")
    rows = survey(folder, tmp_path / "manifest.parquet")
    starts = [
        "caption missing: add",
        "caption empty: write",
        "caption unreadable: caption file c.txt cannot be read as",
    ]
    assert all(row["reason"].startswith(start) for row, start in zip(rows, starts))
    assert rows[3]["status"] == "ok"
    assert [row["frames"] for row in rows] == [5, 5, 5, 1]
    rows = survey(folder, tmp_path / "manifest.parquet", default_caption="a film")
    assert [row["caption"] for row in rows] == ["a film", "a film", None, "a picture"]
    assert names_of(rows, "unusable") == ["c.mp4"]


def test_ranges(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    ranges = [(None, None), (0, 0.5), (0.4, None), (0.1, 0.9), (0.5, None), (0.1, 1.01), (None, 2)]
    lines = [{"path": str(folder / "a.mp4"), "start_s": start, "end_s": end} for start, end in ranges]
    rows = rows_of_list(tmp_path, tmp_path / "m.parquet", lines)
    assert [(row["start_s"], row["end_s"]) for row in rows] == ranges
    assert [row["reason"] for row in rows] == [None] * 4 + [
        "range outside the clip: from 0.5 s to its end, of 0.5 s",
        "range outside the clip: from 0.1 s to 1.01 s, of 0.5 s",
        "range outside the clip: from 0 s to 2 s, of 0.5 s",
    ]
    assert opened == ["a.mp4"]  # one file, seven clips


def test_conditioning_images(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    file = tmp_path / "m.parquet"
    (folder / "bad.png").write_text("no picture")
    images = [str(folder / "d.png"), str(folder / "bad.png"), str(folder / "gone.png"), None]
    lines = [{"path": str(folder / "a.mp4"), "image": image} for image in images]
    lines.append({"path": str(folder / "gone.mp4"), "image": str(folder / "d.png")})
    rows = rows_of_list(tmp_path, file, lines)
    assert [row["status"] for row in rows] == ["ok", "unusable", "unusable", "ok", "unusable"]
    assert rows[1]["reason"].startswith("conditioning image unusable: cannot be opened: ")
    assert rows[2]["reason"] == "conditioning image unusable: file missing: the file does not exist"
    assert rows[4]["reason"] == "file missing: the file does not exist"
    assert [row["image_path"] for row in rows[:4]] == images
    assert opened == ["a.mp4", "d.png", "bad.png"]
    opened.clear()
    contents.fill_digests(file)
    filled = manifest.read(file).to_pylist()
    assert [(row["digest"] is None, row["image_digest"] is None) for row in filled[:4]] == [
        (False, False), (False, True), (False, True), (False, True)
    ]  # fmt: skip
    again = rows_of_list(tmp_path, file, lines)
    assert again == filled
    assert opened == []

"""The manifest's rows: the properties of a clip, and why it cannot be used."""

import hashlib
from pathlib import Path

import pytest

from cogds.data.manifest.table import SCHEMA, DataSet, read_manifest
from tests.data.scanned import names_beside, names_of, rows_of_list, scan_folder, scan_sets


def test_a_row_holds_the_properties_of_its_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "m" / "manifest.parquet"
    rows = scan_sets([DataSet(str(folder))], file, num_workers=2)
    assert read_manifest(file).schema.equals(SCHEMA)
    first, last = rows[0], rows[-1]
    stat = (folder / "a.mp4").stat()
    assert first == dict.fromkeys(SCHEMA.names) | {
        "path": str(folder / "a.mp4"), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "kind": "video",
        "frames": 5, "fps": 10.0, "width": 48, "height": 32, "rotation": 0, "duration_s": pytest.approx(0.5),
        "processing": "",
        "caption": "clip a", "status": "ok", "set": 0,
        "digest": hashlib.blake2b((folder / "a.mp4").read_bytes(), digest_size=16).digest(),
    }  # fmt: skip
    assert (last["kind"], last["frames"], last["width"], last["height"]) == ("image", 1, 8, 6)
    assert names_beside(file) == []


def categories(rows: list[dict]) -> list[str | None]:
    """The categories of the reasons, by which clips are counted."""
    return [row["reason"] and row["reason"].split(":")[0] for row in rows]


def test_captions(folder: Path, tmp_path: Path) -> None:
    (folder / "a.txt").unlink()
    (folder / "b.txt").write_text(" \n")
    (folder / "c.txt").write_bytes(b"\xff\xfe\xfa")
    rows = scan_folder(folder, tmp_path / "manifest.parquet")
    assert categories(rows) == ["caption missing", "caption empty", "caption unreadable", None]
    assert "c.txt" in rows[2]["reason"]
    assert [row["frames"] for row in rows] == [5, 5, 5, 1]
    rows = scan_folder(folder, tmp_path / "manifest.parquet", default_caption="a film")
    assert [row["caption"] for row in rows] == ["a film", "a film", None, "a picture"]
    assert names_of(rows, "unusable") == ["c.mp4"]


def test_several_captions(folder: Path, tmp_path: Path) -> None:
    lists = [["one", "two", "three"], ["one"], ["half of a pair: \ud83d", "x"], ["x", "half of a pair: \ud83d"]]
    lines = [{"path": str(folder / "a.mp4"), "text": None, "captions": captions} for captions in lists]
    rows = rows_of_list(tmp_path, tmp_path / "m.parquet", lines)
    assert [row["caption"] for row in rows] == ["one", "one", None, None]
    assert [row["more_captions"] for row in rows] == [["two", "three"], None, None, None]
    assert categories(rows) == [None, None, "caption unreadable", "caption unreadable"]


def test_ranges(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    ranges = [(None, None), (0, 0.5), (0.4, None), (0.1, 0.9), (0.5, None), (0.1, 1.01), (None, 2)]
    lines = [{"path": str(folder / "a.mp4"), "start_s": start, "end_s": end} for start, end in ranges]
    rows = rows_of_list(tmp_path, tmp_path / "m.parquet", lines)
    assert [(row["start_s"], row["end_s"]) for row in rows] == ranges
    assert categories(rows) == [None] * 4 + ["range outside the clip"] * 3
    assert "0.1 s to 1.01 s, of 0.5 s" in rows[5]["reason"]
    assert opened == ["a.mp4"]  # the seven clips are of one file


def test_conditioning_images(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    file = tmp_path / "m.parquet"
    (folder / "bad.png").write_text("no picture")
    images = [str(folder / "d.png"), str(folder / "bad.png"), str(folder / "gone.png"), None]
    lines = [{"path": str(folder / "a.mp4"), "image": image} for image in images]
    lines.append({"path": str(folder / "gone.mp4"), "image": str(folder / "d.png")})
    rows = rows_of_list(tmp_path, file, lines)
    assert [row["status"] for row in rows] == ["ok", "unusable", "unusable", "ok", "unusable"]
    assert rows[1]["reason"].startswith("conditioning image unusable: cannot be opened: ")
    assert rows[2]["reason"].startswith("conditioning image unusable: file missing: ")
    assert rows[4]["reason"].startswith("file missing: ")
    assert [row["image_path"] for row in rows[:4]] == images
    assert opened == ["a.mp4", "d.png", "bad.png"]
    assert [row["digest"] is None for row in rows] == [False] * 4 + [True]
    assert [row["image_digest"] is None for row in rows[:4]] == [False, True, True, True]
    opened.clear()
    assert rows_of_list(tmp_path, file, lines) == rows
    assert opened == []


def test_scores_of_a_prepared_table(folder: Path, tmp_path: Path) -> None:
    lines = [
        {"path": str(folder / "a.mp4"), "motion": 0.5},
        {"path": str(folder / "b.mp4"), "duplicate_of": "a.mp4 at 0.000 s"},
    ]
    rows = rows_of_list(tmp_path, tmp_path / "m.parquet", lines)
    assert [(row["motion"], row["duplicate_of"]) for row in rows] == [(0.5, None), (None, "a.mp4 at 0.000 s")]

"""The survey: what is not opened twice, what ranks share, and what many batches come to."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from cogds.data.manifest import file_digests as contents
from cogds.data.manifest import scan as inventory
from cogds.data.manifest import scan_state as journal
from cogds.data.manifest import table as manifest
from cogds.data.manifest.table import DataSet
from cogds.data.video.media import DecodeError, write_video
from cogds.data.video.probe_task import FileFacts, ProbeTask
from tests.data.surveyed import leftovers, names_of, survey


def test_only_what_is_new_or_changed_is_opened(folder: Path, tmp_path: Path, opened: list[str], clip: Path) -> None:
    file = tmp_path / "manifest.parquet"
    first = survey(folder, file)
    assert opened == ["a.mp4", "b.mp4", "c.mp4", "d.png"]
    opened.clear()
    (folder / "a.txt").write_text("other words")
    again = survey(folder, file)
    assert opened == []
    assert again == [first[0] | {"caption": "other words"}, *first[1:]]
    shutil.copy(clip, folder / "e.mp4")
    write_video(folder / "b.mp4", np.zeros((7, 32, 48, 3), np.uint8), 10)
    rows = survey(folder, file)
    assert opened == ["b.mp4", "e.mp4"]
    assert [row["frames"] for row in rows] == [5, 7, 5, 1, 5]


def test_what_failed_is_opened_again_when_it_changes_or_on_demand(
    folder: Path, tmp_path: Path, opened: list[str], clip: Path
) -> None:
    file = tmp_path / "manifest.parquet"
    (folder / "b.mp4").write_bytes(b"")
    rows = survey(folder, file)
    assert rows[1]["reason"] == "empty file: the file is empty (0 bytes)"
    opened.clear()
    assert survey(folder, file) == rows
    assert opened == []
    assert survey(folder, file, retry_failed=True) == rows
    assert opened == ["b.mp4"]
    opened.clear()
    shutil.copy(clip, folder / "b.mp4")
    assert names_of(survey(folder, file), "unusable") == []
    assert opened == ["b.mp4"]


def test_a_file_that_disappears_is_unusable_and_known_again_when_it_comes_back(
    folder: Path, tmp_path: Path, opened: list[str]
) -> None:
    file = tmp_path / "manifest.parquet"
    lines = [{"path": str(folder / f"{name}.mp4"), "text": "x"} for name in "ab"]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first = survey(tmp_path / "l.jsonl", file)
    contents.fill_digests(file)
    for _ in range(2):
        os.rename(folder / "a.mp4", tmp_path / "away.mp4")
        rows = survey(tmp_path / "l.jsonl", file)
        assert rows[0]["reason"] == "file missing: the file does not exist"
        assert names_of(rows, "ok") == ["b.mp4"]
        os.rename(tmp_path / "away.mp4", folder / "a.mp4")
    opened.clear()
    rows = survey(tmp_path / "l.jsonl", file)
    assert opened == []
    assert [row | {"digest": None} for row in rows] == first
    assert all(row["digest"] for row in rows)


def test_several_data_sets(folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [str(folder / "a.mp4")], "words": ["again"]}), tmp_path / "t.parquet")
    sets = [DataSet(str(folder)), DataSet(str(tmp_path / "t.parquet"), {"path": "url", "caption": "words"})]
    inventory.update(sets, tmp_path / "m.parquet", 0)
    rows = manifest.read(tmp_path / "m.parquet", ["set", "caption"]).to_pylist()
    assert [row["set"] for row in rows] == [0, 0, 0, 0, 1]
    assert rows[4]["caption"] == "again"


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_ranks_share_the_files(folder: Path, tmp_path: Path, num_ranks: int, opened: list[str]) -> None:
    alone = survey(folder, tmp_path / "alone.parquet")
    opened.clear()
    file = tmp_path / "shared.parquet"
    job = inventory.begin([DataSet(str(folder))], file)
    assert job.num_files == 4
    assert sum(inventory.probe_share(job, (rank, num_ranks), 0) for rank in range(num_ranks)) == 4
    assert sorted(opened) == ["a.mp4", "b.mp4", "c.mp4", "d.png"]
    inventory.finish(job)
    assert manifest.read(file).to_pylist() == alone
    assert leftovers(file) == ["alone.parquet", "clips"]


def by_name(task: ProbeTask) -> FileFacts:
    number = int(Path(task.path).stem)
    if not number:
        raise DecodeError("the file is empty (0 bytes)")
    return FileFacts(number, 10.0, 16, 16, 0, number / 10)


def test_many_rows_in_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, so that every border is crossed; the order and each file's own facts must come out."""
    monkeypatch.setattr(inventory, "ENTRIES_AT_ONCE", 64)
    monkeypatch.setattr(manifest, "ROWS_AT_ONCE", 30)
    monkeypatch.setattr(journal, "JOURNAL_FILES", 50)
    for i in range(300):
        (tmp_path / f"{i}.mp4").write_bytes(b"x" * i)
    numbers = np.random.default_rng(0).integers(0, 300, 1000).tolist()
    (tmp_path / "l.csv").write_text("path,text\n" + "".join(f"{i}.mp4,caption {i}\n" for i in numbers))
    job = inventory.begin([DataSet(str(tmp_path / "l.csv"))], tmp_path / "m.parquet")
    assert job.num_files == len(set(numbers))
    for rank in (0, 1):
        inventory.probe_share(job, (rank, 2), 0, probe=by_name)
    inventory.finish(job)
    table = manifest.read(tmp_path / "m.parquet")
    assert table["size"].to_pylist() == numbers
    assert table["caption"].to_pylist() == [f"caption {i}" for i in numbers]
    assert table["frames"].to_pylist() == [i or None for i in numbers]
    assert pc.sum(pc.equal(table["status"], "unusable")).as_py() == numbers.count(0)

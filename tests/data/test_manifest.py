"""The manifest: what is in it, what is not opened twice, what a kill loses, and what ranks share."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cogds.data import manifest
from cogds.data.manifest import ALONE, DataSet
from cogds.data.probe import FileFacts, ProbeTask, probe_file
from cogds.data.video import DecodeError, write_video
from cogds.errors import UserError


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, np.zeros((5, 32, 48, 3), np.uint8), 10)
    return path


@pytest.fixture
def folder(tmp_path: Path, clip: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(clip, folder / f"{name}.mp4")
        (folder / f"{name}.txt").write_text(f"clip {name}")
    Image.new("RGB", (8, 6)).save(folder / "d.png")
    (folder / "d.txt").write_text("a picture")
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were probed in this process since it was cleared."""
    names: list[str] = []

    def spy(task: ProbeTask) -> FileFacts:
        names.append(Path(task.path).name)
        return probe_file(task)

    monkeypatch.setattr(manifest.probe_share, "__defaults__", (*manifest.probe_share.__defaults__[:2], spy, False))
    return names


def survey(folder: Path, file: Path, **options: object) -> list[dict]:
    manifest.update([DataSet(str(folder))], file, 0, **options)  # type: ignore[arg-type]
    return manifest.read(file).to_pylist()


def names_of(rows: list[dict], status: str) -> list[str]:
    return [Path(row["path"]).name for row in rows if row["status"] == status]


def leftovers(file: Path) -> list[str]:
    return sorted(one.name for one in file.parent.iterdir() if one != file)


def test_a_row_holds_what_the_file_holds(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "m" / "manifest.parquet"
    manifest.update([DataSet(str(folder))], file, 2)
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
    manifest.fill_digests(file)
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


def rows_of_list(tmp_path: Path, file: Path, lines: list[dict]) -> list[dict]:
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps({"text": "x"} | line) for line in lines))
    return survey(tmp_path / "l.jsonl", file)


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
    manifest.fill_digests(file)
    filled = manifest.read(file).to_pylist()
    assert [(row["digest"] is None, row["image_digest"] is None) for row in filled[:4]] == [
        (False, False), (False, True), (False, True), (False, True)
    ]  # fmt: skip
    again = rows_of_list(tmp_path, file, lines)
    assert again == filled
    assert opened == []


def test_several_data_sets(folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [str(folder / "a.mp4")], "words": ["again"]}), tmp_path / "t.parquet")
    sets = [DataSet(str(folder)), DataSet(str(tmp_path / "t.parquet"), {"path": "url", "caption": "words"})]
    manifest.update(sets, tmp_path / "m.parquet", 0)
    rows = manifest.read(tmp_path / "m.parquet", ["set", "caption"]).to_pylist()
    assert [row["set"] for row in rows] == [0, 0, 0, 0, 1]
    assert rows[4]["caption"] == "again"
    names = {manifest.manifest_file(some, tmp_path) for some in (sets, sets[:1], sets[1:], sets[::-1])}
    assert len(names) == 4
    assert manifest.manifest_file(sets, tmp_path).name.startswith("clips-")
    assert manifest.manifest_file(sets, tmp_path, str(tmp_path / "x")) == tmp_path / "x"


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_ranks_share_the_files(folder: Path, tmp_path: Path, num_ranks: int, opened: list[str]) -> None:
    alone = survey(folder, tmp_path / "alone.parquet")
    opened.clear()
    file = tmp_path / "shared.parquet"
    job = manifest.begin([DataSet(str(folder))], file)
    assert job.num_files == 4
    assert sum(manifest.probe_share(job, (rank, num_ranks), 0) for rank in range(num_ranks)) == 4
    assert sorted(opened) == ["a.mp4", "b.mp4", "c.mp4", "d.png"]
    manifest.finish(job)
    assert manifest.read(file).to_pylist() == alone
    job = manifest.fill_digests_begin(file)
    assert sum(manifest.fill_digests_share(job, (rank, num_ranks)) for rank in range(num_ranks)) == 4
    manifest.fill_digests_finish(job)
    assert manifest.read(file)["digest"].null_count == 0
    assert leftovers(file) == ["alone.parquet", "clips"]


class KilledError(BaseException):
    """Ends a run as a signal would."""


def test_a_killed_run_is_taken_up_where_it_was(
    folder: Path, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "JOURNAL_FILES", 1)
    file = tmp_path / "manifest.parquet"

    def killed_at(name: str) -> Callable[[ProbeTask], FileFacts]:
        def probe(task: ProbeTask) -> FileFacts:
            if Path(task.path).name == name:
                raise KilledError
            return probe_file(task)

        return probe

    job = manifest.begin([DataSet(str(folder))], file)
    with pytest.raises(KilledError):
        manifest.probe_share(job, ALONE, 0, probe=killed_at("c.mp4"))
    assert not file.exists()
    # What a kill in the middle of writing leaves, of a process that is gone.
    dead = job.run.replace(f"-{os.getpid()}-", "-999999999-")
    for name in (f"facts-{dead}-00000-000009.0a.tmp.arrow", f"files-{dead}.arrow"):
        (job.folder / name).write_bytes(b"torn")
    rows = survey(folder, file)
    assert opened == ["c.mp4", "d.png"]
    assert names_of(rows, "ok") == ["a.mp4", "b.mp4", "c.mp4", "d.png"]
    # The listing of the run that was killed stays as long as its process, this one, lives.
    assert leftovers(file) == ["clips", f"{file.name}.work"]
    assert sorted(one.name.split("-")[0] for one in job.folder.iterdir()) == ["entries", "files"]


def test_of_several_killed_runs_the_newest_facts_count(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    file = tmp_path / "manifest.parquet"
    lines = [{"path": str(folder / f"{name}.mp4"), "text": "x"} for name in "ab"]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    os.rename(folder / "a.mp4", tmp_path / "away.mp4")
    for num_frames in (6, 7):  # b is written anew before each of two runs that end before the last step
        write_video(folder / "b.mp4", np.zeros((num_frames, 32, 48, 3), np.uint8), 10)
        manifest.probe_share(manifest.begin([DataSet(str(tmp_path / "l.jsonl"))], file), ALONE, 0)
    os.rename(tmp_path / "away.mp4", folder / "a.mp4")  # that it was away is forgotten
    opened.clear()
    rows = survey(tmp_path / "l.jsonl", file)
    assert opened == ["a.mp4"]
    assert [(row["frames"], row["status"]) for row in rows] == [(5, "ok"), (7, "ok")]


def test_digests_of_a_killed_run_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    monkeypatch.setattr(manifest, "JOURNAL_FILES", 1)
    file = tmp_path / "manifest.parquet"
    survey(folder, file)
    manifest.fill_digests_share(manifest.fill_digests_begin(file), (0, 2))
    # Both ways to go on: with the digests, and with another survey in between.
    copy = tmp_path / "copy.parquet"
    shutil.copy(file, copy)
    shutil.copytree(tmp_path / "manifest.parquet.work", tmp_path / "copy.parquet.work")
    opened.clear()
    survey(folder, copy)
    assert opened == []
    assert manifest.read(copy)["digest"].null_count == 2
    job = manifest.fill_digests_begin(file)
    assert job.num_files == 2
    manifest.fill_digests_share(job, ALONE)
    manifest.fill_digests_finish(job)
    assert manifest.read(file)["digest"].null_count == 0


def test_a_digest_counts_only_for_what_was_digested(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "manifest.parquet"
    survey(folder, file)
    manifest.fill_digests_share(manifest.fill_digests_begin(file), ALONE)  # and killed
    content = bytearray((folder / "b.mp4").read_bytes())
    content[-1] ^= 1
    (folder / "b.mp4").write_bytes(content)  # the same size, another time
    survey(folder, file)
    assert [row["digest"] is None for row in manifest.read(file).to_pylist()] == [False, True, False, False]
    manifest.fill_digests(file)
    digests = [row["digest"] for row in manifest.read(file).to_pylist()]
    assert len(set(digests)) == 3
    assert digests[0] == digests[2] != digests[1]


def test_digests_are_of_the_content(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "manifest.parquet"
    survey(folder, file)
    manifest.fill_digests(file)
    first = [row["digest"] for row in manifest.read(file).to_pylist()]
    assert first[0] == first[1] == first[2] != first[3]
    write_video(folder / "b.mp4", np.ones((7, 32, 48, 3), np.uint8), 10)
    rows = survey(folder, file)
    assert [row["digest"] for row in rows] == [first[0], None, first[2], first[3]]
    (folder / "c.mp4").write_bytes(b"other")  # after the survey, before the digests
    (folder / "b.mp4").unlink()
    manifest.fill_digests(file)
    rows = manifest.read(file).to_pylist()
    assert rows[1]["reason"] == "file missing: the file does not exist"
    assert names_of(rows, "ok") == ["a.mp4", "c.mp4", "d.png"]  # c has the digest of what was surveyed
    os.utime(folder / "c.mp4", ns=(5, 5))
    rows = survey(folder, file)
    assert rows[1]["reason"].startswith("cannot be opened: ")


def test_a_file_that_changes_before_its_digest_is_unusable(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "manifest.parquet"
    survey(folder, file)
    os.utime(folder / "c.mp4", ns=(5, 5))
    manifest.fill_digests(file)
    row = manifest.read(file).to_pylist()[2]
    assert (row["status"], row["reason"].split(":")[0]) == ("unusable", "file changed")
    survey(folder, file)
    manifest.fill_digests(file)
    assert manifest.read(file)["digest"].null_count == 0


def test_many_rows_in_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, so that every border is crossed; the order and each file's own facts must come out."""
    monkeypatch.setattr(manifest, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(manifest, "JOURNAL_FILES", 50)
    for i in range(300):
        (tmp_path / f"{i}.mp4").write_bytes(b"x" * i)
    numbers = np.random.default_rng(0).integers(0, 300, 1000).tolist()
    (tmp_path / "l.csv").write_text("path,text\n" + "".join(f"{i}.mp4,caption {i}\n" for i in numbers))
    job = manifest.begin([DataSet(str(tmp_path / "l.csv"))], tmp_path / "m.parquet")
    assert job.num_files == len(set(numbers))
    for rank in (0, 1):
        manifest.probe_share(job, (rank, 2), 0, probe=by_name, progress=False)
    manifest.finish(job)
    table = manifest.read(tmp_path / "m.parquet")
    assert table["size"].to_pylist() == numbers
    assert table["caption"].to_pylist() == [f"caption {i}" for i in numbers]
    assert table["frames"].to_pylist() == [i or None for i in numbers]
    assert pc.sum(pc.equal(table["status"], "unusable")).as_py() == numbers.count(0)


def by_name(task: ProbeTask) -> FileFacts:
    number = int(Path(task.path).stem)
    if not number:
        raise DecodeError("the file is empty (0 bytes)")
    return FileFacts(number, 10.0, 16, 16, 0, number / 10)


def test_another_table_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"path": ["a"]}), file)
    before = file.read_bytes()
    with pytest.raises(UserError, match="table of something else and would be overwritten"):
        survey(folder, file)
    assert file.read_bytes() == before
    file.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"cannot be read .*: delete it, it is made anew"):
        survey(folder, file)
    pq.write_table(manifest.SCHEMA.empty_table().replace_schema_metadata({"cogds.manifest": "0"}), file)
    with pytest.raises(UserError, match="another version"):
        survey(folder, file)
    with pytest.raises(UserError, match="there is no manifest"):
        manifest.read(tmp_path / "nowhere")
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        survey(folder, tmp_path / "a file" / "m.parquet")

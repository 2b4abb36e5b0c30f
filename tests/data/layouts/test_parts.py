"""The listing of a dataset: its parts, what it counts, where it may lie, and how much memory it takes."""

import json
import os
import tracemalloc
from pathlib import Path

import fsspec
import pytest

from cogds.data.layouts import parts
from cogds.data.layouts.data_set import DataSet
from cogds.data.layouts.listing import Listing
from cogds.data.layouts.parts import DatasetReader, Folder, iter_entries
from cogds.errors import UserError


def make_tree(root: Path) -> Path:
    for name in ("b.mp4", "c/x.mp4", "c/y/z.mp4", "d.mp4", "e.mp4", "f.mp4", "g/metadata.csv", "h.mp4", "c/.x/y.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "g/metadata.csv").write_text("path,text\nq.mp4,one\nr.mp4,two\n")
    (root / "d.txt").write_text("a d")
    (root / "notes.md").touch()
    return root


def test_the_parts_in_order_are_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "CLIPS_PER_PART", 2)
    reader, whole = DatasetReader(DataSet(str(make_tree(tmp_path)))), Listing()
    entries = list(iter_entries(reader.data_set, listing=whole))
    names = [os.path.relpath(entry.path, tmp_path) for entry in entries]
    assert names == ["b.mp4", "c/x.mp4", "c/y/z.mp4", "d.mp4", "e.mp4", "f.mp4", "g/q.mp4", "g/r.mp4", "h.mp4"]

    found = Listing()
    pieces = list(reader.parts(found))
    pieces[1:2] = list(reader.split(pieces[1], found))  # the folder c in parts of its own
    assert [len(piece) if not isinstance(piece, Folder) else "folder" for piece in pieces] == [
        *(1, 1, "folder", 2, 1, "folder", 1)
    ]
    listings, shares = [], []
    for piece in reversed(pieces):  # by other ranks, in any order
        listings.append(Listing())
        shares.insert(0, list(reader.read(piece, listings[-1])))
    assert [entry for share in shares for entry in share] == entries
    for listing in listings:
        found.add(listing)
    assert (found.num_entries, found.num_captioned, found.skipped) == (9, 3, whole.skipped)
    assert whole.skipped == {".md file": 1, "hidden or system folder": 1}
    reader.check(found)


def test_links_inside_the_dataset_are_not_followed_twice(tmp_path: Path) -> None:
    (tmp_path / "set/a").mkdir(parents=True)
    (tmp_path / "set/a/x.mp4").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/y.mp4").touch()
    (tmp_path / "set/b").symlink_to(tmp_path / "set/a")
    (tmp_path / "set/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path)
    listing = Listing()
    entries = list(iter_entries(DataSet(str(tmp_path / "set")), listing=listing))
    assert [os.path.relpath(entry.path, tmp_path) for entry in entries[:2]] == ["set/a/x.mp4", "set/c/y.mp4"]
    assert listing.skipped["link to a folder of the dataset"] == 1
    assert listing.skipped["link to a parent folder"] == 2  # `elsewhere` and `set`, behind `up`


def test_a_list_that_names_its_clips_by_other_paths_leaves_none_out(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "set")
    for name in ("a.mp4", "b.mp4", "c.png", "d.mp4"):
        (tmp_path / "set" / name).touch()
    rows = f"file_name,text,image\n./a.mp4,one,c.png\n{tmp_path}/link/b.mp4,two,\n../set/d.mp4,three,\n"
    (tmp_path / "set/metadata.csv").write_text(rows)
    listing = Listing()
    assert len(list(iter_entries(DataSet(str(tmp_path / "link")), listing=listing))) == 3
    assert listing.skipped == {}
    list(iter_entries(DataSet(str(tmp_path / "set"), where="text == 'one'"), listing=listing))
    assert listing.skipped == {"row removed by data.where": 2}  # and not their files


def test_folders_lists_and_captions_behind_a_url() -> None:
    memory = fsspec.filesystem("memory")
    files = {
        "v/a.mp4": "", "v/a.txt": "one", "v/sub/b.mp4": "", "v/sub/b.mp4.txt": "two", "v/.git/x.mp4": "", "v/x.md": "",
        "l/metadata.csv": "file_name,text\na.mp4,one\n", "l/t.json": '[{"vid": 3, "text": "x"}]',
    }  # fmt: skip
    for name, text in files.items():
        memory.pipe_file(f"/layouts/{name}", text.encode())
    listing = Listing()
    entries = list(iter_entries(DataSet("memory://layouts/v"), listing=listing))
    assert [(entry.path, entry.caption) for entry in entries] == [
        ("memory://layouts/v/a.mp4", "one"),
        ("memory://layouts/v/sub/b.mp4", "two"),
    ]
    assert listing.skipped == {"hidden or system folder": 1, ".md file": 1}
    assert [entry.path for entry in iter_entries(DataSet("memory://layouts/l/metadata.csv"))] == [
        "memory://layouts/l/a.mp4"
    ]
    data_set = DataSet("memory://layouts/l/t.json", root="s3://bucket/v", path_template="{vid}.mp4")
    assert [entry.path for entry in iter_entries(data_set)] == ["s3://bucket/v/3.mp4"]
    with pytest.raises(UserError, match=r"^data\.path: no such file or folder: memory://layouts/nowhere"):
        list(iter_entries(DataSet("memory://layouts/nowhere")))
    memory.rm("/layouts", recursive=True)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_a_large_list_takes_no_memory(tmp_path: Path, suffix: str) -> None:
    rows = [{"path": f"{number:06d}.mp4", "text": "word " * 400} for number in range(2_000)]
    texts = {
        "json": json.dumps(rows),
        "jsonl": "\n".join(map(json.dumps, rows)),
        "csv": "path,text\n" + "\n".join(f"{row['path']},{row['text']}" for row in rows),
    }
    file = tmp_path / f"l.{suffix}"
    file.write_text(texts[suffix])
    del rows, texts
    tracemalloc.start()
    num_entries = sum(1 for _ in iter_entries(DataSet(str(file))))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_entries == 2_000
    assert peak_bytes < 2_000_000 < file.stat().st_size


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"path_template": "clip.mp4"}, r"^data\.path_template: 'clip\.mp4' has no column in braces"),
        ({"path_template": "{vid.mp4"}, r"^data\.path_template: "),
        (
            {"path_template": "{vdi}.mp4"},
            r"l\.csv:2: no column 'vdi' \(did you mean 'vid'\?\), which data\.path_template",
        ),
        ({"where": "vid > 30"}, r"^data\.where: removes all 2 rows of .*l\.csv"),
        ({"columns": {"start_s": "begin"}}, r"l\.csv:2: no column 'begin'.* data\.columns\.start_s"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: dict, message: str) -> None:
    (tmp_path / "l.csv").write_text("vid,path,text\n1,a.mp4,x\n2,b.mp4,y\n")
    with pytest.raises(UserError, match=message):
        list(iter_entries(DataSet(str(tmp_path / "l.csv"), **settings)))


def test_a_filter_needs_a_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.where: .* no table to filter"):
        list(iter_entries(DataSet(str(make_folder(tmp_path)), where="a > 1")))


def test_rows_with_files_that_are_neither_video_nor_image_are_counted(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path,text,type\na.mp4,x,\nb.xyz,y,\nc,z,\nd,z,video\n")
    listing = Listing()
    entries = list(iter_entries(DataSet(str(tmp_path / "l.csv")), listing=listing))
    assert [(Path(entry.path).name, entry.kind) for entry in entries] == [("a.mp4", "video"), ("d", "video")]
    assert listing.skipped == {"row with a .xyz file": 1, "row with a file without a suffix": 1}


def make_folder(root: Path) -> Path:
    (root / "a.mp4").touch()
    (root / "a.txt").write_text("one")
    return root


def test_the_reasons_of_skipped_files_are_few() -> None:
    listing = Listing()
    for number in range(1000):
        listing.skip(f".{number} file")
    assert len(listing.skipped) <= 101
    assert listing.skipped.total() == 1000


def test_settings_of_lists_that_are_not_used_cause_warnings(tmp_path, capsys):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("a caption")
    entries = list(iter_entries(DataSet(str(tmp_path), root="/elsewhere", path_template="{vid}.mp4")))
    assert [entry.path for entry in entries] == [f"{tmp_path}/a.mp4"]
    warnings = capsys.readouterr().err
    assert "data.root: " in warnings
    assert "data.path_template: " in warnings

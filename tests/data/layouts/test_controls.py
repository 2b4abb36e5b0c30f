"""Control videos in folders, tar files and tables: which clip they belong to, and what is no control."""

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cogds.data.layouts.data_set import DataSet
from cogds.data.layouts.entry import Entry
from cogds.data.layouts.listing import Listing
from cogds.data.layouts.parts import iter_entries
from cogds.data.storage.location import display_name
from cogds.errors import UserError

UNUSED = "further control of a clip"
POSTER = "poster image of a video"


@pytest.fixture(params=["folder", "tar"])
def write(request: pytest.FixtureRequest, tmp_path: Path):
    """Write files that hold their names, to a folder or a tar file. Returns the path of the dataset."""

    def write(*names: str) -> Path:
        (tmp_path / "files").mkdir()
        for name in names:
            (tmp_path / "files" / name).write_text(name)
        if request.param == "folder":
            return tmp_path / "files"
        with tarfile.open(tmp_path / "files.tar", "w") as archive:
            for name in names:
                archive.add(tmp_path / "files" / name, name)
        return tmp_path / "files.tar"

    return write


def name_of(location: str | None) -> str | None:
    return location and display_name(location).replace(": ", "/").rpartition("/")[2]


def read(path: Path) -> tuple[dict[str | None, str | None], Listing]:
    """Name of each clip -> name of its control; and what was counted."""
    listing = Listing()
    entries: list[Entry] = list(iter_entries(DataSet(str(path)), listing=listing))
    return {name_of(entry.path): name_of(entry.control_path) for entry in entries}, listing


@pytest.mark.parametrize(
    ("names", "controls", "skipped"),
    [
        (["a.control.mp4", "a.mp4", "b.mp4"], {"a.mp4": "a.control.mp4", "b.mp4": None}, {}),
        (["a.control.mp4"], {"a.control.mp4": None}, {}),
        (["a.control.mp4", "a.mp4", "a.png"], {"a.mp4": "a.control.mp4"}, {POSTER: 1}),
        (["a.control.mp4", "a.control.png", "a.mp4"], {"a.mp4": "a.control.mp4"}, {UNUSED: 1}),
        (["a.control.mov", "a.control.mp4", "a.mp4"], {"a.mp4": "a.control.mov"}, {UNUSED: 1}),
        (["a.control.mp4", "a.mov", "a.mp4"], {"a.mov": "a.control.mp4", "a.mp4": "a.control.mp4"}, {}),
        (["a.control.png", "a.png"], {"a.png": "a.control.png"}, {}),
        (
            ["a.control.mp4", "a.control.png", "a.mp4", "a.png", "a.png.txt"],
            {"a.mp4": "a.control.mp4", "a.png": "a.control.png"},
            {},
        ),
    ],
)
def test_the_control_of_a_clip_is_the_file_beside_it(write, names, controls, skipped) -> None:
    found, listing = read(write(*names))
    assert found == controls
    assert listing.skipped == skipped


def test_controls_beside_a_list_are_no_unknown_files(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.control.mp4"):
        (tmp_path / name).touch()
    row = {"file_name": "a.mp4", "text": "one", "control": "a.control.mp4"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    found, listing = read(tmp_path)
    assert found == {"a.mp4": "a.control.mp4"}
    assert not listing.skipped


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("value", [False, 3, {"bytes": b"x"}, ["a.mp4"]], ids=str)
def test_a_column_that_only_has_the_name_of_controls_is_ignored(tmp_path: Path, suffix: str, value) -> None:
    row = {"file_name": "a.mp4", "text": "one", "control": value}
    path = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row, default=str))
    (entry,) = iter_entries(DataSet(str(path)))
    assert (name_of(entry.path), entry.caption, entry.control_path) == ("a.mp4", "one", None)
    with pytest.raises(UserError, match="control"):
        list(iter_entries(DataSet(str(path), {"control": "control"})))

"""Tar files of clips: which caption belongs to which clip, and what is left out and counted."""

import io
import tarfile
from pathlib import Path

import pytest

from cogds.data.layouts.data_set import DataSet
from cogds.data.layouts.entry import Entry
from cogds.data.layouts.listing import Listing
from cogds.data.layouts.parts import iter_entries
from cogds.data.storage.access import read_bytes
from cogds.data.storage.location import parse_member
from cogds.errors import UserError


def write_tar(path: Path, files: dict[str, str], links: tuple[str, ...] = ()) -> Path:
    """Write a tar file of names and contents, and of hard links to its first file."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            archive.addfile(info, io.BytesIO(content.encode()))
        for name in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, next(iter(files))
            archive.addfile(info)
    return path


def by_name(path: Path, listing: Listing | None = None) -> dict[str, Entry]:
    entries = iter_entries(DataSet(str(path)), listing=listing)
    members = ((parse_member(entry.path), entry) for entry in entries)
    return {member.name: entry for member, entry in members if member}


@pytest.mark.parametrize(
    ("names", "captions"),
    [
        (("a.mp4", "a.txt"), {"a.mp4": "a.txt"}),
        (("a.txt", "x/a.mp4", "x/a.TXT", "a.mp4"), {"x/a.mp4": "x/a.TXT", "a.mp4": "a.txt"}),
        (("1.0.mp4", "1.0.txt", "1.1.mp4", "1.1.txt"), {"1.0.mp4": "1.0.txt", "1.1.mp4": "1.1.txt"}),
        (("1.0.mp4", "1.1.mp4", "1.1.txt"), {"1.0.mp4": None, "1.1.mp4": "1.1.txt"}),
        (("a.left.mp4", "a.right.mp4", "a.txt"), {"a.left.mp4": "a.txt", "a.right.mp4": "a.txt"}),
        (("a.mp4", "a.prompt.txt"), {"a.mp4": "a.prompt.txt"}),
        (("a.mp4", "a.jpg", "a.thumb.jpg", "a.txt"), {"a.mp4": "a.txt"}),
        (("a.mp4", "a.txt", "a.jpg", "a.jpg.txt"), {"a.mp4": "a.txt", "a.jpg": "a.jpg.txt"}),
        (("1.0.jpg", "1.0.txt", "1.1.mp4", "1.1.txt"), {"1.0.jpg": "1.0.txt", "1.1.mp4": "1.1.txt"}),
    ],
)
def test_captions_belong_to_the_clip_with_their_name(tmp_path, names, captions):
    tar = write_tar(tmp_path / "a.tar", {name: name for name in names})
    assert {name: entry.caption for name, entry in by_name(tar).items()} == captions


def test_a_clip_with_two_possible_captions_has_an_error(tmp_path):
    entry = by_name(write_tar(tmp_path / "a.tar", dict.fromkeys(("a.mp4", "a.long.txt", "a.short.txt"), "text")))
    assert entry["a.mp4"].caption is None
    assert "a.long.txt, a.short.txt" in (entry["a.mp4"].caption_error or "")


def test_of_several_files_with_the_same_name_the_last_counts(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"a.mp4": "old", "a.txt": "old"})
    with tarfile.open(tar, "a") as archive:
        for name in ("a.mp4", "a.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"new"))
    listing = Listing()
    (entry,) = iter_entries(DataSet(str(tar)), listing=listing)
    assert (entry.caption, read_bytes(entry.path)) == ("new", b"new")
    assert listing.skipped == {"older file of the same name in a tar file": 1}


def test_what_is_left_out_of_a_tar_file_is_counted(tmp_path):
    names = ("a.mp4", "a.txt", "a.jpg", ".git/b.mp4", "@eaDir/c.jpg", "x/.d.mp4", "e.md")
    listing = Listing()
    assert list(by_name(write_tar(tmp_path / "a.tar", dict.fromkeys(names, "text"), ("f.mp4",)), listing)) == ["a.mp4"]
    assert listing.skipped == {
        "file in a hidden or system folder": 2,
        "hidden file": 1,
        ".md file": 1,
        "poster image of a video": 1,
        "link in a tar file": 1,
    }


def test_only_tar_files_of_train_are_read(tmp_path):
    for name in ("train-000.tar", "train-001.tar", "val-000.tar", "notes.tar"):
        write_tar(tmp_path / name, {f"{name}/a.mp4": "text"})
    listing = Listing()
    assert len(by_name(tmp_path, listing)) == 3
    assert listing.skipped == {"tar file of another split than train": 1}


def test_the_suffix_of_a_tar_file_may_be_in_capitals(tmp_path):
    assert list(by_name(write_tar(tmp_path / "A.TAR", {"a.mp4": "text"}))) == ["a.mp4"]


def test_a_filter_needs_a_table(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"a.mp4": "text", "a.txt": "text"})
    with pytest.raises(UserError, match=r"data\.where: .* no table"):
        list(iter_entries(DataSet(str(tar), where="motion > 1")))

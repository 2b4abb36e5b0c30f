import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cogds.data.manifest import Entry, read_entries
from cogds.errors import UserError


def put(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def entry(folder: Path, name: str, caption: str | None, kind: str = "video", image: str | None = None) -> Entry:
    return Entry(str(folder / name), caption, kind, str(folder / image) if image else None)


def test_folder_of_clips(tmp_path: Path) -> None:
    (tmp_path / "sub dir").mkdir()
    for name in ("b.MP4", "sub dir/ä clip.mkv", "a.png", "notes.md", ".hidden.mp4", "no caption.webm", "empty.mov"):
        (tmp_path / name).touch()
    put(tmp_path, b__txt="\ufeff a bee \n", a__txt="an a", empty__txt=" \n")
    (tmp_path / "sub dir/ä clip.txt").write_text("zwölf", encoding="utf-8")
    os.symlink(tmp_path, tmp_path / "sub dir" / "loop")
    assert read_entries(tmp_path) == [
        entry(tmp_path, "a.png", "an a", "image"),
        entry(tmp_path, "b.MP4", "a bee"),
        entry(tmp_path, "empty.mov", None),
        entry(tmp_path, "no caption.webm", None),
        entry(tmp_path, "sub dir/ä clip.mkv", "zwölf"),
    ]


@pytest.mark.parametrize("captions", ["prompts.txt", "prompt.txt"])
def test_lists_of_lines(tmp_path: Path, captions: str) -> None:
    put(tmp_path, videos__txt="videos/1.mp4\r\n/abs/2.mp4\n\n")
    (tmp_path / captions).write_text("one\u2028line\ntwo\n", encoding="utf-8")
    want = [entry(tmp_path, "videos/1.mp4", "one\u2028line"), Entry("/abs/2.mp4", "two", "video")]
    assert read_entries(tmp_path) == read_entries(tmp_path / "videos.txt") == want
    put(tmp_path, images__txt="i/1.png\ni/2.png\n")
    assert [e.image_path for e in read_entries(tmp_path)] == [str(tmp_path / "i/1.png"), str(tmp_path / "i/2.png")]


def test_rows(tmp_path: Path) -> None:
    want = [entry(tmp_path, "a b.mp4", "one, two"), entry(tmp_path, "c.png", None, "image")]
    put(
        tmp_path,
        metadata__jsonl='\ufeff{"file_name": "a b.mp4", "text": " one, two"}\n\n{"file_name": "c.png", "text": null}',
    )
    assert read_entries(tmp_path) == want
    (tmp_path / "metadata.jsonl").unlink()
    put(tmp_path, metadata__csv='\ufefffile_name,text\na b.mp4,"one, two"\nc.png,\n')
    assert read_entries(tmp_path) == read_entries(tmp_path / "metadata.csv") == want
    (tmp_path / "metadata.csv").unlink()
    rows = [{"file_path": "a b.mp4", "text": "one, two", "type": "video"}, {"file_path": "c.png", "text": ""}]
    put(tmp_path, my_list__json=json.dumps(rows))
    assert read_entries(tmp_path) == read_entries(tmp_path / "my_list.json") == want


def no_files(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda d: d / "nowhere", "does not exist"),
        (no_files, "holds no clips: expected a folder of clips"),
        (lambda d: put(d, videos__txt="a.mp4", metadata__jsonl="{}"), "metadata.jsonl, videos.txt"),
        (lambda d: put(d, videos__txt="a.mp4\nb.mp4", prompts__txt="one"), "videos.txt has 2, prompts.txt has 1"),
        (lambda d: put(d, videos__txt="a.mp4\n\nb.mp4", prompts__txt="1\n2\n3"), "videos.txt:2 is empty"),
        (lambda d: put(d, videos__txt="a.mp4"), "lacks prompts.txt"),
        (lambda d: put(d, videos__txt="a", prompts__txt="a", prompt__txt="a"), "keep one"),
        (lambda d: put(d, prompts__txt="a") / "prompts.txt", "videos.txt"),
        (lambda d: put(d, videos__txt="", prompts__txt=""), "lists no clips"),
        (lambda d: put(d, metadata__jsonl='{"file_name": "a", "text": ""}\n{"file_name'), "jsonl:2 is not valid"),
        (lambda d: put(d, metadata__jsonl='{"file_name": "a", "caption": ""}'), "lacks 'text'.*file_name, caption"),
        (lambda d: put(d, metadata__jsonl="[1]"), "jsonl:1 is a list"),
        (lambda d: put(d, metadata__csv="file_name,text\na,b\nc\n"), "csv:3 lacks 'text'"),
        (lambda d: put(d, metadata__csv='file_name,text\na,"b\n'), "not valid CSV"),
        (lambda d: put(d, x__json='[{"file_path": "a", "text": "b"},\n{]'), "x.json:2 is not valid JSON"),
        (lambda d: put(d, x__json="{}"), "holds a dict, not a list"),
        (lambda d: put(d, x__json='[{"text": "b"}]'), "row 1 lacks 'file_path'.*text"),
        (lambda d: put(d, x__json='[{"file_path": "a", "text": 5}]'), "row 1: 'text' is 5"),
        (lambda d: put(d, x__json='[{"file_path": "", "text": "x"}]'), "row 1: 'file_path' is ''"),
        (lambda d: put(d, x__json='[{"file_path": "a", "text": "b", "type": "gif"}]'), "type 'gif' is unknown"),
        (lambda d: put(d, x__json="[]", y__json="[]"), "x.json, y.json"),
        (lambda d: put(d, x__parquet="") / "x.parquet", "no list of clips"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(tmp_path: Path, make: Callable[[Path], Path], says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_entries(make(tmp_path))


def test_a_list_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na,ä\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_entries(tmp_path)

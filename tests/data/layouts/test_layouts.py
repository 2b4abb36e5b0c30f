import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cogds.data.layouts import lists
from cogds.data.layouts.data_set import DataSet
from cogds.data.layouts.entry import Entry
from cogds.data.layouts.parquet_tables import MANIFEST_MARK
from cogds.data.layouts.parts import iter_entries
from cogds.errors import UserError

COLUMNS = {"path": "url", "caption": "alt text", "kind": "sort", "image": "still", "start_s": "from", "end_s": "to"}


def read_entries(path: Path, columns: dict[str, str] | None = None) -> list[Entry]:
    return list(iter_entries(DataSet(str(path), columns or {})))


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
        entry(tmp_path, "empty.mov", ""),
        entry(tmp_path, "no caption.webm", None),
        entry(tmp_path, "sub dir/ä clip.mkv", "zwölf"),
    ]


@pytest.mark.parametrize("captions", ["prompts.txt", "prompt.txt"])
def test_lists_of_lines(tmp_path: Path, captions: str) -> None:
    put(tmp_path, videos__txt="videos/1.mp4\r\n/abs/2.mp4\n\n")
    (tmp_path / captions).write_text("one\u2028line\ntwo\n", encoding="utf-8")
    expected = [entry(tmp_path, "videos/1.mp4", "one\u2028line"), Entry("/abs/2.mp4", "two", "video")]
    assert read_entries(tmp_path) == read_entries(tmp_path / "videos.txt") == expected
    put(tmp_path, images__txt="i/1.png\ni/2.png\n")
    assert [clip.image_path for clip in read_entries(tmp_path)] == [
        str(tmp_path / "i/1.png"),
        str(tmp_path / "i/2.png"),
    ]


def test_tables(tmp_path: Path) -> None:
    expected = [entry(tmp_path, "a b.mp4", "one, two"), entry(tmp_path, "c.png", None, "image")]
    put(
        tmp_path,
        metadata__jsonl='\ufeff{"file_name": "a b.mp4", "text": " one, two"}\n\n{"file_name": "c.png", "text": null}',
    )
    assert read_entries(tmp_path) == expected
    (tmp_path / "metadata.jsonl").unlink()
    put(tmp_path, metadata__csv='\ufefffile_name,text\na b.mp4,"one, two"\nc.png,\n')
    from_csv = [expected[0], expected[1]._replace(caption="")]
    assert read_entries(tmp_path) == read_entries(tmp_path / "metadata.csv") == from_csv
    (tmp_path / "metadata.csv").unlink()
    rows = [{"file_path": "a b.mp4", "text": "one, two", "type": "video"}, {"file_path": "c.png", "text": None}]
    put(tmp_path, my_list__json=json.dumps(rows))
    assert read_entries(tmp_path) == read_entries(tmp_path / "my_list.json") == expected


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: d / "nowhere", "^data.path: .*/nowhere"),
        (lambda d: d, "^data.path: .*/no_files"),
        (lambda d: put(d, videos__txt="a", prompts__txt="b", metadata__csv="path,text\na,b"), "metadata.csv, vid"),
        (lambda d: put(d, videos__txt="a.mp4\nb.mp4", prompts__txt="one"), "^data.path: .*videos.txt has 2.* has 1"),
        (lambda d: put(d, videos__txt="a.mp4\n\nb.mp4", prompts__txt="1\n2\n3"), "/videos.txt:2: "),
        (lambda d: put(d, videos__txt="a.mp4"), "^data.path: .* no prompts.txt"),
        (lambda d: put(d, videos__txt="a", prompts__txt="a", prompt__txt="a"), "^data.path: .* prompt.txt"),
        (lambda d: put(d, prompts__txt="a") / "prompts.txt", "^data.path: .*/prompts.txt .*/videos.txt"),
        (lambda d: put(d, videos__txt="", prompts__txt=""), "^data.path: .*/videos.txt"),
        (lambda d: put(d, metadata__jsonl='{"file_name": "a", "text": ""}\n{"file_name'), "/metadata.jsonl:2: .*JSON"),
        (lambda d: put(d, metadata__jsonl='{"file_name": "a", "txt": ""}'), "/metadata.jsonl:1: .*'text'.* txt"),
        (lambda d: put(d, metadata__jsonl="[1]"), "/metadata.jsonl:1: .*list"),
        (lambda d: put(d, metadata__csv="file_name,text\na,b\nc\n"), "/metadata.csv:3: .*'text'"),
        (lambda d: put(d, metadata__csv='file_name,text\na,"b\n'), "/metadata.csv:2: .*CSV"),
        (lambda d: put(d, x__json='[{"file_path": "a", "text": "b"},\n{]'), "/x.json:2: .*JSON"),
        (lambda d: put(d, x__json="{}"), "^data.path: .*x.json"),
        (lambda d: put(d, x__json='{"a": 1}') / "x.json", "/x.json: row 1: .*'a' is 1"),
        (lambda d: put(d, x__json='[{"text": "b"}]'), "/x.json: row 1: .*'file_path'.*text"),
        (lambda d: put(d, x__json='[{"file_path": "a", "text": 5}]'), "/x.json: row 1: .*caption.* 5"),
        (lambda d: put(d, x__json='[{"file_path": "", "text": "x"}]'), "/x.json: row 1: .*path.* ''"),
        (lambda d: put(d, x__json='[{"file_path": "a", "text": "b", "type": "gif"}]'), "/x.json: row 1: .*'gif'"),
        (lambda d: put(d, x__json="[]", y__json="[]"), "^data.path: .*x.json, y.json"),
        (lambda d: put(d, x__json="[]"), "^data.path: .*/x.json"),
        (lambda d: put(d, x__md="") / "x.md", "^data.path: .*/x.md .*.jsonl"),
        (lambda d: put(d, x__parquet=""), "/x.parquet: .*Parquet"),
        (lambda d: put(d, metadata__csv="file_name,text\na,b, c\n"), "/metadata.csv:2: .*quotes"),
        (lambda d: put(d, metadata__csv="path,text,start_s\na,b,-1\n"), "/metadata.csv:2: start_s .*'-1'"),
        (lambda d: put(d, metadata__csv="path,text,end_s\na,b,x\n"), "/metadata.csv:2: end_s .*'x'"),
        (lambda d: put(d, metadata__csv="path,text,start_s,end_s\na,b,2,2\n"), "/metadata.csv:2: .* 2 s"),
        (lambda d: put(d, x__json='[{"path": "a", "text": "b", "start_s": true}]'), "/x.json: row 1: start_s .*True"),
        (lambda d: put(d, x__json='[{"path": "a", "text": "b", "image": 1}]'), "/x.json: row 1: .*image.* 1"),
        (lambda d: table(d, path=["a"], text=[1]), "/metadata.parquet: .*'text' holds int64"),
        (lambda d: table(d, path=["a"], text=["b"], end_s=["c"]), "/metadata.parquet: row 1: end_s is 'c'"),
        (lambda d: table(d, path=["a", None], text=["b", "c"]), "/metadata.parquet: row 2: .*path.* None"),
        (lambda d: table(d, url=["a"], text=["b"]), "/metadata.parquet: .*'file_name'.* url, text"),
    ],
)  # fmt: skip
def test_errors_name_the_key_or_the_file_and_line(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    folder = tmp_path / "no_files"
    folder.mkdir()
    with pytest.raises(UserError, match=message):
        read_entries(make(folder))


def table(folder: Path, name: str = "metadata.parquet", /, **columns: list) -> Path:
    pq.write_table(pa.table(columns), folder / name)
    return folder


def test_tables_with_ranges_images_and_given_column_names(tmp_path: Path) -> None:
    rows = [
        {"url": "a.mp4", "alt text": "one", "sort": None, "still": "i.png", "from": 0, "to": 2.5, "other": 1},
        {"url": "/b.mp4", "alt text": None, "sort": "image", "still": None, "from": None, "to": None, "other": 1},
    ]
    expected = [
        Entry(str(tmp_path / "a.mp4"), "one", "video", str(tmp_path / "i.png"), None, 0.0, 2.5),
        Entry("/b.mp4", None, "image"),
    ]
    put(tmp_path, l__jsonl="\n".join(map(json.dumps, rows)))
    put(tmp_path, l__csv="url,alt text,sort,still,from,to\na.mp4,one,,i.png,0,2.5\n/b.mp4,,image,,,\n")
    put(tmp_path, l__json=json.dumps(rows))
    table(tmp_path, "l.parquet", **{name: [row[name] for row in rows] for name in rows[0]})
    for file in ("l.jsonl", "l.json", "l.parquet"):
        assert read_entries(tmp_path / file, COLUMNS) == expected
    assert read_entries(tmp_path / "l.csv", COLUMNS) == [expected[0], expected[1]._replace(caption="")]
    with pytest.raises(UserError, match=r"l.parquet: no column 'uri' \(did you mean 'url'"):
        read_entries(tmp_path / "l.parquet", {"path": "uri"})


def test_a_list_of_captions(tmp_path: Path) -> None:
    rows = [
        {"path": "a.mp4", "captions": [" one", "two ", "", "one"]},
        {"path": "b.mp4", "captions": ["three"]},
        {"path": "c.mp4", "captions": [" "]},
        {"path": "d.mp4", "captions": []},
        {"path": "e.mp4", "captions": None},
    ]
    put(tmp_path, l__jsonl="\n".join(map(json.dumps, rows)), l__json=json.dumps(rows))
    put(tmp_path, l__csv='path,captions\na.mp4,"["" one"", ""two "", """"]"\nb.mp4,three\n')
    table(tmp_path, "l.parquet", **{name: [row[name] for row in rows] for name in rows[0]})
    first = entry(tmp_path, "a.mp4", "one", "video")._replace(more_captions=("two",))
    expected = [first, *(entry(tmp_path, f"{n}.mp4", c, "video") for n, c in zip("bcde", ("three", "", None, None)))]
    for file in ("l.jsonl", "l.json", "l.parquet"):
        assert read_entries(tmp_path / file) == expected
    assert read_entries(tmp_path / "l.csv") == expected[:2]


def test_a_caption_and_a_list_of_captions(tmp_path: Path) -> None:
    put(tmp_path, l__jsonl='{"path": "a.mp4", "text": "two", "all": ["one", "two"]}')
    (clip,) = read_entries(tmp_path / "l.jsonl", {"captions": "all"})
    assert (clip.caption, *clip.more_captions) == ("two", "one")


@pytest.mark.parametrize("captions", ['"a"', "[1]"])
def test_captions_that_are_no_texts_are_refused(tmp_path: Path, captions: str) -> None:
    put(tmp_path, l__jsonl=f'{{"path": "a.mp4", "captions": {{"en": {captions}}}}}')
    with pytest.raises(UserError, match=r"l\.jsonl:1: the caption is {'en'.*Write a string"):
        read_entries(tmp_path / "l.jsonl")
    table(tmp_path, path=["a.mp4"], captions=[[1]])
    with pytest.raises(UserError, match=r"parquet: column 'captions' holds int64"):
        read_entries(tmp_path)


def test_cogds_column_names_and_no_captions(tmp_path: Path) -> None:
    table(tmp_path, path=["a.mp4"], kind=["image"], start_s=pa.array([float("nan")]))
    with pytest.raises(UserError, match=r"metadata\.parquet: .*'text'"):
        read_entries(tmp_path)
    assert list(iter_entries(DataSet(str(tmp_path)), need_captions=False)) == [entry(tmp_path, "a.mp4", None, "image")]


def test_parquet_files_are_joined_and_manifests_ignored(tmp_path: Path) -> None:
    for part in (1, 0):
        table(tmp_path, f"part-{part}.parquet", path=pa.array([f"{part}.mp4"]).dictionary_encode(), text=["x"])
    manifest = pa.table({"path": ["c.mp4"]}).replace_schema_metadata({MANIFEST_MARK: b"1"})
    pq.write_table(manifest, tmp_path / "manifest.parquet")
    assert [Path(clip.path).name for clip in read_entries(tmp_path)] == ["0.mp4", "1.mp4"]


def test_a_file_with_the_name_of_a_clip_is_not_a_list(tmp_path: Path) -> None:
    for name in ("a.mp4", "videos.mp4", "metadata.mov"):
        (tmp_path / name).touch()
    put(tmp_path, a__json='[{"fps": 1}]', a__txt="an a", videos__txt="v", metadata__csv="x", dataset_info__json="{}")
    assert [(Path(clip.path).name, clip.caption) for clip in read_entries(tmp_path)] == [
        ("a.mp4", "an a"), ("metadata.mov", None), ("videos.mp4", "v")
    ]  # fmt: skip


def test_a_folder_is_read_in_the_order_of_sorted_paths(tmp_path: Path) -> None:
    names = ["a-b.mp4", "a/z.mp4", "a.mp4", "a b/c.mp4", "b/a/x.mp4", "b/a.mp4", "B.mp4"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4" / "inner").mkdir(parents=True)
    (tmp_path / "folder.mp4" / "inner" / "x.mp4").touch()
    assert [clip.path for clip in read_entries(tmp_path)] == sorted(
        str(tmp_path / name) for name in [*names, "folder.mp4"]
    )


def test_entries_are_yielded_while_the_list_is_read(tmp_path: Path) -> None:
    put(tmp_path, l__jsonl='{"path": "a.mp4", "text": "b"}\nnot json\n')
    entries = iter_entries(DataSet(str(tmp_path / "l.jsonl")))
    assert next(entries).caption == "b"
    with pytest.raises(UserError, match=r"l\.jsonl:2: "):
        next(entries)


def test_a_list_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na,ä\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"metadata\.csv: .*UTF-8"):
        read_entries(tmp_path)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_scores_and_other_columns_are_read(tmp_path: Path, form: str) -> None:
    columns = {
        "file_name": ["a.mp4", "b.mp4", "c.mp4"],
        "text": ["one", "two", "three"],
        "motion": [0.25, None, 0.0],
        "duplicate_of": [None, "a.mp4", ""],
        "score": [1, 2, 3],
    }
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    if form == "jsonl":
        put(tmp_path, metadata__jsonl="\n".join(map(json.dumps, rows)))
    else:
        table(tmp_path, **columns)
    entries = list(iter_entries(DataSet(str(tmp_path)), keep_extras=True))
    assert [entry.motion for entry in entries] == [0.25, None, 0.0]
    assert [entry.duplicate_of for entry in entries] == [None, "a.mp4", None]
    assert [entry.extras for entry in entries] == [{"score": 1}, {"score": 2}, {"score": 3}]
    assert [entry.extras for entry in read_entries(tmp_path)] == [None] * 3


@pytest.mark.parametrize("values", [["high", "low"], [[0.1], [0.2]], [True, False], [float("nan"), float("inf")]])
def test_scores_of_another_form_are_ignored(tmp_path: Path, values: list) -> None:
    table(tmp_path, file_name=["a.mp4", "b.mp4"], text=["one", "two"], motion=values, duplicate_of=[1, 2])
    assert [(entry.motion, entry.duplicate_of) for entry in read_entries(tmp_path)] == [(None, None)] * 2


def test_scores_in_other_columns_and_as_text(tmp_path: Path) -> None:
    put(tmp_path, metadata__csv="file_name,text,flow,copy\na.mp4,one,0.5,\nb.mp4,two,,a.mp4\n")
    entries = read_entries(tmp_path, {"motion": "flow", "duplicate_of": "copy"})
    assert [(entry.motion, entry.duplicate_of) for entry in entries] == [(0.5, None), (None, "a.mp4")]


def test_other_columns_of_parquet_are_read_only_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path, file_name=["a.mp4"], text=["one"], motion=[0.5], large=["x" * 1000])
    read, names = lists.read_parquet, []
    monkeypatch.setattr(lists, "read_parquet", lambda file, columns: names.append(columns) or read(file, columns))
    list(iter_entries(DataSet(str(tmp_path))))
    list(iter_entries(DataSet(str(tmp_path)), keep_extras=True))
    assert names == [["file_name", "text", "motion"], ["file_name", "text", "motion", "large"]]

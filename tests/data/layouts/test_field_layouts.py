"""The layouts in which other trainers and datasets write clips: read as they are, by a key, or refused by name.

docs/data.md has a table of them.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cogds.data.layouts.data_set import DataSet
from cogds.data.layouts.entry import Entry
from cogds.data.layouts.listing import Listing
from cogds.data.layouts.parts import iter_entries
from cogds.errors import UserError


@dataclass(frozen=True)
class Layout:
    """An example of a layout.

    Attributes:
        files: content of every file; "" for a clip.
        expected: the entries, with paths relative to the folder; or a pattern of the sentence of the refusal.
        path: data.path, relative to the folder.
        settings: other keys of the dataset.
        skipped: what is not in the entries.
    """

    name: str
    files: Mapping[str, str | bytes]
    expected: Sequence[Entry] | str
    path: str = "."
    settings: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)


def clip(
    path: str, *captions: str, at: tuple[float | None, float | None] = (None, None), image: str | None = None
) -> Entry:
    kind = "image" if path.endswith((".png", ".jpg")) else "video"
    return Entry(path, captions[0] if captions else None, kind, image, None, *at, captions[1:])


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


A, B = clip("a.mp4", "one"), clip("b.mp4", "two")
CLIPS = {"a.mp4": "", "b.mp4": ""}
OPENVID = (
    "video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds\n"
    'x_1.mp4,"one, two",5.2,4.1,0.99,static,120,24.0,5.0\nx_2.mp4,low,4.1,0.2,0.98,pan,120,24.0,5.0\n'
)
PANDA = (
    "videoID,url,timestamp,caption,matching_score\n"
    "v1,https://a.b/v1,\"[['0:00:16.300', '0:00:32.566'], ['0:01:50.000', '0:01:58.833']]\","
    '"[\'A dog, running\', ""a man\'s hat""]","[0.45, 0.30]"\n'
)
PANDA_CLIPS = [clip("v1.mp4", "A dog, running", at=(16.3, 32.566)), clip("v1.mp4", "a man's hat", at=(110, 118.833))]
INTERNVID = lines(
    {
        "YoutubeID": "v1",
        "Start_timestamp": "00:03:10.567",
        "End_timestamp": "00:03:11.200",
        "Caption": "a mouse",
        "Aesthetic_Score": 4.5,
        "UMT_Score": 0.39,
    }
)
HDVILA = {
    "video_id": "v1",
    "url": "https://a.b",
    "clip": [
        {"clip_id": "v1.0.mp4", "span": ["00:00:17.759", "00:00:23.279"]},
        {"clip_id": "v1.1.mp4", "span": ["00:00:38.120", "00:00:44.480"]},
    ],
}

LAYOUTS = [
    # --- folders
    Layout("captions beside clips", {**CLIPS, "a.txt": "one", "b.txt": "two"}, [A, B]),
    Layout("captions with the clip's suffix", {**CLIPS, "a.mp4.txt": "one", "b.mp4.txt": "two"}, [A, B]),
    Layout("suffixes in capitals", {"a.MP4": "", "a.TXT": "one"}, [clip("a.MP4", "one")]),
    Layout("kohya's .caption files", {**CLIPS, "a.caption": "one", "b.caption": "two"}, [A, B]),
    Layout("subfolders by class", {"cat/a.mp4": "", "cat/a.txt": "one"}, [clip("cat/a.mp4", "one")]),
    Layout(
        "diffusion-pipe: images and videos",
        {"a.png": "", "a.txt": "one", "b.mp4": "", "b.txt": "two"},
        [clip("a.png", "one"), B],
    ),
    Layout(
        "diffusion-pipe: captions.json",
        {**CLIPS, "captions.json": json.dumps({"a.mp4": ["one", "uno"], "b.mp4": ["two"]})},
        [clip("a.mp4", "one", "uno"), B],
    ),
    Layout(
        "captions.json with one caption each", {**CLIPS, "captions.json": '{"a.mp4": "one", "b.mp4": "two"}'}, [A, B]
    ),
    Layout(
        "posters beside videos",
        {"a.mp4": "", "a.txt": "one", "a.jpg": "", "b.mp4": "", "b.mp4.jpg": "", "b.txt": "two"},
        [A, B],
        skipped={"poster image of a video": 2},
    ),
    Layout(
        "CogVideo SAT: videos/ and labels/", {"videos/1.mp4": "", "labels/1.txt": "one"}, [clip("videos/1.mp4", "one")]
    ),
    Layout(
        "CogVideo SAT: data.path is videos/",
        {"videos/s/1.mp4": "", "labels/s/1.txt": "one"},
        [clip("videos/s/1.mp4", "one")],
        path="videos",
    ),
    Layout(
        "folders called videos and captions, both with clips",
        {"videos/a.mp4": "", "videos/a.txt": "one", "captions/b.mp4": "", "captions/b.txt": "two"},
        [clip("captions/b.mp4", "two"), clip("videos/a.mp4", "one")],
    ),
    Layout(
        "Panda-70M and others by video2dataset",
        {
            "00000/000000000.mp4": "",
            "00000/000000000.txt": "one",
            "00000/000000000.json": '{"caption": "one", "status": "success", "clips": [[1, 2]]}',
            "00000.parquet": parquet(url=["u"], caption=["one"], key=["000000000"]),
            "00000_stats.json": '{"count": 1}',
        },
        [clip("00000/000000000.mp4", "one")],
        skipped={".parquet file": 1, ".json file": 1},
    ),
    Layout(
        "video2dataset without .txt files",
        {"00000/0.mp4": "", "00000/0.json": '{"caption": "one"}'},
        [clip("00000/0.mp4", "one")],
    ),
    Layout(
        "stray tables among captioned clips",
        {
            "a.mp4": "",
            "a.txt": "one",
            "words.json": '["x"]',
            "log.csv": "step,loss\n1,2\n",
            "metadata.csv": "id,x\n1,2\n",
            "workflow.json": "[]x",
        },
        [A],
        skipped={".json file": 2, ".csv file": 2},
    ),
    Layout(
        "system folders",
        {
            "a.mp4": "",
            "a.txt": "one",
            ".Trash-1000/files/x.mp4": "",
            ".ipynb_checkpoints/a.mp4": "",
            ".git/x.mp4": "",
            "#recycle/x.mp4": "",
            "@eaDir/a.mp4/S.jpg": "",
            "lost+found/x.mp4": "",
            "._a.mp4": "",
            "notes.md": "",
        },
        [A],
        skipped={"hidden or system folder": 6, "hidden file": 1, ".md file": 1},
    ),
    # --- lists of lines
    Layout(
        "CogVideo finetune: videos.txt, prompts.txt",
        {"videos.txt": "v/a.mp4\nv/b.mp4\n", "prompts.txt": "one\ntwo\n"},
        [clip("v/a.mp4", "one"), clip("v/b.mp4", "two")],
    ),
    Layout(
        "CogVideo finetune with images.txt",
        {"videos.txt": "a.mp4\n", "prompts.txt": "one\n", "images.txt": "i/a.png\n"},
        [clip("a.mp4", "one", image="i/a.png")],
    ),
    Layout("finetrainers: video.txt, caption.txt", {"video.txt": "a.mp4\nb.mp4", "caption.txt": "one\ntwo"}, [A, B]),
    Layout(
        "finetrainers: images.txt, captions.txt", {"images.txt": "a.png", "captions.txt": "one"}, [clip("a.png", "one")]
    ),
    # --- tables
    Layout("HF videofolder: metadata.csv", {**CLIPS, "metadata.csv": "file_name,text\na.mp4,one\nb.mp4,two\n"}, [A, B]),
    Layout(
        "HF videofolder: metadata.jsonl",
        {**CLIPS, "metadata.jsonl": lines({"file_name": "a.mp4", "text": "one"})},
        [A],
        skipped={"clip that its list does not name": 1},
    ),
    Layout(
        "HF videofolder: metadata.parquet",
        {**CLIPS, "metadata.parquet": parquet(file_name=["a.mp4"], text=["one"])},
        [A],
        skipped={"clip that its list does not name": 1},
    ),
    Layout(
        "HF videofolder: clips, folders and files that the table does not name",
        {
            **CLIPS,
            "metadata.csv": "file_name,text\nsub/c.mp4,three\na.mp4,one\n",
            "sub/c.mp4": "",
            "sub/d.mp4": "",
            "more/e.mp4": "",
            "docs/page.html": "",
            "a.txt": "one",
            "README.md": "",
            ".DS_Store": "",
        },
        [clip("sub/c.mp4", "three"), A],
        skipped={
            "clip that its list does not name": 2,
            "folder that its list does not name": 1,
            ".txt file beside a list": 1,
            ".md file beside a list": 1,
            "hidden file": 1,
        },
    ),
    Layout(
        "HF videofolder: split folder",
        {"train/a.mp4": "", "train/metadata.csv": "file_name,text\na.mp4,one\n"},
        [clip("train/a.mp4", "one")],
    ),
    Layout(
        "HF videofolder: several splits",
        {
            "train/a.mp4": "",
            "train/metadata.csv": "file_name,text\na.mp4,one\n",
            "test/b.mp4": "",
            "test/metadata.csv": "file_name,text\nb.mp4,two\n",
        },
        [clip("train/a.mp4", "one")],
        skipped={"folder of another split than train": 1},
    ),
    Layout(
        "HF: tables by split",
        {
            "train-0-of-1.parquet": parquet(path=["a.mp4"], text=["one"]),
            "test-0-of-1.parquet": parquet(path=["b.mp4"], text=["b"]),
        },
        [A],
        skipped={"table of another split than train": 1},
    ),
    Layout("metadata.tsv", {"metadata.tsv": "file_name\ttext\na.mp4\tone\nb.mp4\ttwo\n"}, [A, B]),
    Layout("CSV with semicolons", {"l.csv": "file_name;text\na.mp4;one\nb.mp4;two\n"}, [A, B], path="l.csv"),
    Layout(
        "CSV with a BOM, blanks and backslashes",
        {"l.csv": '\ufefffile_name, text\n v\\a.mp4 , "one"\n'},
        [clip("v/a.mp4", "one")],
        path="l.csv",
    ),
    Layout("CogKit: file_name and prompt", {"metadata.jsonl": lines({"file_name": "a.mp4", "prompt": "one"})}, [A]),
    Layout(
        "VideoX-Fun: list of file_path, text, type",
        {
            "m.json": json.dumps(
                [
                    {"file_path": "a.mp4", "text": "one", "type": "video"},
                    {"file_path": "b.png", "text": "b", "type": "image"},
                ]
            )
        },
        [A, clip("b.png", "b")],
        path="m.json",
    ),
    Layout(
        "musubi-tuner: video_path", {"l.jsonl": lines({"video_path": "a.mp4", "caption": "one"})}, [A], path="l.jsonl"
    ),
    Layout(
        "musubi-tuner: image_path",
        {"l.jsonl": lines({"image_path": "a.png", "caption": "one"})},
        [clip("a.png", "one")],
        path="l.jsonl",
    ),
    Layout(
        "finetrainers: data in an object, with images",
        {
            "v.json": json.dumps(
                {"data": [{"caption": "one", "image_path": "i.png", "video_path": "a.mp4", "fps": 8}], "x": 1}
            )
        },
        [clip("a.mp4", "one", image="i.png")],
        path="v.json",
    ),
    Layout(
        "kohya's metadata: an object per path",
        {"m.json": json.dumps({"a.mp4": {"caption": "one"}, "b.mp4": {"caption": "two"}})},
        [A, B],
        path="m.json",
    ),
    Layout(
        "JSON with NaN as missing",
        {"l.json": '[{"path": "a.mp4", "text": NaN, "start_s": NaN, "image": NaN}]'},
        [clip("a.mp4")],
        path="l.json",
    ),
    Layout(
        "several captions for a clip",
        {"l.jsonl": lines({"path": "a.mp4", "captions": ["one", "uno", " "]})},
        [clip("a.mp4", "one", "uno")],
        path="l.jsonl",
    ),
    Layout(
        "times as text",
        {"l.csv": "path,text,start,end\na.mp4,one,1.5,00:01:02.5\n"},
        [clip("a.mp4", "one", at=(1.5, 62.5))],
        path="l.csv",
    ),
    # --- by a key
    Layout(
        "OpenVid-1M with data.root",
        {"OpenVid-1M.csv": OPENVID, "video_folder/x_1.mp4": ""},
        [clip("video_folder/x_1.mp4", "one, two"), clip("video_folder/x_2.mp4", "low")],
        path="OpenVid-1M.csv",
        settings={"root": "video_folder"},
    ),
    Layout(
        "OpenVid-1M with data.where",
        {"OpenVid-1M.csv": OPENVID},
        [clip("x_1.mp4", "one, two")],
        path="OpenVid-1M.csv",
        settings={"where": "aesthetic_score > 5 and `motion score` > 0.3"},
        skipped={"row removed by data.where": 1},
    ),
    Layout(
        "VidGen-1M",
        {"c.json": json.dumps([{"vid": "x-Scene-0030", "caption": "one"}])},
        [clip("x-Scene-0030.mp4", "one")],
        path="c.json",
        settings={"path_template": "{vid}.mp4"},
    ),
    Layout(
        "names by number",
        {"l.csv": "id,text\n7,one\n"},
        [clip("00007.mp4", "one")],
        path="l.csv",
        settings={"path_template": "{id:05d}.mp4"},
    ),
    Layout(
        "Panda-70M's table with whole videos",
        {"p.csv": PANDA},
        PANDA_CLIPS,
        path="p.csv",
        settings={"path_template": "{videoID}.mp4"},
    ),
    Layout(
        "Panda-70M by score",
        {"p.csv": PANDA},
        PANDA_CLIPS[:1],
        path="p.csv",
        settings={"path_template": "{videoID}.mp4", "where": "matching_score > 0.4"},
        skipped={"row removed by data.where": 1},
    ),
    Layout(
        "InternVid with whole videos",
        {"i.jsonl": INTERNVID},
        [clip("v1.mp4", "a mouse", at=(190.567, 191.2))],
        path="i.jsonl",
        settings={"path_template": "{YoutubeID}.mp4"},
    ),
    Layout(
        "InternVid with cut videos",
        {"i.jsonl": INTERNVID},
        [clip("v1_00:03:10.567_00:03:11.200.mp4", "a mouse")],
        path="i.jsonl",
        settings={"path_template": "{YoutubeID}_{Start_timestamp}_{End_timestamp}.mp4"},
    ),
    Layout(
        "HD-VILA with whole videos and captions",
        {"h.jsonl": lines(HDVILA | {"text": "one"})},
        [clip("v1.mp4", "one", at=(17.759, 23.279)), clip("v1.mp4", "one", at=(38.12, 44.48))],
        path="h.jsonl",
        settings={"path_template": "{video_id}.mp4"},
    ),
    Layout(
        "HD-VILA with cut videos",
        {"h.jsonl": lines(HDVILA | {"text": "one"})},
        [clip("v1/v1.0.mp4", "one"), clip("v1/v1.1.mp4", "one")],
        path="h.jsonl",
        settings={"path_template": "{video_id}/{clip_id}"},
    ),
    Layout(
        "unusual names with data.columns",
        {"l.csv": "url,alt,start\ns3://b/a.mp4,one,3\n"},
        [clip("s3://b/a.mp4", "one")],
        path="l.csv",
        settings={"columns": {"path": "url", "caption": "alt", "start_s": None}},
    ),
    Layout(
        "data.root is a URL",
        {"l.csv": "path,text\nv/a.mp4,one\n"},
        [clip("s3://b/c/v/a.mp4", "one")],
        path="l.csv",
        settings={"root": "s3://b/c"},
    ),
    # --- refused, with what to do
    Layout(
        "a table beside captionless clips",
        {"OpenVid-1M.csv": OPENVID, "v/x_1.mp4": ""},
        r"no captions, and there are tables: .*/OpenVid-1M\.csv\. .*set data\.path to it, .*data\.root",
    ),
    Layout(
        "VidGen-1M without a template",
        {"c.json": json.dumps([{"vid": "x", "caption": "one"}])},
        r"c\.json: row 1: no column 'file_path': .* vid, caption.*data\.path_template",
        path="c.json",
    ),
    Layout(
        "paths without a suffix",
        {"l.csv": "path,text\nx-Scene-0030,one\n"},
        r"l\.csv: no path has the suffix .* such as x-Scene-0030\. Set data\.path_template",
        path="l.csv",
    ),
    Layout(
        "Parquet with embedded videos",
        {"t.parquet": parquet(video=[{"bytes": b"x", "path": "a.mp4"}], text=["one"])},
        r"t\.parquet: column 'video' holds the files themselves .*binary.*\. Write them to files",
    ),
    Layout(
        "CSV with an ambiguous delimiter",
        {"l.csv": "path;text;x,path,text\n"},
        r"l\.csv:1: .*commas or semicolons.* Write the table again",
        path="l.csv",
    ),
    Layout(
        "Windows paths with a drive",
        {"l.csv": "path,text\nC:\\v\\a.mp4,one\n"},
        r"l\.csv:2: .*of Windows.* data\.root",
        path="l.csv",
    ),
    Layout(
        "CogKit I2V: prompts by id",
        {
            "metadata.jsonl": lines({"id": 0, "prompt": "one"}),
            "videos/metadata.jsonl": lines({"file_name": "a.mp4", "id": 0}),
        },
        r"metadata\.jsonl:1: no column 'file_name'",
    ),
    Layout(
        "spans and captions that do not fit",
        {"l.jsonl": lines({"path": "a.mp4", "text": ["x"], "spans": [[0, 1], [2, 3]]})},
        r"l\.jsonl:1: spans holds 2 spans, and text 1 texts",
        path="l.jsonl",
    ),
    Layout(
        "a damaged metadata.jsonl among captioned clips",
        {"a.mp4": "", "a.txt": "one", "metadata.jsonl": '{"file_name": '},
        r"metadata\.jsonl:1: invalid JSON",
    ),
    Layout(
        "a column with an unclear name",
        {"l.csv": "path,text,start\na.mp4,one,2021-02-03\n"},
        r"l\.csv:2: start is '2021-02-03'.* set data\.columns={start_s: null}",
        path="l.csv",
    ),
    Layout(
        "two lists in a folder",
        {"metadata.csv": "path,text\na.mp4,x\n", "metadata.jsonl": lines({"path": "b.mp4", "text": "x"})},
        r"several lists of clips: metadata\.jsonl, metadata\.csv\. Set data\.path",
    ),
    Layout("a list of paths alone", {"l.json": '["a.mp4"]'}, r"l\.json: row 1: a str\. Write an object", path="l.json"),
]


def put(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout(tmp_path: Path, layout: Layout) -> None:
    put(tmp_path, layout.files)
    settings = dict(layout.settings)
    if not settings.get("root", "s3://").startswith("s3://"):
        settings["root"] = str(tmp_path / settings["root"])
    data_set, listing = DataSet(str(tmp_path / layout.path), **settings), Listing()
    need_captions = layout.name != "JSON with NaN as missing"
    if isinstance(layout.expected, str):
        with pytest.raises(UserError, match=layout.expected):
            list(iter_entries(data_set))
        return
    entries = list(iter_entries(data_set, need_captions, listing))
    assert [relative(entry, tmp_path) for entry in entries] == layout.expected
    assert listing.skipped == layout.skipped


def relative(entry: Entry, folder: Path) -> Entry:
    image = entry.image_path and entry.image_path.removeprefix(f"{folder}/")
    return entry._replace(path=entry.path.removeprefix(f"{folder}/"), image_path=image)

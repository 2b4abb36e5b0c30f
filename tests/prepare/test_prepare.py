"""The whole preparation in one process: datasets in, tables out."""

import hashlib
import json
import os
import shutil
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cogds.arguments import parse_args, shipped_config
from cogds.config.loading import load_config
from cogds.core.geometry import ClipShape
from cogds.data.layouts.data_set import DataSet
from cogds.data.layouts.parts import iter_entries
from cogds.data.storage.access import read_bytes
from cogds.data.video.media import read_clip
from cogds.distributed import run_lock
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.prepare import captioning, captions, main
from cogds.prepare.main import check_dataset, prepare, read_request
from tests.prepare.endpoint import HANG, error, reply, serve
from tests.prepare.films import HEIGHT, WIDTH, read_numbers, scene, write_film
from tests.servers import FileServer


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_film(tmp_path_factory.mktemp("film") / "film.mp4", [15, 15, 20])


@pytest.fixture
def films(tmp_path, film):
    """Two films, one with a caption, and a still."""
    folder = tmp_path / "films"
    (folder / "more").mkdir(parents=True)
    shutil.copy(film, folder / "a.mp4")
    (folder / "a.txt").write_text("a film")
    write_film(folder / "more/b.mp4", [20])
    Image.new("RGB", (64, 48), "red").save(folder / "c.png")
    return folder


def run(path, output, *words):
    """`cogds prepare` of one rank, in this process."""
    words = [
        f"data.path={path}",
        "data.num_workers=0",
        f"--output={output}",
        "--scores=motion,duplicates",
        "--min-scene=0.3",
        *words,
    ]
    args = parse_args("prepare", words)
    cfg = load_config(str(shipped_config("run_configs", "demo.yaml")), args.overrides)[0]
    check_dataset(cfg.data)
    prepare(cfg.data, read_request(cfg.data, args), World(0, 1, 0, 1))
    return pq.read_table(output).to_pylist() if output.exists() else []


def caption_words(endpoint, *words):
    return (f"--caption-url={endpoint.url}", "--caption-model=stub", "--caption-frames=2", *words)


def digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that were cut."""
    from cogds.prepare import cutting

    names, find_scenes = [], cutting.find_scenes

    def spy(source, options):
        names.append(os.path.basename(source.path))
        return find_scenes(source, options)

    monkeypatch.setattr(cutting, "find_scenes", spy)
    return names


def test_a_folder_becomes_a_table_that_can_be_trained_and_nothing_is_encoded(films, tmp_path):
    before = digests(tmp_path)
    output = tmp_path / "clips.parquet"
    rows = run(films, output)
    assert [(row["file_name"], row["type"], row["start_s"], row["end_s"], row["text"]) for row in rows] == [
        ("films/a.mp4", "video", 0.0, 0.6, "a film"),
        ("films/a.mp4", "video", 0.6, 1.2, "a film"),
        ("films/a.mp4", "video", 1.2, 2.0, "a film"),
        ("films/c.png", "image", None, None, None),
        ("films/more/b.mp4", "video", 0.0, 0.8, None),
    ]
    entries = list(iter_entries(DataSet(str(output))))
    assert [(entry.path, entry.start_s, entry.end_s, entry.caption) for entry in entries] == [
        (str(tmp_path / row["file_name"]), row["start_s"], row["end_s"], row["text"]) for row in rows
    ]
    # The only new files are the table and its state, which holds no media.
    after = digests(tmp_path)
    assert {path: after[path] for path in before} == before
    assert {path.suffix for path in after.keys() - before.keys()} == {".parquet", ".arrow", ".lock"}


def test_finished_files_are_not_opened_again_and_changed_ones_are(films, tmp_path, opened):
    output = tmp_path / "clips.parquet"
    run(films, output)
    assert sorted(opened) == ["a.mp4", "b.mp4", "c.png"]
    table = output.read_bytes()
    opened.clear()
    output.unlink()
    run(films, output)
    assert opened == []
    assert output.read_bytes() == table
    os.utime(films / "a.mp4", (1, 1))
    write_film(films / "d.mp4", [15])
    run(films, output)
    assert sorted(opened) == ["a.mp4", "d.mp4"]
    opened.clear()
    run(films, output, "--min-scene=0.2")
    assert sorted(opened) == ["a.mp4", "b.mp4", "c.png", "d.mp4"]


def test_copies_are_marked_with_the_first_of_them(films, tmp_path):
    shutil.copy(films / "a.mp4", films / "more/copy.mp4")
    rows = run(films, tmp_path / "clips.parquet")
    copies = [row["duplicate_of"] for row in rows if row["file_name"] == "films/more/copy.mp4"]
    assert copies == [f"films/a.mp4 at {start_s:.3f} s" for start_s in (0.0, 0.6, 1.2)]
    assert all(row["duplicate_of"] is None for row in rows if row["file_name"] == "films/a.mp4")


@pytest.mark.slow
def test_a_file_that_takes_too_long_is_tried_again(films, tmp_path):
    output = tmp_path / "clips.parquet"
    rows = run(films, output, "data.num_workers=2", "--file-timeout=0.001")
    lines = (tmp_path / "clips.parquet.work/unusable.jsonl").read_text().splitlines()
    assert len(lines) + len({row["file_name"] for row in rows}) == 3
    assert any("took more than" in json.loads(line)["reason"] for line in lines)
    assert len(run(films, output, "data.num_workers=2")) == 5
    assert not (tmp_path / "clips.parquet.work/unusable.jsonl").exists()


def test_unusable_files_are_listed_and_the_others_prepared(films, tmp_path, capsys):
    (films / "bad.mp4").write_bytes(b"no video")
    (films / "empty.mp4").touch()
    (films / "c.txt").write_bytes(b"caf\xe9")
    rows = run(films, tmp_path / "clips.parquet")
    assert len(rows) == 5
    lines = (tmp_path / "clips.parquet.work/unusable.jsonl").read_text().splitlines()
    assert [os.path.basename(json.loads(line)["path"]) for line in lines] == ["bad.mp4", "c.png", "empty.mp4"]
    assert "3 problems" in capsys.readouterr().err


def test_captions_replace_text_and_are_asked_for_once(films, tmp_path):
    output = tmp_path / "clips.parquet"
    with serve(lambda number: reply(f"caption {number}")) as endpoint:
        rows = run(films, output, *caption_words(endpoint))
        assert sorted(row["text"] for row in rows) == [f"caption {number}" for number in range(5)]
        assert sorted(len(body["messages"][0]["content"]) - 1 for body in endpoint.requests) == [1, 2, 2, 2, 2]
        assert run(films, output, *caption_words(endpoint)) == rows
        assert len(endpoint.requests) == 5
        assert endpoint.max_at_once <= 4
        run(films, output, *caption_words(endpoint, "--caption-prompt=In one word."))
        assert len(endpoint.requests) == 10
    assert [row["text"] for row in run(films, output)][:3] == ["a film"] * 3


def test_a_failing_endpoint_loses_nothing(films, tmp_path, monkeypatch, opened):
    monkeypatch.setattr(captions, "NUM_RETRIES", 0)
    output = tmp_path / "clips.parquet"
    one_by_one = "--caption-requests=1"
    answers = [reply("first"), error(500), reply("third"), HANG, error(429)]
    with serve(lambda number: answers[number]) as endpoint, pytest.raises(UserError, match="3 scenes"):
        run(films, output, *caption_words(endpoint, one_by_one, "--caption-timeout=0.3"))
    rows = pq.read_table(output).to_pylist()
    assert [row["text"] for row in rows] == ["first", None, "third", None, None]
    assert all(row["motion"] is not None for row in rows if row["type"] == "video")
    opened.clear()
    with serve(lambda number: reply(f"later {number}")) as endpoint:  # at another address
        rows = run(films, output, *caption_words(endpoint, one_by_one))
    assert [row["text"] for row in rows] == ["first", "later 0", "third", "later 1", "later 2"]
    assert opened == []


def test_captioning_gives_up_on_a_dead_endpoint(films, tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "NUM_RETRIES", 0)
    monkeypatch.setattr(captioning, "MAX_FAILURES", 2)
    with serve(error(500)) as endpoint, pytest.raises(UserError, match="5 scenes"):
        run(films, tmp_path / "clips.parquet", *caption_words(endpoint, "--caption-requests=1"))
    assert len(endpoint.requests) <= 3
    with serve(error(401)) as endpoint, pytest.raises(UserError, match="OPENAI_API_KEY"):
        run(films, tmp_path / "clips.parquet", *caption_words(endpoint, "--caption-requests=1"))
    assert len(endpoint.requests) == 1


def test_ranges_of_a_table_are_cut_and_conditioning_images_stay_with_the_first_scene(films, tmp_path):
    lines = [
        {"file_name": "a.mp4", "text": "x", "start_s": 0.0, "end_s": 1.0, "image": "c.png"},
        {"file_name": "a.mp4", "text": "y", "start_s": 1.4},
    ]
    (films / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = run(films, tmp_path / "clips.parquet")
    assert [(row["text"], row["start_s"], row["end_s"], row["image"]) for row in rows] == [
        ("x", 0.0, 0.6, "films/c.png"),
        ("x", 0.6, 1.0, None),
        ("y", 1.4, 2.0, None),
    ]


@pytest.mark.parametrize("layout", ["folder", "tar", "table"])
def test_a_control_video_stays_with_every_scene_of_its_file(films, tmp_path, layout):
    path, control, words = films, films / "a.control.mp4", []
    shutil.copy(films / "more/b.mp4", control)
    content = control.read_bytes()
    if layout == "tar":
        path = films / "films.tar"
        with tarfile.open(path, "w") as tar:
            for name in ("a.mp4", "a.control.mp4", "c.png"):
                tar.add(films / name, name)
    elif layout == "table":
        (tmp_path / "poses").mkdir()
        control = control.rename(tmp_path / "poses/a.mp4")
        lines = [{"file_name": "a.mp4", "pose": str(control)}, {"file_name": "c.png", "pose": None}]
        (films / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        words = ["data.columns={control: pose}"]
    rows = run(path, tmp_path / "clips.parquet", *words)
    entries = list(iter_entries(DataSet(str(tmp_path / "clips.parquet")), need_captions=False))
    controls = [(entry.start_s, entry.control_path and read_bytes(entry.control_path)) for entry in entries]
    assert controls[:4] == [(0.0, content), (0.6, content), (1.2, content), (None, None)]
    if layout != "tar":
        assert rows[0]["control"] == str(control.relative_to(tmp_path))
    after = run(tmp_path / "clips.parquet", tmp_path / "again.parquet", "--no-cuts")
    assert [row["control"] for row in after] == [row["control"] for row in rows]


def test_a_table_without_controls_has_no_column_for_them(films, tmp_path):
    assert "control" not in run(films, tmp_path / "clips.parquet")[0]


def test_the_name_of_a_control_that_is_not_utf8(films, tmp_path):
    (films / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "control": "\udcff.mp4"}))
    rows = run(films, tmp_path / "clips.parquet")
    assert [row["control"] for row in rows] == ["films/\\udcff.mp4"] * 3


@pytest.mark.parametrize("place", ["tar", "url", "tar behind a url"])
def test_films_in_tar_files_and_behind_urls(tmp_path, film, opened, place):
    folder, output = tmp_path / "films", tmp_path / "clips.parquet"
    folder.mkdir()
    if "tar" in place:
        with tarfile.open(folder / "films.tar", "w") as tar:
            tar.add(film, "a.mp4")
            (tmp_path / "a.txt").write_text("a film")
            tar.add(tmp_path / "a.txt", "a.txt")
    else:
        shutil.copy(film, folder / "a.mp4")
        (folder / "a.txt").write_text("a film")
    server = FileServer(folder) if "url" in place else None
    root = server.url if server else folder
    try:
        rows = run(f"{root}/films.tar" if "tar" in place else root, output)
        assert [(row["start_s"], row["end_s"], row["text"]) for row in rows] == [
            (0.0, 0.6, "a film"), (0.6, 1.2, "a film"), (1.2, 2.0, "a film"),
        ]  # fmt: skip
        # Where the table is, its paths lead to the frames.
        entries = list(iter_entries(DataSet(str(output))))
        assert entries[1].path.startswith(str(root))
        clip = read_clip(entries[1].path, ClipShape(4, HEIGHT, WIDTH), 25, entries[1].start_s, entries[1].end_s)
        assert read_numbers(clip) == [15, 16, 17, 18]
        opened.clear()
        assert run(f"{root}/films.tar" if "tar" in place else root, output) == rows
        assert opened == []
    finally:
        if server:
            server.close()


def test_a_server_that_fails_is_asked_again_by_the_next_run(tmp_path, film, monkeypatch):
    from cogds.data.storage import requests

    monkeypatch.setattr(requests, "GIVE_UP_S", 0.2)
    (tmp_path / "films").mkdir()
    shutil.copy(film, tmp_path / "films/a.mp4")
    server, output = FileServer(tmp_path / "films"), tmp_path / "clips.parquet"
    try:
        (tmp_path / "list.jsonl").write_text(json.dumps({"file_name": f"{server.url}/a.mp4"}))
        server.status = 503
        assert run(tmp_path / "list.jsonl", output) == []
        assert "503" in (tmp_path / "clips.parquet.work/unusable.jsonl").read_text()
        server.status = None
        assert len(run(tmp_path / "list.jsonl", output)) == 3
    finally:
        server.close()


def test_settings_of_the_dataset_and_several_captions(films, tmp_path):
    lines = [
        {"id": "a", "captions": ["one", "two"], "score": 5},
        {"id": "more/b", "captions": ["three"], "score": 4},
        {"id": "a", "captions": ["four"], "score": 1},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = (f"data.root={films}", "data.path_template={id}.mp4", "data.where=score > 2", "--no-cuts")
    rows = run(tmp_path / "list.jsonl", tmp_path / "clips.parquet", *words)
    assert [(row["file_name"], row["text"], row["captions"], row["id"], row["score"]) for row in rows] == [
        ("films/a.mp4", "one", ["two"], "a", 5),
        ("films/more/b.mp4", "three", None, "more/b", 4),
    ]
    entries = list(iter_entries(DataSet(str(tmp_path / "clips.parquet"))))
    assert [(entry.caption, entry.more_captions) for entry in entries] == [("one", ("two",)), ("three", ())]
    with serve(reply("A film.")) as endpoint:
        rows = run(tmp_path / "list.jsonl", tmp_path / "clips.parquet", *words, *caption_words(endpoint))
    assert [(row["text"], "captions" in row) for row in rows] == [("A film.", False)] * 2


def test_an_animated_image_is_cut_as_a_video(tmp_path):
    (tmp_path / "films").mkdir()
    pictures = [Image.fromarray(picture) for number in (0, 1) for picture in scene(number, 6)]
    pictures[0].save(tmp_path / "films/a.webp", save_all=True, append_images=pictures[1:], duration=100, lossless=True)
    rows = run(tmp_path / "films", tmp_path / "clips.parquet")
    assert [(row["type"], row["start_s"], row["end_s"]) for row in rows] == [("image", 0.0, 0.6), ("image", 0.6, 1.2)]
    assert all(row["motion"] > 0 for row in rows)


def test_columns_that_were_not_read_are_not_read_from_the_new_table(films, tmp_path):
    lines = [{"file_name": "a.mp4", "text": "x", "clips": [0, 1], "captions": ["y"], "prompts": ["z"]}]
    (films / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(films, tmp_path / "clips.parquet", "data.columns={spans: null, captions: null}", "--no-cuts")
    (entry,) = iter_entries(DataSet(str(tmp_path / "clips.parquet")))
    assert (entry.start_s, entry.end_s, entry.caption, entry.more_captions) == (0.0, 2.0, "x", ())


def test_the_other_columns_of_a_table_are_kept(films, tmp_path):
    lines = [
        {"clip": "a.mp4", "alt": "x", "aesthetic": 5.5, "source": {"id": 1}, "sharpness": 1.0, "mixed": 1},
        {"clip": "more/b.mp4", "alt": None, "aesthetic": None, "tags": ["a", "b"], "mixed": "two"},
    ]
    (films / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns = "data.columns={path: clip, caption: alt}"
    rows = run(films, tmp_path / "clips.parquet", columns)
    assert [row["aesthetic"] for row in rows] == [5.5, 5.5, 5.5, None]
    assert [row["source"] for row in rows] == [{"id": 1}] * 3 + [None]
    assert [row["tags"] for row in rows] == [None] * 3 + [["a", "b"]]
    assert [row["mixed"] for row in rows] == ["1"] * 3 + ['"two"']
    assert [row["sharpness"] for row in rows] == [1.0] * 3 + [None]  # not computed, so kept
    assert not {"clip", "alt"} & rows[0].keys()
    rows = run(films, tmp_path / "clips.parquet", columns, "--scores=sharpness")
    assert all(row["sharpness"] not in (None, 1.0) for row in rows)


def test_numbers_of_a_csv_are_numbers_and_names_are_not(films, tmp_path):
    (films / "metadata.csv").write_text("file_name,score,id,empty\na.mp4,0.25,007,\nmore/b.mp4,-3,008,\n")
    rows = run(films, tmp_path / "clips.parquet", "--no-cuts")
    assert [(row["score"], row["id"]) for row in rows] == [(0.25, "007"), (-3, "008")]


def test_a_prepared_table_can_be_captioned_later_and_keeps_its_scores(films, tmp_path):
    first, second = tmp_path / "clips.parquet", tmp_path / "captioned.parquet"
    shutil.copy(films / "more/b.mp4", films / "more/copy.mp4")
    before = run(films, first)
    with serve(reply("A film.")) as endpoint:
        after = run(first, second, *caption_words(endpoint, "--no-cuts", "--scores=none"))
    assert any(row["duplicate_of"] for row in before)
    assert [row | {"text": "A film."} for row in before] == after


@pytest.mark.parametrize(
    "path, output, key",
    [
        ("films", "films/clips.parquet", "--output"),
        ("films", "clips.csv", "--output"),
        ("other.parquet", "other.parquet", "--output"),
        ("missing", "clips.parquet", "data.path"),
    ],
)
@pytest.mark.usefixtures("films")
def test_what_cannot_work_is_refused_at_once(tmp_path, opened, path, output, key):
    with pytest.raises(UserError, match=f"^{key}: "):
        run(tmp_path / path, tmp_path / output)
    assert opened == []


def test_only_one_run_at_a_time_writes_a_table(films, tmp_path, opened, monkeypatch):
    monkeypatch.setattr(run_lock.hold_run_lock.__wrapped__, "__defaults__", (0.0, "output_dir"))
    folder = tmp_path / "clips.parquet.work"
    folder.mkdir()
    with (
        run_lock.hold_run_lock(World(0, 1, 0, 1), folder),
        pytest.raises(UserError, match=r"^--output: another run"),
    ):
        run(films, tmp_path / "clips.parquet")
    assert opened == []


def test_a_table_of_something_else_is_not_replaced(films, tmp_path, opened):
    output = tmp_path / "clips.parquet"
    own = np.random.default_rng(0).bytes(100)
    output.write_bytes(own)
    with pytest.raises(UserError, match=r"^--output: .*would be replaced"):
        run(films, output)
    assert output.read_bytes() == own
    assert opened == []


@pytest.mark.parametrize(
    "words, key",
    [
        (["--caption-url=http://localhost:1/v1"], "--caption-model"),
        (["--caption-model=a"], "--caption-url"),
        (["--scores=motion,blur"], "command line"),
        (["--min-scene=3", "--max-scene=2"], "--max-scene"),
    ],
)
def test_contradicting_flags_are_refused(films, tmp_path, words, key):
    with pytest.raises(UserError, match=f"^{key}: "):
        run(films, tmp_path / "clips.parquet", *words)


def test_a_missing_library_is_named(monkeypatch):
    args = parse_args("prepare", ["--output=clips.parquet", "data.path=films"])
    monkeypatch.setattr(main.importlib.util, "find_spec", lambda name: None if name == "rapidocr" else name)
    with pytest.raises(UserError, match=r"rapidocr .*cogds\[prepare\]"):
        main.check_libraries(args)
    args.scores = ("motion",)
    main.check_libraries(args)


def test_a_dataset_must_be_named():
    with pytest.raises(UserError, match=r"^data\.path: not set"):
        check_dataset(load_config(str(shipped_config("run_configs", "demo.yaml")), [])[0].data)

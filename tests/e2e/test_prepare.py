"""The prepare verb as a user runs it: real films, on one rank and two, killed and restarted, then trained."""

import random
import shutil
from collections import Counter

import av
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT
from tests.prepare.endpoint import error, reply, serve
from tests.prepare.films import ffmpeg

pytestmark = [pytest.mark.dist, pytest.mark.slow]
LAUNCH, SCRIPT = ROOT / "launch/prepare.py", ROOT / "tests/e2e/prepare_script.py"
NAMES = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")


def num_frames(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture(scope="module")
def films(real_clips, tmp_path_factory):
    """Folder of real clips, and of a film that joins three of them with hard cuts."""
    folder = tmp_path_factory.mktemp("data") / "films"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(real_clips / name, folder)
    inputs = [word for name in NAMES for word in ("-i", real_clips / name)]
    parts = [f"[{k}:v]trim=end_frame=28,setpts=PTS-STARTPTS,fps=25,scale=320:180,setsar=1[p{k}]" for k in range(3)]
    joined = f"{';'.join(parts)};[p0][p1][p2]concat=n=3[film]"
    ffmpeg(*inputs, "-filter_complex", joined, "-map", "[film]", folder / "film.mp4")
    (folder / "film.txt").write_text("three scenes")
    return folder


def prepare(warm, films, output, *words, ranks=1, script=LAUNCH, check=True, **options):
    arguments = [f"data.path={films}", "--output", output, "data.num_workers=2", "--min-scene=0.5", *words]
    done = warm(script, arguments, ranks=ranks, **options)
    if check and done.returncode:
        pytest.fail(done.stdout[-4000:])
    return done


@pytest.fixture(scope="module")
def table(warm, films):
    """The table of one rank with all scores."""
    output = films.parent / "clips.parquet"
    prepare(warm, films, output)
    return output


def test_the_cuts_are_the_true_ones_and_nothing_is_encoded(films, table, real_clips):
    rows = pq.read_table(table).to_pylist()
    found = {}
    for row in rows:
        found.setdefault(row["file_name"].removeprefix("films/"), []).append(round(row["start_s"] * 25))
    assert found == {
        "bigbuckbunny.mp4": [0],
        "bikes.mp4": [0, 30, 76, 137, 187],  # the sixth scene has 8 frames
        "carphone_pristine.mp4": [0],
        "film.mp4": [0, 28, 56],
    }
    assert [row["text"] for row in rows if "film.mp4" in row["file_name"]] == ["three scenes"] * 3
    for name in NAMES:
        assert (films / name).read_bytes() == (real_clips / name).read_bytes()
    assert {path.suffix for path in films.parent.rglob("*") if path.is_file()} == {
        *(".mp4", ".txt"),
        *(".parquet", ".arrow", ".lock"),
    }
    assert len(list(films.parent.rglob("*.mp4"))) == 4


def test_two_ranks_write_the_same_table(warm, films, table):
    output = table.with_name("two.parquet")
    prepare(warm, films, output, ranks=2)
    assert output.read_bytes() == table.read_bytes()


def test_killed_at_any_time_and_resumed_the_table_is_the_same(warm, films, table, tmp_path):
    """SIGKILL of all ranks at random times, then an uninterrupted run on another number of ranks."""
    output, log = table.with_name("killed.parquet"), tmp_path / "log"
    log.touch()
    env = {"PREPARED": str(log)}
    moments, longest_s = random.Random(1), 4.0
    num_cut = []
    for _ in range(6):
        options = {"kill_after_s": moments.random() * longest_s, "check": False}
        prepare(warm, films, output, "data.num_workers=0", script=SCRIPT, ranks=2, env=env, **options)
        num_cut.append(len(log.read_text().splitlines()))
        longest_s *= 1 if num_cut[-1] else 2  # adapts to the speed of this machine
    assert any(0 < num < 4 for num in num_cut)  # some kills interrupt the cutting
    prepare(warm, films, output, "data.num_workers=0", script=SCRIPT, ranks=1, env=env)
    assert output.read_bytes() == table.read_bytes()
    before = Counter(log.read_text().splitlines())
    prepare(warm, films, output, "data.num_workers=0", script=SCRIPT, ranks=2, env=env)
    assert Counter(log.read_text().splitlines()) == before
    assert output.read_bytes() == table.read_bytes()
    assert [path.name for path in output.with_name(f"{output.name}.work").iterdir() if ".tmp" in path.name] == []


def test_captions_on_two_ranks_survive_a_failing_endpoint(warm, films, table):
    output = table.with_name("captioned.parquet")

    def caption(endpoint):
        words = ["--caption-url", endpoint.url, "--caption-model", "stub", "--caption-frames", 2]
        return prepare(warm, films, output, *words, ranks=2, check=False)

    # Each rank's client retries after an error 500 or 429.
    with serve(lambda number: error((500, 429)[number % 2]) if number < 4 else error(400)) as endpoint:
        done = caption(endpoint)
    assert done.returncode == 2
    assert "--caption-url: 10 scenes without a caption" in done.stdout
    assert [row["text"] for row in pq.read_table(output).to_pylist()] == [None] * 10
    with serve(lambda number: reply(f"caption {number}")) as endpoint:
        done = caption(endpoint)
    assert done.returncode == 0, done.stdout[-4000:]
    assert sorted(row["text"] for row in pq.read_table(output).to_pylist()) == [f"caption {k}" for k in range(10)]


def test_the_table_trains(table, tiny_model, tmp_path, run_train):
    words = [
        f"model.path={tiny_model}", f"data.path={table}", f"data.cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'run'}", "data.buckets=[9x48x80]", "data.default_caption=a film",
        "train.num_steps=2", "train.precision=fp32",
    ]  # fmt: skip
    done = run_train("--deepspeed", "ds_configs/zero2.json", *words, launcher="warm", ranks=1)
    assert "10 of 10 clips" in done.stdout

import dataclasses
import io
import json
import re
import sys

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from cogds.arguments import parse_args
from cogds.core.buckets import crop_share
from cogds.core.geometry import ClipShape, cached_caption_bytes, cached_clip_bytes
from cogds.core.memory import ZeroSettings
from cogds.core.plan import Plan
from cogds.errors import UserError
from cogds.formatting import gigabytes
from cogds.report.analysis import Captions, ClipTable, Rates, TrainingSetup, make_report, read_rates
from cogds.report.html import crop_picture, html_page, printable, sample_sheets, write_html
from cogds.report.text import print_report, short_report
from tests.conftest import ROOT, run_command
from tests.published_model import V15, published_memory

BUCKETS = tuple(map(ClipShape.parse, ("49x768x1360", "81x768x1360", "81x1360x768")))
GOOD = Captions(num_missing=0, num_empty=0, num_too_long=0, num_distinct=4, limit=226)
EVIL = ("<script>alert(1)</script>.mp4", '"><img src=x onerror=alert(2)>.mp4', "{{ 7*7 }} [bold]'&.mp4")


def table(rows):
    """rows: (path, frames, height, width, bucket, reason); a reason makes the clip unusable."""
    columns = {
        "path": [row[0] for row in rows],
        "kind": ["video"] * len(rows),
        "frames": [row[1] for row in rows],
        "fps": [16.0] * len(rows),
        "width": [row[3] for row in rows],
        "height": [row[2] for row in rows],
        "rotation": [0] * len(rows),
        "duration_s": [(row[1] or 0) / 16 for row in rows],
        "caption": [f"caption of {row[0]}" for row in rows],
        "status": ["unusable" if row[5] else "ok" for row in rows],
        "reason": [row[5] for row in rows],
        "start_s": [0.0] * len(rows),
        "end_s": pa.nulls(len(rows), pa.float64()),
        "set": pa.array([0] * len(rows), pa.int16()),
    }
    buckets, frames = np.array([row[4] for row in rows], np.int16), np.array([row[1] or 0 for row in rows])
    return ClipTable(pa.table(columns), buckets, frames)


ROWS = [
    ("/clips/a.mp4", 98, 768, 1360, 0, None),
    ("/clips/b.mp4", 81, 1080, 1920, 1, None),
    ("/clips/c.mp4", 162, 480, 640, 1, None),
    ("/clips/d.mp4", 81, 1920, 1080, 2, None),
    ("/clips/short.mp4", 20, 768, 1360, -1, None),
    ("/clips/x.mp4", None, None, None, -1, "cannot be opened: no such stream"),
    ("/clips/y.mp4", None, None, None, -1, "cannot be opened: truncated"),
    ("/clips/z.mp4", 90, 768, 1360, -1, "no caption"),
]


MEMORY = published_memory(zero=ZeroSettings(stage=2, reduce_bucket_size=9_437_184), num_ranks=2, buckets=BUCKETS)


def setup(**changes):
    """The setup of a run. Changes may be fields of the memory model, too."""
    ours = TrainingSetup(MEMORY, batch_sizes=(2, 1, 1), accumulation=2, checkpointing=("full",) * 3)
    of_memory = {name: changes.pop(name) for name in list(changes) if name in MEMORY.__dataclass_fields__}
    return dataclasses.replace(ours, memory=dataclasses.replace(MEMORY, **of_memory), **changes)


def report(rows=ROWS, captions=GOOD, **changes):
    return make_report(table(rows), setup(**changes), captions)


def test_every_bucket_is_counted():
    first, second, third = report().buckets
    assert [one.num_clips for one in (first, second, third)] == [1, 2, 1]
    assert first.num_tokens == 7 * 48 * 85 + 226
    assert (first.micro_steps, first.steps) == (1, 1 / 2)  # one clip: the second rank trains a copy
    assert (second.micro_steps, second.steps) == (1, 1 / 2)
    expected = [crop_share(1080, 1920, BUCKETS[1]), crop_share(480, 640, BUCKETS[1])]
    assert second.crop_share == pytest.approx(sum(expected) / 2)
    assert [one.upscaled_share for one in (first, second, third)] == [0, 0.5, 0]
    assert first.unused_share == pytest.approx(0.5)
    assert second.unused_share == pytest.approx((0 + 0.5) / 2)
    assert second.cache_bytes == 2 * cached_clip_bytes(BUCKETS[1], V15, 2)
    assert first.memory.kept_activations_bytes > second.memory.kept_activations_bytes  # its batch is two
    assert (first.step_s, first.step_is_measured) == (None, False)


def test_totals():
    found = report()
    assert (found.num_rows, found.num_clips, found.num_unusable) == (8, 4, 4)
    assert found.steps_per_epoch == 3 / 2
    assert found.caption_cache_bytes == 4 * cached_caption_bytes(V15, 4096, 2)
    assert found.cache_bytes == found.caption_cache_bytes + sum(one.cache_bytes for one in found.buckets)
    assert found.largest is found.buckets[0]
    assert found.epoch_s is None
    assert report(is_cached=False).cache_bytes == 0


def test_reasons_are_counted_by_phrase_with_examples():
    reasons = {one.phrase: one for one in report().reasons}
    assert {phrase: one.num_clips for phrase, one in reasons.items()} == {
        "cannot be opened": 2, "no caption": 1, "too short": 1,
    }  # fmt: skip
    assert reasons["cannot be opened"].examples == ("/clips/x.mp4", "/clips/y.mp4")
    assert reasons["too short"].examples == ("/clips/short.mp4",)
    many = [*ROWS, *((f"/clips/{n}.mp4", 1, 1, 1, -1, f"odd {n}") for n in range(40))]
    found = report(many)
    assert sum(one.num_clips for one in found.reasons) + found.num_other_reasons == found.num_unusable == 44


@pytest.mark.parametrize("num_ranks", [1, 4, 16])
def test_steps_are_those_of_the_plan(num_ranks):
    rows = [(f"/{n}.mp4", 81, 768, 1360, n % 7 % 3, None) for n in range(23)]
    found = report(rows, num_ranks=num_ranks)
    plan = Plan(tuple(one.num_samples for one in found.buckets), (2, 1, 1), num_ranks, 2, 0)
    assert found.steps_per_epoch == pytest.approx(plan.steps_per_epoch)


def test_windows_and_repeats():
    clips = dataclasses.replace(table(ROWS), num_windows=np.array([2, 1, 2, 1, 0, 0, 0, 0]))
    found = make_report(clips, setup(), GOOD)
    assert [one.num_samples for one in found.buckets] == [2, 3, 1]
    assert [one.unused_share for one in found.buckets] == [0, 0, 0]
    assert found.buckets[1].cache_bytes == 3 * cached_clip_bytes(BUCKETS[1], V15, 2)
    repeated = make_report(clips, setup(epoch_sizes=(20.0, 3.0, 1.0)), GOOD)
    assert repeated.buckets[0].micro_steps == 5  # of 2 ranks x 2 clips
    assert repeated.buckets[0].num_samples == 2  # what is encoded does not grow with repeats


def test_pieces_of_the_table_add_up(monkeypatch):
    whole = report()
    monkeypatch.setattr("cogds.report.analysis.ROWS_AT_ONCE", 3)
    assert report() == whole


def test_a_dataset_without_a_clip():
    found = report([ROWS[-1]])
    assert (found.num_clips, found.largest, found.suggestion) == (0, None, None)
    assert short_report(found)
    page = html_page(found, table([ROWS[-1]]), no_frame)
    assert page.count("<svg ") == page.count("<img ") == 0
    assert report([]).num_rows == 0


def test_rates_of_an_earlier_run(tmp_path):
    lines = [{"perf/tokens_per_s": 9e9, "perf/step_s": 9e9, "train/loss/bucket=81x768x1360": 1.0}] * 5
    one = {"train/loss/bucket=81x768x1360": 1.0, "train/loss/t_q1": 1.0}
    lines += [{"perf/tokens_per_s": 1000.0, "perf/step_s": 40.0 + n, **one} for n in range(3)]
    lines += [{"perf/tokens_per_s": 1000.0, "perf/step_s": 60.0, **one, "train/loss/bucket=49x768x1360": 1.0}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": n, **line}) + "\n" for n, line in enumerate(lines)) + '{"step": 9')
    rates = read_rates(file)
    assert rates == Rates(1000.0, {"81x768x1360": 41.0}, str(file))
    found = report(rates=rates)
    assert (found.buckets[1].step_s, found.buckets[1].step_is_measured) == (41.0, True)
    assert found.buckets[0].step_s == pytest.approx((7 * 48 * 85 + 226) * 2 * 2 * 2 / 1000)
    assert not found.buckets[0].step_is_measured
    assert found.epoch_s == pytest.approx(sum(one.steps * one.step_s for one in found.buckets))
    assert read_rates(tmp_path / "none.jsonl") is None
    file.write_text("")
    assert read_rates(file) is None


def test_better_buckets_are_suggested_only_where_the_given_ones_fit_badly():
    assert report(ROWS[:2] * 20).suggestion is None
    portrait = [(f"/{n}.mp4", 90, 1920, 1080, 0, None) for n in range(20)]
    found = report(portrait, buckets=BUCKETS[1:2], batch_sizes=(1,)).suggestion
    assert found
    assert found.after.crop < 0.02 < 0.6 < found.before.crop
    assert "data.buckets=[81x1360x768]" in printed(report(portrait, buckets=BUCKETS[1:2], batch_sizes=(1,)))


@pytest.mark.usefixtures("no_plots")
def test_the_given_buckets_have_one_share_of_upscaled_clips():
    """A clip that is too short, and sizes that the suggestion's counting rounds, do not make a second figure."""
    rows = [(f"/{n}.mp4", 90, 477 if n else 1080, 640 if n else 1920, 0, None) for n in range(4)]
    rows += [("/short.mp4", 5, 477, 640, -1, None)]
    found = report(rows, buckets=(ClipShape(81, 480, 640),), batch_sizes=(1,))
    assert found.suggestion
    assert found.upscaled_share == 0.75
    for text in (printed(found), html_page(found, table(rows), no_frame)):
        assert set(re.findall(r"(\d+)% of the clips upscaled", text)) == {"75"}


def test_the_short_form_is_short():
    found = report(captions=Captions(3, 1, 2, 4, 226), gpu_bytes=80e9)
    lines, memory = short_report(found).splitlines(), gigabytes(found.largest.memory.total_bytes)
    assert len(lines) <= 8
    for expected in ("4 of 8 clips", "2 x cannot be opened", "3 clips", "2 captions", "226 tokens", memory):
        assert any(expected in line for line in lines), expected


@pytest.mark.usefixtures("no_plots")
def test_buckets_without_clips_are_one_line():
    found = report(ROWS[1:3])
    text = printed(found)
    (line,) = (line for line in text.splitlines() if "49x768x1360" in line and "data.buckets" not in line)
    assert "81x1360x768" in line
    page = html_page(found, table(ROWS[1:3]), no_frame)
    assert re.findall(r'<th scope="row">(\d+x\d+x\d+)</th>', page) == ["81x768x1360"]


def test_one_step_is_singular():
    found = report(ROWS[:1], batch_sizes=(1, 1, 1), accumulation=1)
    assert found.steps_per_epoch == 1
    assert "1 step per epoch" in short_report(found)


def printed(found, **console):
    file = io.StringIO()
    print_report(found, Console(file=file, **console))
    return file.getvalue()


def test_tables_are_plain_where_there_is_no_terminal():
    text = printed(report())
    assert "\x1b" not in text
    assert text.isascii()
    assert re.search(r"81x768x1360 +2 +2 +45,106 +1 +1 +0\.5 .*not measured\n", text)
    assert "kept activations" in text
    assert "\x1b" in printed(report(), force_terminal=True, width=200)


@pytest.mark.usefixtures("no_plots")
def test_pinned_host_memory_is_said_where_there_is_any():
    offloaded = report(ROWS[1:3], checkpointing=("full+offload",) * 3)
    assert offloaded.buckets[1].pinned_bytes == pytest.approx(42 * 264 * 2**20, rel=0.01)  # 42 blocks' inputs
    assert re.search(r"pinned .* 11\.6 GB", printed(offloaded))
    assert re.search(r"pinned .*</th><td>11\.6 GB", html_page(offloaded, table(ROWS), no_frame))
    assert "pinned" not in printed(report()) + html_page(report(), table(ROWS), no_frame)


@pytest.mark.usefixtures("no_plots")
def test_what_does_not_fit_is_said_with_what_would():
    found = report(gpu_bytes=24e9)
    sentence = found.buckets[1].shortfall
    assert all(part in sentence for part in ("81x768x1360", "31.6 GB", "24.0 GB"))
    assert "train.activation_checkpointing=full+offload (20.5 GB)" in sentence
    assert sentence in short_report(found)
    assert re.search(r"81x768x1360 .* full +31\.6 GB, too much", printed(found))
    assert "<td>full</td><td>31.6 GB, too much</td>" in html_page(found, table(ROWS), no_frame)
    # A bucket without clips may be too large.
    unused = report(ROWS[:1], batch_sizes=(1, 9, 9), gpu_bytes=80e9)
    assert unused.buckets[1].shortfall
    assert "train.activation_checkpointing=selective" not in short_report(unused)
    assert [bucket.shortfall for bucket in report(gpu_bytes=80e9).buckets] == [""] * 3
    assert "80.0 GB" in printed(report(gpu_bytes=80e9))


def test_what_files_are_called_is_shown_and_never_obeyed():
    rows = [(path, None, None, None, -1, "cannot be opened: [red]x") for path in ("/a/[bold]b.mp4", "/a/\x1b[31mc.mp4")]
    text = printed(report([*ROWS, *rows]), force_terminal=True, width=200)
    assert "[bold]b.mp4" in text
    assert "\x1b[31mc" not in text


def no_frame(*_):
    return None


@pytest.fixture
def no_plots(monkeypatch):
    """Plots take a second per page."""
    monkeypatch.setattr("cogds.report.html.make_plots", lambda *_: [])


def test_the_page_escapes_names_and_captions():
    rows = [(f"/clips/{name}", 81, 768, 1360, 1, None) for name in EVIL]
    rows += [(f"/{name}", None, None, None, -1, f"{EVIL[0]}: {EVIL[1]}") for name in EVIL]
    page = html_page(report(rows), table(rows), no_frame, name=EVIL[0])
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
    assert "{{ 7*7 }} [bold]&#39;&amp;.mp4" in page


def test_the_page_refers_to_nothing_outside_itself():
    page = html_page(report(), table(ROWS), lambda *size: np.zeros((*size[-2:], 3), np.uint8))
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    addresses = set(re.findall(r"""(?:src|href|url|action|srcset)\s*[=(]\s*["']?([^"'\s>)]+)""", page))
    assert addresses
    assert {one for one in addresses if not one.startswith(("#", "data:image/jpeg;base64,"))} == set()
    # Names of XML vocabularies are the only addresses left, and no browser fetches those.
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names))
    assert all(re.search(r' (?:alt|aria-label)="[^"]+"', tag) for tag in re.findall(r"<(?:img|svg) [^>]*>", page))
    assert page.count("<svg ") == 4


def test_a_clip_that_cannot_be_read_costs_one_tile():
    def frame(path, kind, start_s, height, width):
        assert (kind, start_s) == ("video", 0.0)
        assert max(height, width) == 260
        return None if path.endswith(("b.mp4", "c.mp4")) else np.full((height, width, 3), 200, np.uint8)

    sheets = sample_sheets(report(), table(ROWS), frame, seed=0)
    assert [len(sheet.tiles) for sheet in sheets] == [1, 2, 1]
    assert [bool(tile.picture) for sheet in sheets for tile in sheet.tiles] == [True, False, False, True]
    assert sheets[0].tiles[0].note == "1360 × 768, 0% cropped away"
    small = sample_sheets(report(), table(ROWS), lambda *size: np.zeros((*size[-2:], 3), np.uint8), seed=0)[1].tiles[1]
    assert small.note == "640 × 480, 25% cropped away, upscaled"


def test_samples_follow_from_the_seed():
    rows = [(f"/clips/{n}.mp4", 81, 768, 1360, 1, None) for n in range(500)]

    def names(seed):
        return [tile.name for tile in sample_sheets(report(rows), table(rows), no_frame, seed)[0].tiles]

    assert names(1) == names(1) != names(2)
    assert len(names(1)) == 4


def test_the_picture_shows_what_is_cut_away():
    frame = np.full((200, 400, 3), 255, np.uint8)
    picture = crop_picture(frame, ClipShape(81, 200, 200))
    row = np.asarray(picture)[picture.height // 2, :, 0]
    assert picture.size == (400, 200)
    assert (row < 100).sum() == 200
    assert (row[104:296] == 255).all()
    assert (np.asarray(crop_picture(frame, ClipShape(81, 400, 800)))[4:-4, 4:-4] == 255).all()


def test_control_characters_are_shown():
    assert printable("a\x00b\x1b[1m\u202ec") == "a\\x00b\\x1b[1m\\u202ec"


@pytest.mark.usefixtures("no_plots")
def test_the_file_is_whole(tmp_path):
    write_html(tmp_path / "report.html", report(), table(ROWS), no_frame)
    assert (tmp_path / "report.html").read_text().endswith("</html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_page_in_a_folder_that_does_not_exist_is_refused(tmp_path):
    assert parse_args("report", ["--html", str(tmp_path / "report.html")]).html == tmp_path / "report.html"
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "none"))):
        parse_args("report", ["--html", str(tmp_path / "none" / "report.html")])
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_command(tmp_path):
    """The demo, whose clips and model the command makes: tables, a page with pictures, nothing trained."""
    page = tmp_path / "report.html"
    done = run_command(
        [
            sys.executable, ROOT / "launch/report.py", "--num_gpus", 2, "--html", page,
            f"output_dir={tmp_path / 'run'}",
            f"data.path={tmp_path / 'clips'}", "data.draw_demo_clips=true", f"model.path={tmp_path / 'model'}",
            "model.create_tiny=true", f"data.cache_dir={tmp_path / 'cache'}",
        ],
        timeout_s=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert re.search(r"7 of 7 clips; 2 GPUs", done.stdout)
    assert page.read_text().count("data:image/jpeg;base64,") == 7
    assert not (tmp_path / "run").exists()
    refused = run_command([sys.executable, ROOT / "launch/report.py", "--num_gpus", 0], timeout_s=120)
    assert refused.returncode == 2
    assert "--num-gpus: 0" in refused.stdout


def test_what_is_held_out_is_neither_trained_nor_unusable():
    clips = dataclasses.replace(table(ROWS), num_held_out=2)
    found = make_report(clips, setup(max_unusable=0.4), GOOD)
    assert (found.num_rows, found.num_clips, found.num_unusable) == (10, 4, 4)
    assert not found.is_refused
    assert "2 clips held out" in short_report(found)
    assert "held out" not in short_report(report())


def test_an_axis_counts_whole_clips(monkeypatch):
    figures = []
    monkeypatch.setattr("cogds.report.plots.to_svg", lambda figure, _: figures.append(figure) or "")
    html_page(report(ROWS[:1]), table(ROWS[:1]), no_frame)
    _, lengths, samples, _ = figures
    for axis in (lengths.axes[0].yaxis, samples.axes[0].xaxis):
        assert all(tick == int(tick) for tick in axis.get_ticklocs())


def test_labels_of_buckets_do_not_overlap(monkeypatch):
    figures = []
    monkeypatch.setattr("cogds.report.plots.to_svg", lambda figure, _: figures.append(figure) or "")
    buckets = tuple(ClipShape(81, height, width) for height in range(704, 1024, 32) for width in range(704, 1024, 32))
    rows = [("/a.mp4", 81, 768, 1360, 0, None)]
    html_page(
        report(rows, buckets=buckets, batch_sizes=(1,) * 100, checkpointing=("full",) * 100), table(rows), no_frame
    )
    figure = figures[0]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) > 3
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    assert all(figure.bbox.fully_containsx(x) for box in boxes for x in (box.x0, box.x1))

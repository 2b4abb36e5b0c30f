"""The report: its numbers, its text, and its HTML page."""

import dataclasses
import io
import json
import re
import shutil
import sys
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from cogds import cli
from cogds.arguments import parse_args
from cogds.cli import main
from cogds.core.buckets import NO_IMAGE_BUCKET, crop_share
from cogds.core.checkpointing import BlockCheckpointing
from cogds.core.geometry import ClipShape, cached_caption_bytes, cached_clip_bytes
from cogds.core.memory import ZeroSettings
from cogds.core.plan import Plan
from cogds.errors import UserError
from cogds.formatting import duration, gigabytes
from cogds.model.load import find_model
from cogds.pages.page import printable
from cogds.report.analysis import (
    Captions,
    ClipTable,
    Rates,
    Reason,
    TrainingSetup,
    estimate_rates,
    make_report,
    read_rates,
)
from cogds.report.clips import ClipList, list_clips
from cogds.report.html import Pages, crop_picture, html_page, make_tiles, write_html
from cogds.report.main import count_captions
from cogds.report.text import print_report, short_report
from tests.conftest import ROOT, run_command
from tests.drawn import draw_clips
from tests.published_model import PUBLISHED, V15, published_memory

BUCKETS = tuple(map(ClipShape.parse, ("49x768x1360", "81x768x1360", "81x1360x768")))
GOOD = Captions(num_missing=0, num_empty=0, num_too_long=0, num_distinct=4, limit=226)
EVIL = ("<script>alert(1)</script>.mp4", '"><img src=x onerror=alert(2)>.mp4', "{{ 7*7 }} [bold]'&.mp4")


def table(rows):
    """Return a table of clips. rows: (path, frames, height, width, bucket, reason if unusable)."""
    columns = {
        "path": [row[0] for row in rows],
        "kind": ["video"] * len(rows),
        "frames": [row[1] for row in rows],
        "fps": [16.0] * len(rows),
        "width": [row[3] for row in rows],
        "height": [row[2] for row in rows],
        "rotation": [0] * len(rows),
        "processing": [""] * len(rows),
        "duration_s": [(row[1] or 0) / 16 for row in rows],
        "caption": [f"caption of {row[0]}" for row in rows],
        "more_captions": pa.nulls(len(rows), pa.large_list(pa.large_string())),
        "status": ["unusable" if row[5] else "ok" for row in rows],
        "reason": [row[5] for row in rows],
        "start_s": [0.0] * len(rows),
        "end_s": pa.nulls(len(rows), pa.float64()),
        "set": pa.array([0] * len(rows), pa.int16()),
        "digest": pa.array([row[0].encode().ljust(16)[-16:] for row in rows], pa.binary(16)),
        "motion": pa.nulls(len(rows), pa.float64()),
        "duplicate_of": pa.nulls(len(rows), pa.string()),
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
    """Return the setup of a run. changes: fields of it or of its memory model."""
    memory_changes = {name: changes.pop(name) for name in list(changes) if name in MEMORY.__dataclass_fields__}
    memory = dataclasses.replace(MEMORY, **memory_changes)
    return dataclasses.replace(TrainingSetup(memory, (2, 1, 1), 2, ("full",) * 3), **changes)


def report(rows=ROWS, captions=GOOD, **changes):
    return make_report(table(rows), setup(**changes), captions)


def test_numbers_of_each_bucket():
    first, second, _ = buckets = report().buckets
    assert [bucket.num_clips for bucket in buckets] == [1, 2, 1]
    assert first.num_tokens == 7 * 48 * 85 + 226
    assert (first.micro_steps, first.steps) == (1, 1 / 2)  # one clip: the second rank trains a copy
    assert (second.micro_steps, second.steps) == (1, 1 / 2)
    expected = [crop_share(1080, 1920, BUCKETS[1]), crop_share(480, 640, BUCKETS[1])]
    assert second.crop_share == pytest.approx(sum(expected) / 2)
    assert [bucket.upscaled_share for bucket in buckets] == [0, 0.5, 0]
    assert first.unused_share == pytest.approx(0.5)
    assert second.unused_share == pytest.approx((0 + 0.5) / 2)
    assert second.cache_bytes == 2 * cached_clip_bytes(BUCKETS[1], V15, 2)
    assert first.memory.kept_activations_bytes > second.memory.kept_activations_bytes  # its batch is two
    assert (first.step_s, first.step_is_measured) == (None, False)


def test_a_mirror_image_uses_no_other_frames():
    clips = dataclasses.replace(table(ROWS[:1]), num_windows=np.array([2]), num_mirrored=np.array([1]))
    (bucket, *_) = make_report(clips, setup(), GOOD).buckets
    assert bucket.num_samples == 2
    assert bucket.unused_share == pytest.approx(0.5)


def test_totals():
    result = report()
    assert (result.num_rows, result.num_clips, result.num_unusable) == (8, 4, 4)
    assert result.steps_per_epoch == 3 / 2
    assert result.caption_cache_bytes == 4 * cached_caption_bytes(V15, 4096, 2)
    assert result.cache_bytes == result.caption_cache_bytes + sum(bucket.cache_bytes for bucket in result.buckets)
    assert result.largest is result.buckets[0]
    assert result.epoch_s is None
    assert report(is_cached=False).cache_bytes == 0


def test_reasons_are_counted_by_phrase_with_examples():
    assert report().reasons == (
        Reason("cannot be opened", 2, ("/clips/x.mp4", "/clips/y.mp4")),
        Reason("no caption", 1, ("/clips/z.mp4",)),
        Reason("too short", 1, ("/clips/short.mp4",)),
    )
    many = [*ROWS, *((f"/clips/{n}.mp4", 1, 1, 1, -1, f"odd {n}") for n in range(40))]
    result = report(many)
    assert sum(reason.num_clips for reason in result.reasons) + result.num_other_reasons == result.num_unusable == 44


def test_clips_whose_pixels_are_converted_are_counted():
    clips = table(ROWS)
    values = ["deinterlaced", "deinterlaced, tone-mapped from HDR", "", "converted from a wide gamut", "deinterlaced"]
    column = pa.array([*values, None, None, ""])
    index = clips.table.column_names.index("processing")
    clips = dataclasses.replace(clips, table=clips.table.set_column(index, "processing", column))
    result = make_report(clips, setup(), GOOD)
    # The fifth clip is too short.
    assert result.processed == {"deinterlaced": 2, "tone-mapped from HDR": 1, "converted from a wide gamut": 1}
    assert "2 clips deinterlaced" in short_report(result)
    assert report().processed == {}


@pytest.mark.parametrize("num_ranks", [1, 4, 16])
def test_steps_equal_those_of_the_plan(num_ranks):
    rows = [(f"/{n}.mp4", 81, 768, 1360, n % 7 % 3, None) for n in range(23)]
    result = report(rows, num_ranks=num_ranks)
    plan = Plan(tuple(bucket.num_samples for bucket in result.buckets), (2, 1, 1), num_ranks, 2, 0)
    assert result.steps_per_epoch == pytest.approx(plan.steps_per_epoch)


def test_windows_and_repeats():
    clips = dataclasses.replace(table(ROWS), num_windows=np.array([2, 1, 2, 1, 0, 0, 0, 0]))
    buckets = make_report(clips, setup(), GOOD).buckets
    assert [bucket.num_samples for bucket in buckets] == [2, 3, 1]
    assert [bucket.unused_share for bucket in buckets] == [0, 0, 0]
    assert buckets[1].cache_bytes == 3 * cached_clip_bytes(BUCKETS[1], V15, 2)
    repeated = make_report(clips, setup(epoch_sizes=(20.0, 3.0, 1.0)), GOOD)
    assert repeated.buckets[0].micro_steps == 5  # of 2 ranks x 2 clips
    assert repeated.buckets[0].num_samples == 2  # repeats are not encoded


def test_the_report_does_not_depend_on_the_rows_processed_at_a_time(monkeypatch):
    expected = report()
    monkeypatch.setattr("cogds.report.analysis.ROWS_AT_ONCE", 3)
    assert report() == expected


def test_a_dataset_without_clips():
    result = report([ROWS[-1]])
    assert (result.num_clips, result.largest, result.suggestion) == (0, None, None)
    assert short_report(result)
    page = page_of(result, table([ROWS[-1]]), no_frame)
    assert page.count("<svg ") == page.count("<img ") == 0
    assert report([]).num_rows == 0


def test_rates_of_an_earlier_run(tmp_path):
    lines = [{"perf/tokens_per_s": 9e9, "perf/step_s": 9e9, "train/loss/bucket=81x768x1360": 1.0}] * 5
    losses = {"train/loss/bucket=81x768x1360": 1.0, "train/loss/t_q1": 1.0}
    lines += [{"perf/tokens_per_s": 1000.0, "perf/step_s": 40.0 + n, **losses} for n in range(3)]
    lines += [{"perf/tokens_per_s": 1000.0, "perf/step_s": 60.0, **losses, "train/loss/bucket=49x768x1360": 1.0}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": n, **line}) + "\n" for n, line in enumerate(lines)) + '{"step": 9')
    rates = read_rates(file)
    assert rates == Rates(1000.0, {"81x768x1360": 41.0}, str(file))
    result = report(rates=rates)
    assert (result.buckets[1].step_s, result.buckets[1].step_is_measured) == (41.0, True)
    assert result.buckets[0].step_s == pytest.approx((7 * 48 * 85 + 226) * 2 * 2 * 2 / 1000)
    assert not result.buckets[0].step_is_measured
    assert result.epoch_s == pytest.approx(sum(bucket.steps * bucket.step_s for bucket in result.buckets))
    assert read_rates(tmp_path / "none.jsonl") is None
    file.write_text("")
    assert read_rates(file) is None


@pytest.mark.usefixtures("no_plots")
def test_the_estimated_time():
    run = setup(num_steps=1000, checkpointing=("none",) * 3)
    rates = estimate_rates(run, "NVIDIA H100 80GB HBM3")
    # 4,008 TFLOP for the base, 525 for attention's backward pass without the matrix, and 36 for the LoRA.
    step_s = 2 * (4008 + 525 + 36) / (0.4 * 989)
    assert rates.step_s["81x768x1360"] == pytest.approx(step_s, rel=0.01)
    assert rates.step_s["49x768x1360"] == pytest.approx(2 * rates.step_s["81x768x1360"] * 0.48, rel=0.1)  # two clips
    result = make_report(table(ROWS), dataclasses.replace(run, rates=rates), GOOD)
    assert (result.buckets[1].step_s, result.buckets[1].step_is_measured) == (rates.step_s["81x768x1360"], False)
    assert result.run_s == pytest.approx(result.epoch_s / 1.5 * 1000)
    for text in (short_report(result), printed(result), page_of(result, table(ROWS))):
        assert "estimated for NVIDIA H100 80GB HBM3 at 40% of its peak of 989 TFLOP/s" in text
        assert f"1,000 steps in about {duration(result.run_s)}" in text
    on_a100 = estimate_rates(run, "NVIDIA A100-SXM4-80GB").step_s["81x768x1360"]
    assert on_a100 == pytest.approx(rates.step_s["81x768x1360"] * 989 / 312)
    shared = setup(sequence_size=2, checkpointing=("none",) * 3)
    assert estimate_rates(shared, "NVIDIA H100 80GB HBM3").step_s["81x768x1360"] == pytest.approx(step_s / 2, rel=0.01)


def test_no_time_without_measurement_or_estimate():
    assert report(num_steps=1000).run_s is None
    assert "--gpu" in printed(report(num_steps=1000))


def test_better_buckets_are_suggested_only_if_the_given_ones_fit_badly():
    assert report(ROWS[:2] * 20).suggestion is None
    portrait = [(f"/{n}.mp4", 90, 1920, 1080, 0, None) for n in range(20)]
    result = report(portrait, buckets=BUCKETS[1:2], batch_sizes=(1,))
    assert result.suggestion.after.crop < 0.02 < 0.6 < result.suggestion.before.crop
    assert "data.buckets=[81x1360x768]" in printed(result)


def test_images_without_a_bucket_are_named_and_get_one():
    rows = [(f"/{n}.mp4", 90, 768, 1360, 0, None) for n in range(6)]
    rows += [(f"/{n}.png", 1, 768, 1360, -1, None) for n in range(4)]
    result = report(rows, buckets=BUCKETS[1:2], batch_sizes=(1,))
    assert result.reasons == (Reason(NO_IMAGE_BUCKET, 4, ("/0.png", "/1.png", "/2.png")),)
    assert "data.bucket_frames=[1, 81]" in short_report(result)
    text = printed(result)
    assert "data.buckets=[1x768x1360, 81x768x1360]" in text
    assert "0% of the clips without a bucket of their length (40% now)" in text
    with_images = [*rows[:6], *((*row[:4], 1, None) for row in rows[6:])]
    fitting = report(with_images, buckets=(BUCKETS[1], ClipShape(1, 768, 1360)), batch_sizes=(1, 1))
    assert "bucket_frames" not in short_report(fitting)
    assert fitting.suggestion is None
    own = report(rows, buckets=BUCKETS[1:2], batch_sizes=(1,), has_own_buckets=True)
    assert "add buckets such as 1x768x1360 to data.buckets" in short_report(own)
    assert "bucket_frames" not in short_report(own)


def test_videos_of_which_only_a_picture_is_trained_are_counted_and_get_a_bucket():
    buckets = (ClipShape(1, 768, 1360), BUCKETS[1])
    rows = [(f"/{n}.mp4", 40, 768, 1360, 0, None) for n in range(6)]
    rows += [("/long.mp4", 81, 768, 1360, 1, None), ("/a.png", 1, 768, 1360, 0, None)]
    result = report(rows, buckets=buckets, batch_sizes=(1, 1))
    assert result.num_single_frames == 6
    assert "6 videos trained as a single frame, because the shortest other bucket has 81 frames" in short_report(result)
    assert "33x768x1360" in result.suggestion.buckets
    pictures_only = report(rows[:6], buckets=buckets[:1], batch_sizes=(1,))
    assert (pictures_only.num_single_frames, pictures_only.suggestion) == (0, None)


def test_a_model_with_one_size_gets_no_advice_about_others():
    rows = [(f"/{n}.mp4", 49, 1000, 400, 0, None) for n in range(6)]
    rows += [(f"/{n}.png", 1, 768, 1360, -1, None) for n in range(4)]
    geometry = PUBLISHED["CogVideoX-5b-I2V"]
    fixed = {"geometry": geometry, "buckets": (geometry.trained_size,), "batch_sizes": (1,)}
    result = report(rows, model_notes=["data.fps=16, but"], **fixed)
    assert result.suggestion is None
    text = short_report(result)
    assert "only 49x480x720" in text
    assert "bucket_frames" not in text
    assert "data.fps=16, but" in text


@pytest.mark.usefixtures("no_plots")
def test_the_share_of_upscaled_clips_is_the_same_everywhere():
    """Even if a clip is too short, and although suggestions round the sizes of clips."""
    rows = [(f"/{n}.mp4", 90, 477 if n else 1080, 640 if n else 1920, 0, None) for n in range(4)]
    rows += [("/short.mp4", 5, 477, 640, -1, None)]
    result = report(rows, buckets=(ClipShape(81, 480, 640),), batch_sizes=(1,))
    assert result.suggestion
    assert result.upscaled_share == 0.75
    for text in (printed(result), page_of(result, table(rows), no_frame)):
        assert set(re.findall(r"badly.* (\d+)% of the clips upscaled|upscaled \((\d+)% now", text)) == {
            ("75", ""),
            ("", "75"),
        }


def test_the_short_report():
    result = report(captions=Captions(3, 1, 2, 4, 226), gpu_bytes=80e9)
    lines, memory = short_report(result).splitlines(), gigabytes(result.largest.memory.total_bytes)
    assert len(lines) <= 8
    for expected in ("4 of 8 clips", "2 x cannot be opened", "3 clips", "2 captions", "226 tokens", memory):
        assert any(expected in line for line in lines), expected


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    "per_clip, expected", [((1, 1, 1.0), None), ((5, 5, 5.0), ": 5. "), ((1, 4, 2.5), ": 1 to 4, 2.5 on average. ")]
)
def test_captions_per_clip_are_counted(per_clip, expected):
    result = report(captions=dataclasses.replace(GOOD, per_clip=per_clip))
    for text in (printed(result), short_report(result), page_of(result, table(ROWS), no_frame)):
        assert ("Captions per clip" in text) is (expected is not None)
        assert expected is None or f"Captions per clip{expected}" in text


@pytest.mark.usefixtures("no_plots")
def test_buckets_without_clips_are_listed_in_one_line():
    result = report(ROWS[1:3])
    text = printed(result)
    (line,) = (line for line in text.splitlines() if "49x768x1360" in line and "data.buckets" not in line)
    assert "81x1360x768" in line
    page = page_of(result, table(ROWS[1:3]), no_frame)
    assert re.findall(r'<th scope="row">(\d+x\d+x\d+)</th>', page) == ["81x768x1360"]


def test_one_step_is_singular():
    result = report(ROWS[:1], batch_sizes=(1, 1, 1), accumulation=1)
    assert result.steps_per_epoch == 1
    assert "1 step per epoch" in printed(result)


def printed(result, **console):
    file = io.StringIO()
    print_report(result, Console(file=file, **console))
    return file.getvalue()


def test_tables_are_plain_without_a_terminal():
    text = printed(report())
    assert "\x1b" not in text
    assert text.isascii()
    assert re.search(r"81x768x1360 +2 +2 +45,106 +1 +1 +0\.5 .*not measured\n", text)
    assert "kept activations" in text
    assert "\x1b" in printed(report(), force_terminal=True, width=200)


@pytest.mark.usefixtures("no_plots")
def test_pinned_host_memory_is_shown_if_there_is_any():
    offloaded = report(ROWS[1:3], checkpointing=("full+offload",) * 3)
    assert offloaded.buckets[1].pinned_bytes == pytest.approx(42 * 264 * 2**20, rel=0.01)  # 42 blocks' inputs
    assert re.search(r"pinned .* 11\.6 GB", printed(offloaded))
    assert re.search(r"pinned .*</th><td>11\.6 GB", page_of(offloaded, table(ROWS), no_frame))
    assert "pinned" not in printed(report()) + page_of(report(), table(ROWS), no_frame)


@pytest.mark.usefixtures("no_plots")
def test_the_split_of_the_blocks_is_shown():
    split = report(ROWS[1:3], checkpointing=(BlockCheckpointing("selective", 10, 42),) * 3, gpu_bytes=80e9)
    for text in (printed(split), page_of(split, table(ROWS), no_frame), short_report(split)):
        assert "selective, 10 of 42 blocks kept" in text


@pytest.mark.usefixtures("no_plots")
def test_a_bucket_that_does_not_fit_is_reported_with_a_setting_that_does():
    result = report(gpu_bytes=24e9)
    sentence = result.buckets[1].shortfall
    assert all(part in sentence for part in ("81x768x1360", "31.6 GB", "24.0 GB"))
    assert "train.activation_checkpointing=full+offload (20.5 GB)" in sentence
    assert sentence in short_report(result)
    assert re.search(r"81x768x1360 .* full +31\.6 GB, too much", printed(result))
    assert "<td>full</td><td>31.6 GB, too much</td>" in page_of(result, table(ROWS), no_frame)
    # Buckets without clips need not fit.
    unused = report(ROWS[:1], batch_sizes=(1, 9, 9), gpu_bytes=80e9)
    assert unused.buckets[1].shortfall
    assert "train.activation_checkpointing=selective" not in short_report(unused)
    assert [bucket.shortfall for bucket in report(gpu_bytes=80e9).buckets] == [""] * 3
    assert "80.0 GB" in printed(report(gpu_bytes=80e9))


def test_markup_and_escapes_in_file_names_have_no_effect():
    rows = [(path, None, None, None, -1, "cannot be opened: [red]x") for path in ("/a/[bold]b.mp4", "/a/\x1b[31mc.mp4")]
    text = printed(report([*ROWS, *rows]), force_terminal=True, width=200)
    assert "[bold]b.mp4" in text
    assert "\x1b[31mc" not in text


def no_frame(requests):
    return [None] * len(requests)


def gray_frames(requests):
    return (np.full((request.height, request.width, 3), 200, np.uint8) for request in requests)


def clip_list(clips, shapes=BUCKETS, **changes):
    """Return all clips of a table."""
    num = len(clips.table)
    windows = np.ones(num, int) if clips.num_windows is None else clips.num_windows
    made = ClipList(
        clips.table,
        clips.buckets,
        clips.frames,
        windows,
        np.zeros(num, bool),
        shapes,
        lambda texts: [False] * len(texts),
    )
    return dataclasses.replace(made, **changes)


def page_of(result, clips, read_frames=no_frame, name=""):
    """Render the page."""
    listed = list_clips(clip_list(clips, tuple(bucket.shape for bucket in result.buckets)), 100)
    return html_page(result, clips, list(make_tiles(listed, read_frames)), Pages(["report.html"], 0), name=name)


@pytest.fixture
def no_plots(monkeypatch):
    """Plots take a second per page."""
    monkeypatch.setattr("cogds.report.html.make_plots", lambda *_: [])


def test_the_page_escapes_names_and_captions():
    rows = [(f"/clips/{name}", 81, 768, 1360, 1, None) for name in EVIL]
    rows += [(f"/{name}", None, None, None, -1, f"{EVIL[0]}: {EVIL[1]}") for name in EVIL]
    page = page_of(report(rows), table(rows), no_frame, name=EVIL[0])
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
    assert "{{ 7*7 }} [bold]&#39;&amp;.mp4" in page


def test_the_page_has_no_external_references():
    page = page_of(report(), table(ROWS), gray_frames)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    addresses = set(re.findall(r"""(?:src|href|url|action|srcset)\s*[=(]\s*["']?([^"'\s>)]+)""", page))
    assert addresses
    assert {address for address in addresses if not address.startswith(("#", "data:image/jpeg;base64,"))} == set()
    # The only addresses are XML namespaces, which no browser requests.
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names))
    assert all(re.search(r' (?:alt|aria-label)="[^"]+"', tag) for tag in re.findall(r"<(?:img|svg) [^>]*>", page))
    assert page.count("<svg ") == 4


def test_a_clip_that_cannot_be_read_is_shown_without_a_picture():
    def frames(requests):
        for request in requests:
            assert (request.kind, request.start_s) == ("video", 0.0)
            assert max(request.height, request.width) == 260
            yield None if request.path.endswith(("b.mp4", "c.mp4")) else np.full((*request[-2:], 3), 200, np.uint8)

    tiles = {tile.clip.name: tile for tile in make_tiles(list_clips(clip_list(table(ROWS)), 100), frames)}
    assert len(tiles) == len(ROWS)
    with_picture = {name for name, tile in tiles.items() if tile.picture}
    assert with_picture == {"/clips/a.mp4", "/clips/d.mp4", "/clips/short.mp4", "/clips/z.mp4"}


def test_every_clip_is_listed_with_its_bucket_crop_and_flags():
    clips = list_clips(clip_list(table(ROWS)), 100)
    assert [clip.name[7:-4] for clip in clips] == ["short", "x", "y", "z", "c", "a", "b", "d"]
    by_name = {clip.name[7:-4]: clip for clip in clips}
    assert by_name["short"].reason == "too short for every bucket"
    assert by_name["x"].reason == "cannot be opened: no such stream"
    assert [by_name[name].shape for name in "abcdx"] == [*BUCKETS[:2], BUCKETS[1], BUCKETS[2], None]
    assert by_name["b"].facts == "1920 x 1080, <1% cropped away, 81 of 81 frames used"
    assert by_name["b"].flags == by_name["d"].flags == ()
    assert by_name["c"].flags == ("25% cropped away", "upscaled 2.1 times")
    assert by_name["a"].captions == ("caption of /clips/a.mp4",)


def test_flags_of_a_clip():
    rows = [("/a.mp4", 400, 768, 1360, 0, None), ("/b.mp4", 49, 768, 1360, 0, None)]
    clips = table(rows)
    for name, values in {
        "digest": [b"0" * 16] * 2, "motion": [0.5, 0.001], "duplicate_of": [None, "/c.mp4"],
        "processing": ["", "deinterlaced, tone-mapped from HDR"], "more_captions": [None, ["two"]],
    }.items():  # fmt: skip
        index = clips.table.column_names.index(name)
        column = pa.array(values, clips.table.schema.field(name).type)
        clips = dataclasses.replace(clips, table=clips.table.set_column(index, name, column))
    listed = clip_list(clips, is_held_out=np.array([False, True]), is_cut_off=lambda texts: ["/b" in t for t in texts])
    first, second = list_clips(listed, 100)
    assert first.flags == ("88% of the frames unused",)
    assert second.flags == (
        "held out for evaluation", "hardly moves", "deinterlaced", "tone-mapped from HDR", "near duplicate of /c.mp4",
        "same content as /a.mp4", "caption cut off",
    )  # fmt: skip
    assert second.captions == ("caption of /b.mp4", "two")


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("num, num_pages", [(60, 1), (61, 2), (185, 4)])
def test_every_clip_is_on_one_page(tmp_path, num, num_pages):
    rows = [(f"/clips/{n:03}.mp4", 81, 768, 1360, 1, None) for n in range(num)]
    file = tmp_path / "my report #1.html"
    write_html(file, report(rows), table(rows), clip_list(table(rows)), gray_frames)
    pages = [file, *sorted((tmp_path / "my report #1_clips").glob("*.html"))]
    names = [re.findall(r'class="name">/clips/(\d+)', page.read_text()) for page in pages]
    assert [name for part in names for name in part] == [f"{n:03}" for n in range(num)]
    assert len(pages) == num_pages
    # The links lead from page to page, and back.
    seen, page = [], file
    while page and page not in seen:
        seen.append(page)
        (link,) = re.findall(r'rel="next" href="([^"]+)"', page.read_text())[:1] or [""]
        page = link and (page.parent / unquote(link)).resolve()
    assert seen == pages
    for page in pages[1:]:
        assert (page.parent / unquote(re.search(r'<a href="([^"#]+)">Dataset report', page.read_text())[1])).samefile(
            file
        )
    # A later report about fewer clips leaves no page behind.
    write_html(file, report(rows[:1]), table(rows[:1]), clip_list(table(rows[:1])), gray_frames)
    assert not list((tmp_path / "my report #1_clips").glob("*.html"))


@pytest.mark.usefixtures("no_plots")
def test_of_very_many_clips_evenly_spaced_ones_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("cogds.report.html.MAX_CLIPS", 10)
    rows = [(f"/clips/{n:03}.mp4", 81, 768, 1360, 1, None) for n in range(100)]
    write_html(tmp_path / "a.html", report(rows), table(rows), clip_list(table(rows)), no_frame)
    page = (tmp_path / "a.html").read_text()
    assert re.findall(r'class="name">/clips/(\d+)', page) == [f"{n:03}" for n in range(0, 100, 11)]
    assert "Shown are 10 evenly spaced clips" in page


def test_the_cropped_part_of_a_picture_is_dimmed():
    frame = np.full((200, 400, 3), 255, np.uint8)
    picture = crop_picture(frame, ClipShape(81, 200, 200))
    row = np.asarray(picture)[picture.height // 2, :, 0]
    assert picture.size == (400, 200)
    assert (row < 100).sum() == 200
    assert (row[104:296] == 255).all()
    assert (np.asarray(crop_picture(frame, ClipShape(81, 400, 800)))[4:-4, 4:-4] == 255).all()


def test_control_characters_are_escaped():
    assert printable("a\x00b\x1b[1m\u202ec") == "a\\x00b\\x1b[1m\\u202ec"


@pytest.mark.usefixtures("no_plots")
def test_the_page_is_written_without_leftovers(tmp_path):
    write_html(tmp_path / "report.html", report(), table(ROWS), clip_list(table(ROWS)), no_frame)
    assert (tmp_path / "report.html").read_text().endswith("</html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_page_in_a_folder_that_does_not_exist_is_refused(tmp_path):
    assert parse_args("report", ["--html", str(tmp_path / "report.html")]).html == tmp_path / "report.html"
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "none"))):
        parse_args("report", ["--html", str(tmp_path / "none" / "report.html")])
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_command(tmp_path):
    """It draws the demo's clips, prints tables and writes a page, but trains nothing."""
    page = tmp_path / "report.html"
    done = run_command(
        [
            sys.executable, ROOT / "launch/report.py", "--config", "demo", "--num_gpus", 2, "--html", page,
            f"output_dir={tmp_path / 'run'}",
            f"data.path={tmp_path / 'clips'}", "data.draw_demo_clips=true", f"data.cache_dir={tmp_path / 'cache'}",
        ],
        timeout_s=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert re.search(r"12 of 12 clips; 2 GPUs", done.stdout)
    assert page.read_text().count("data:image/jpeg;base64,") == 12
    assert not (tmp_path / "run").exists()
    refused = run_command([sys.executable, ROOT / "launch/report.py", "--num_gpus", 0], timeout_s=120)
    assert refused.returncode == 2
    assert "--num-gpus: 0" in refused.stdout


@pytest.mark.slow
def test_the_report_of_a_hub_model_needs_no_weights(tiny_model, tmp_path, monkeypatch, capsys):
    """With the hub's own client, offline: only configs and tokenizer are in its cache."""
    cache, commit = tmp_path / "hub/models--somebody--some-model", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny_model, cache / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "clips").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "clips/a.png")
    (tmp_path / "clips/a.txt").write_text("a black square")
    config = ("cogvideox1.5_i2v_lora", "model.path=somebody/some-model", "data.buckets=1x64x64")
    folders = (f"data.path={tmp_path / 'clips'}", f"data.cache_dir={tmp_path}", f"output_dir={tmp_path / 'run'}")
    assert main(["report", "--config", *config, *folders]) == 0
    assert "1 of 1 clip" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^model\.path: the weights of somebody/some-model .*hf download"):
        find_model("somebody/some-model").fetch("vae")


def test_the_report_fails_if_training_would_refuse(tiny_model, tmp_path, capsys):
    draw_clips(tmp_path / "clips")
    words = [
        f"model.path={tiny_model}", f"data.path={tmp_path / 'clips'}", f"data.cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'run'}", "data.buckets=[17x64x96, 9x96x64, 1x64x64]", "data.num_workers=0",
    ]  # fmt: skip
    assert cli.run(lambda: cli.call("report", words)) == 0
    (tmp_path / "clips/empty.mp4").touch()
    for allowed, code in (("0.2", 0), ("0.1", 2)):
        assert cli.run(lambda allowed=allowed: cli.call("report", [*words, f"data.max_unusable={allowed}"])) == code
    output = capsys.readouterr()
    assert "empty file" in output.out  # the report comes first
    assert output.err.startswith("error: data.max_unusable: 1 of 8 clips")
    assert cli.run(lambda: cli.call("report", [*words, "data.buckets=[161x64x64]"])) == 2
    assert capsys.readouterr().err.startswith("error: data.path: none of the 8 clips ")


def test_held_out_clips_are_neither_trained_nor_unusable():
    clips = dataclasses.replace(table(ROWS), num_held_out=2)
    result = make_report(clips, setup(max_unusable=0.4), GOOD)
    assert (result.num_rows, result.num_clips, result.num_unusable) == (10, 4, 4)
    assert not result.is_refused
    assert "2 clips held out" in short_report(result)
    assert "held out" not in short_report(report())


@pytest.fixture
def figures(monkeypatch):
    """The figures of the page."""
    figures = []
    monkeypatch.setattr("cogds.report.plots.to_svg", lambda figure, _: figures.append(figure) or "")
    return figures


def test_axes_that_count_clips_have_integer_ticks(figures):
    page_of(report(ROWS[:1]), table(ROWS[:1]), no_frame)
    _, lengths, samples, _ = figures
    for axis in (lengths.axes[0].yaxis, samples.axes[0].xaxis):
        assert all(tick == int(tick) for tick in axis.get_ticklocs())


def test_labels_of_buckets_do_not_overlap(figures):
    buckets = tuple(ClipShape(81, height, width) for height in range(704, 1024, 32) for width in range(704, 1024, 32))
    rows = [("/a.mp4", 81, 768, 1360, 0, None)]
    page_of(report(rows, buckets=buckets, batch_sizes=(1,) * 100, checkpointing=("full",) * 100), table(rows), no_frame)
    figure = figures[0]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) > 3
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    assert all(figure.bbox.fully_containsx(x) for box in boxes for x in (box.x0, box.x1))


def test_labels_of_lengths_do_not_overlap(figures):
    buckets = tuple(ClipShape(frames, 768, 768) for frames in range(1, 82, 4))
    rows = [("/a.mp4", 81, 768, 768, 20, None)]
    page_of(report(rows, buckets=buckets, batch_sizes=(1,) * 21, checkpointing=("full",) * 21), table(rows))
    figure = figures[1]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) > 3
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_skipped_files_are_reported():
    skipped = {".md file": 2, "row removed by data.where": 12_000}
    result = make_report(dataclasses.replace(table(ROWS), skipped=skipped), setup(), GOOD)
    sentence = (
        "Skipped in the datasets: 12,000 x row removed by data.where; "
        "neither a clip nor the caption of one: 2 x .md file."
    )
    assert sentence in short_report(result)
    assert sentence in page_of(result, table(ROWS), no_frame)
    assert "Skipped" not in short_report(report())


def test_all_captions_of_usable_clips_are_counted(tiny_model):
    captions = [["one", "two " * 40], ["one"], ["unusable", "unusable too"]]
    rows = pa.table(
        {
            "caption": pa.array([texts[0] for texts in captions], pa.large_string()),
            "more_captions": pa.array([texts[1:] for texts in captions], pa.large_list(pa.large_string())),
            "status": ["ok", "ok", "unusable"],
            "reason": [None, None, "no video"],
        }
    )
    assert count_captions(rows, find_model(str(tiny_model))) == Captions(0, 0, 1, 2, 32, (1, 2, 1.5))

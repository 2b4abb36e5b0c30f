"""The report: its numbers, its text, and its HTML page."""

import dataclasses
import io
import json
import re
import sys

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from cogds import cli
from cogds.arguments import parse_args
from cogds.core.buckets import crop_share
from cogds.core.checkpointing import BlockCheckpointing
from cogds.core.geometry import ClipShape, cached_caption_bytes, cached_clip_bytes
from cogds.core.memory import ZeroSettings
from cogds.core.plan import Plan
from cogds.data.video.drawn import draw_clips
from cogds.errors import UserError
from cogds.formatting import gigabytes
from cogds.model.load import find_model
from cogds.report.analysis import Captions, ClipTable, Rates, Reason, TrainingSetup, make_report, read_rates
from cogds.report.html import crop_picture, html_page, printable, sample_sheets, write_html
from cogds.report.main import count_captions
from cogds.report.text import print_report, short_report
from tests.conftest import ROOT, run_command
from tests.published_model import V15, published_memory

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
    page = html_page(result, table([ROWS[-1]]), no_frame)
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


def test_better_buckets_are_suggested_only_if_the_given_ones_fit_badly():
    assert report(ROWS[:2] * 20).suggestion is None
    portrait = [(f"/{n}.mp4", 90, 1920, 1080, 0, None) for n in range(20)]
    result = report(portrait, buckets=BUCKETS[1:2], batch_sizes=(1,))
    assert result.suggestion.after.crop < 0.02 < 0.6 < result.suggestion.before.crop
    assert "data.buckets=[81x1360x768]" in printed(result)


@pytest.mark.usefixtures("no_plots")
def test_the_share_of_upscaled_clips_is_the_same_everywhere():
    """Even if a clip is too short, and although suggestions round the sizes of clips."""
    rows = [(f"/{n}.mp4", 90, 477 if n else 1080, 640 if n else 1920, 0, None) for n in range(4)]
    rows += [("/short.mp4", 5, 477, 640, -1, None)]
    result = report(rows, buckets=(ClipShape(81, 480, 640),), batch_sizes=(1,))
    assert result.suggestion
    assert result.upscaled_share == 0.75
    for text in (printed(result), html_page(result, table(rows), no_frame)):
        assert set(re.findall(r"(\d+)% of the clips upscaled", text)) == {"75"}


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
    for text in (printed(result), short_report(result), html_page(result, table(ROWS), no_frame)):
        assert ("Captions per clip" in text) is (expected is not None)
        assert expected is None or f"Captions per clip{expected}" in text


@pytest.mark.usefixtures("no_plots")
def test_buckets_without_clips_are_listed_in_one_line():
    result = report(ROWS[1:3])
    text = printed(result)
    (line,) = (line for line in text.splitlines() if "49x768x1360" in line and "data.buckets" not in line)
    assert "81x1360x768" in line
    page = html_page(result, table(ROWS[1:3]), no_frame)
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
    assert re.search(r"pinned .*</th><td>11\.6 GB", html_page(offloaded, table(ROWS), no_frame))
    assert "pinned" not in printed(report()) + html_page(report(), table(ROWS), no_frame)


@pytest.mark.usefixtures("no_plots")
def test_the_split_of_the_blocks_is_shown():
    split = report(ROWS[1:3], checkpointing=(BlockCheckpointing("selective", 10, 42),) * 3, gpu_bytes=80e9)
    for text in (printed(split), html_page(split, table(ROWS), no_frame), short_report(split)):
        assert "selective, 10 of 42 blocks kept" in text


@pytest.mark.usefixtures("no_plots")
def test_a_bucket_that_does_not_fit_is_reported_with_a_setting_that_does():
    result = report(gpu_bytes=24e9)
    sentence = result.buckets[1].shortfall
    assert all(part in sentence for part in ("81x768x1360", "31.6 GB", "24.0 GB"))
    assert "train.activation_checkpointing=full+offload (20.5 GB)" in sentence
    assert sentence in short_report(result)
    assert re.search(r"81x768x1360 .* full +31\.6 GB, too much", printed(result))
    assert "<td>full</td><td>31.6 GB, too much</td>" in html_page(result, table(ROWS), no_frame)
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


def test_the_page_has_no_external_references():
    page = html_page(report(), table(ROWS), lambda *size: np.zeros((*size[-2:], 3), np.uint8))
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


def test_a_clip_that_cannot_be_read_is_a_tile_without_a_picture():
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


def test_the_seed_determines_the_sample_clips():
    rows = [(f"/clips/{n}.mp4", 81, 768, 1360, 1, None) for n in range(500)]

    def names(seed):
        return [tile.name for tile in sample_sheets(report(rows), table(rows), no_frame, seed)[0].tiles]

    assert names(1) == names(1) != names(2)
    assert len(names(1)) == 4


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
    """It creates the demo's clips and model, prints tables and writes a page, but trains nothing."""
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
    html_page(report(ROWS[:1]), table(ROWS[:1]), no_frame)
    _, lengths, samples, _ = figures
    for axis in (lengths.axes[0].yaxis, samples.axes[0].xaxis):
        assert all(tick == int(tick) for tick in axis.get_ticklocs())


def test_labels_of_buckets_do_not_overlap(figures):
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


def test_skipped_files_are_reported():
    skipped = {".md file": 2, "row removed by data.where": 12_000}
    result = make_report(dataclasses.replace(table(ROWS), skipped=skipped), setup(), GOOD)
    sentence = "Skipped in the datasets: 12,000 x row removed by data.where, 2 x .md file."
    assert sentence in short_report(result)
    assert sentence in html_page(result, table(ROWS), no_frame)
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

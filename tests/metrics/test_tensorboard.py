"""Event files, read by TensorBoard's own readers."""

import io
import subprocess

import numpy as np
import pytest
from PIL import Image
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from cogds.config.schema import MetricsConfig
from cogds.distributed.world import World
from cogds.metrics.images import encode_gif, encode_image
from cogds.metrics.monitor import Monitor
from cogds.metrics.tensorboard import (
    board_folder,
    event_file,
    gif_record,
    hparams_records,
    image_record,
    layout_record,
    scalars_record,
)
from tests.metrics.test_monitor import BUCKETS, load_board, losses, make_monitor


def write_and_load(folder, *records):
    event_file(folder, 0).write(records)
    return load_board(folder)


def gradient(height, width, num_frames=None):
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], axis=-1).astype(np.uint8)
    return pixels if num_frames is None else np.stack([np.roll(pixels, 8 * n, axis=1) for n in range(num_frames)])


def open_image(data):
    return Image.open(io.BytesIO(data))


def test_an_image_is_read_back_pixel_for_pixel(tmp_path):
    pixels = gradient(40, 64)
    (event,) = write_and_load(tmp_path, image_record("data/one", 3, pixels)).Images("data/one")
    assert (event.step, event.height, event.width) == (3, 40, 64)
    image = open_image(event.encoded_image_string)
    assert image.format == "PNG"
    assert np.array_equal(np.asarray(image), pixels)


def test_a_large_image_is_shrunk_and_a_noisy_one_becomes_a_jpeg():
    data, height, width = encode_image(gradient(100, 4096))
    assert (height, width) == (50, 2048)
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
    data, *_ = encode_image(noise)
    assert open_image(data).format == "JPEG"
    assert len(data) < noise.size


@pytest.mark.parametrize("fps, num_frames, num_shown", [(16, 17, 9), (8, 9, 9), (25, 26, 9)])
def test_a_gif_plays_at_the_clips_speed(tmp_path, fps, num_frames, num_shown):
    (event,) = write_and_load(tmp_path, gif_record("clip", 2, gradient(270, 960, num_frames), fps)).Images("clip")
    image = open_image(event.encoded_image_string)
    assert (event.step, event.height, event.width) == (2, 144, 512)
    assert (image.format, image.n_frames, image.size) == ("GIF", num_shown, (512, 144))
    assert image.info["loop"] == 0
    duration_s = num_shown * image.info["duration"] / 1000
    assert duration_s == pytest.approx(num_frames / fps, rel=0.1)  # a GIF counts in hundredths of a second
    image.seek(num_shown - 1)
    last = np.asarray(image.convert("RGB")).astype(int)
    image.seek(0)
    assert np.abs(last - np.asarray(image.convert("RGB")).astype(int)).mean() > 10


def test_a_long_gif_is_bounded():
    data, *_ = encode_gif(gradient(16, 16, 400), 8)
    assert open_image(data).n_frames <= 96


@pytest.mark.parametrize("pixels", [np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)])
def test_an_image_that_cannot_be_encoded_is_only_a_warning(tmp_path, pixels, capsys):
    monitor = make_monitor(tmp_path)
    monitor.add_image(1, "data/odd", pixels)
    monitor.add_video(1, "data/odd", pixels, 8)
    monitor.close()
    assert capsys.readouterr().err.count("data/odd: ") == 2


def test_other_ranks_write_nothing(tmp_path):
    monitor = Monitor(World(1, 2, 1, 2), tmp_path, BUCKETS, range(10), MetricsConfig())
    monitor.add_scalars(1, {"a": 1.0})
    monitor.add_text("a", "b")
    monitor.add_image(1, "a", gradient(8, 8))
    monitor.add_video(1, "a", gradient(8, 8, 2), 8)
    monitor.add_hparams({"a": 1.0}, ["b"])
    monitor.close()
    assert not list(tmp_path.iterdir())


def read_layout(event):
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }


def test_each_chart_of_the_layout_has_one_tag(tmp_path):
    """TensorBoard gives all tags of a run the same color."""
    tags = {"train/loss", "eval/loss", "train/loss/bucket=9x8x8", "train/loss/bucket=1x8x8", "perf/step_s", "other"}
    (event,) = write_and_load(tmp_path, layout_record(tags)).Tensors("custom_scalars__config__")
    layout = read_layout(event)
    assert layout["loss"] == {
        "bucket 1x8x8": ["^train/loss/bucket=1x8x8$"],
        "bucket 9x8x8": ["^train/loss/bucket=9x8x8$"],
    }
    assert list(layout["overview"]) == ["loss", "loss of held-out clips", "seconds per step"]
    assert "memory" not in layout


def test_the_layout_has_the_tags_that_come_later(tmp_path):
    monitor = make_monitor(tmp_path)
    monitor.add_step(1, {"train/lr": 0.5}, losses(1.0))
    monitor.add_scalars(1, {"eval/loss/t=055": 1.0})
    monitor.add_step(2, {"train/lr": 0.5}, losses(1.0))
    monitor.close()
    before, last = load_board(tmp_path).Tensors("custom_scalars__config__")
    assert "evaluation" not in read_layout(before)
    assert read_layout(last)["evaluation"] == {"held out, timestep 055": ["^eval/loss/t=055$"]}


def test_tensorboard_reads_the_hparams(tmp_path):
    start, end = hparams_records({"lr": 1e-4, "rank": 128, "quantization": "none"}, ["train/loss"])
    board = write_and_load(tmp_path, *start, end)
    tags = {tag: board.SummaryMetadata(tag).plugin_data.content for tag in board.PluginTagToContent("hparams")}
    session = HParamsPluginData.FromString(tags[hparams_metadata.SESSION_START_INFO_TAG]).session_start_info
    assert session.hparams["rank"].number_value == 128
    assert session.hparams["quantization"].string_value == "none"
    experiment = HParamsPluginData.FromString(tags[hparams_metadata.EXPERIMENT_TAG]).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["train/loss"]
    assert hparams_metadata.SESSION_END_INFO_TAG in tags


def test_a_run_is_called_by_its_folder_and_an_older_one_is_continued_where_it_is(tmp_path):
    assert board_folder(tmp_path / "red") == tmp_path / "red/tensorboard/red"
    (tmp_path / "old/tensorboard").mkdir(parents=True)
    (tmp_path / "old/tensorboard/events.out.tfevents.1").touch()
    assert board_folder(tmp_path / "old") == tmp_path / "old/tensorboard"


def test_losses_are_shown_first(tmp_path):
    """TensorBoard sorts groups of tags by ASCII, so copies of the losses in a group with a capital letter lead."""
    board = write_and_load(
        tmp_path, scalars_record(2, {"checkpoint/write_s": 1.0, "train/loss": 0.5, "eval/loss": 2.0})
    )
    first, *_ = groups = sorted({tag.partition("/")[0] for tag in board.Tags()["scalars"]})
    assert (first, groups[1:]) == ("Loss", ["checkpoint", "eval", "train"])
    for tag, copy in (("train/loss", "Loss/training"), ("eval/loss", "Loss/held-out clips")):
        assert [event.value for event in board.Scalars(tag)] == [event.value for event in board.Scalars(copy)]


def test_images_that_a_full_disk_refuses_are_written_later(small_disk, capsys):
    monitor = make_monitor(small_disk)
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)  # 77 kB on a disk of 64 kB
    monitor.add_image(1, "data/large", noise)
    monitor.add_step(1, {"train/lr": 0.5}, losses(1.0))
    monitor.add_video(1, "data/clip", gradient(32, 32, 4), 8)
    assert monitor.writer.drain(10)
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert (small_disk / "metrics.jsonl").read_text().count('train/loss"') == 1
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    monitor.close()
    board = load_board(small_disk)
    assert board.Tags()["images"] == ["data/large", "data/clip"]
    assert [event.step for event in board.Scalars("train/loss")] == [1]

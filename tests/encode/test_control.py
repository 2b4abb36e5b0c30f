"""Control videos in a dataset: which clips have a usable one, and what is encoded of them."""

import json
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cogds.core.geometry import ClipShape
from cogds.data.cache.store import Cache
from cogds.data.loading.dataset import read_encoded
from cogds.data.manifest import scan
from cogds.data.video.decode_task import DecodeTask, decode
from cogds.data.video.media import DecodeError, read_clip, write_video
from cogds.encode.encoder import encode_dataset, encode_pixels
from cogds.errors import UserError
from cogds.model.load import find_model, load_vae
from tests.jobs import make_job

NUM_FRAMES = 24  # at 16 frames per second


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four clips of noise: with a control, with a short one, with a damaged one, and without one."""
    folder, numbers = tmp_path_factory.mktemp("controlled") / "clips", np.random.default_rng(0)
    folder.mkdir()
    for name in ("good", "short", "damaged", "alone"):
        pixels = np.repeat(numbers.integers(0, 256, (1, 64, 96, 3), np.uint8), NUM_FRAMES, 0)
        write_video(folder / f"{name}.mp4", pixels, 16, num_threads=1)
        (folder / f"{name}.txt").write_text(f"{name} noise")
        if name in ("good", "short"):
            num_frames = NUM_FRAMES if name == "good" else 6
            write_video(folder / f"{name}.control.mp4", pixels[:num_frames, ::-1], 16, num_threads=1)
    (folder / "damaged.control.mp4").write_bytes(b"not a video")
    return folder


@pytest.fixture
def encode(tiny_model, tmp_path):
    def encode(path, *overrides):
        return encode_dataset(
            make_job(
                f"model.path={tiny_model}", f"data.path={path}", f"data.cache_dir={tmp_path / 'cache'}",
                "train.precision=fp32", "data.buckets=[9x64x96]", "data.num_workers=0", *overrides,
            )
        )  # fmt: skip

    return encode


def clips_of(data):
    return {
        (data.index[row].path.rpartition("/")[2], data.index[row].mirrored): data.index[row]
        for row in range(len(data.index))
    }


def test_only_clips_with_a_usable_control_are_trained(encode, folder):
    data = encode(folder, "conditioning.control=true")
    assert [name for name, _ in clips_of(data)] == ["good.mp4"]
    assert data.unusable.num == 3
    reasons = {
        json.loads(line)["path"].rpartition("/")[2]: json.loads(line)["reason"] for line in data.unusable.file.open()
    }
    assert reasons["alone.mp4"].startswith("control video missing: ")
    assert reasons["short.mp4"] == "control video too short: 0.375 s, and the clip ends at 1.5 s"
    assert reasons["damaged.mp4"].startswith("control video unusable: ")
    # Without conditioning.control, the controls neither count as clips nor make a clip unusable.
    plain = encode(folder)
    assert sorted(name for name, _ in clips_of(plain)) == ["alone.mp4", "damaged.mp4", "good.mp4", "short.mp4"]
    assert plain.unusable.num == 0
    assert clips_of(plain)["good.mp4", False].clip_key != clips_of(data)["good.mp4", False].clip_key
    assert clips_of(plain)["good.mp4", False].control_path is None


def test_controls_are_scanned_once_they_are_used(encode, folder, tmp_path, monkeypatch):
    """A run without conditioning.control looks up nothing that a column control names."""
    (tmp_path / "clips").mkdir()
    shutil.copy(folder / "good.mp4", tmp_path / "clips")
    shutil.copy(folder / "good.control.mp4", tmp_path / "clips/pose.mp4")
    rows = [{"path": "good.mp4", "text": text, "control": text} for text in ("pan left", "pose.mp4", False)]
    (tmp_path / "clips/list.jsonl").write_text("\n".join(json.dumps(row | {"text": "noise"}) for row in rows))
    looked_up, stamp = [], scan.stamp
    monkeypatch.setattr(scan, "stamp", lambda path: looked_up.append(path.rpartition("/")[2]) or stamp(path))
    plain = encode(tmp_path / "clips/list.jsonl")
    assert (len(plain.index), plain.unusable.num, set(looked_up)) == (3, 0, {"good.mp4"})
    used = encode(tmp_path / "clips/list.jsonl", "conditioning.control=true")
    assert [clip.control_path for clip in map(used.index.__getitem__, range(len(used.index)))] == [
        str(tmp_path / "clips/pose.mp4")
    ]
    reasons = [json.loads(line)["reason"].partition(":")[0] for line in used.unusable.file.open()]
    assert reasons == ["control video unusable", "control video missing"]
    assert encode(tmp_path / "clips/list.jsonl").index[0].clip_key == plain.index[0].clip_key


def test_the_control_is_encoded_as_the_clip_and_mirrored_with_it(encode, folder, tmp_path, tiny_model):
    data = encode(folder, "conditioning.control=true", "data.mirror=true")
    clips, cache = clips_of(data), Cache(tmp_path / "cache")
    vae = load_vae(find_model(str(tiny_model)), torch.float32, "cpu")
    pixels = torch.from_numpy(read_clip(folder / "good.control.mp4", ClipShape(9, 64, 96), 16.0))
    for is_mirrored, expected in ((False, pixels), (True, pixels.flip(2))):
        encoded = read_encoded(cache, clips["good.mp4", is_mirrored])
        with torch.no_grad():
            assert torch.equal(encoded["control_moments"], encode_pixels(vae, expected, is_tiled=False))
        assert not torch.equal(encoded["control_moments"], encoded["moments"])


def test_a_control_in_a_tar_file_is_encoded(encode, folder, tmp_path, tiny_model):
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        for name in ("good.control.mp4", "good.mp4", "good.txt"):
            tar.add(folder / name, name)
        tar.add(folder / "good.txt", "good.png")  # a poster, which is not opened
    data = encode(tmp_path / "clips.tar", "conditioning.control=true")
    ((path, _),) = clips_of(data)
    assert path.startswith("clips.tar")
    encoded = read_encoded(Cache(tmp_path / "cache"), data.index[0])
    pixels = torch.from_numpy(read_clip(folder / "good.control.mp4", ClipShape(9, 64, 96), 16.0))
    vae = load_vae(find_model(str(tiny_model)), torch.float32, "cpu")
    with torch.no_grad():
        assert torch.equal(encoded["control_moments"], encode_pixels(vae, pixels, is_tiled=False))


@pytest.mark.parametrize("suffix", ["mp4", "webp"])
def test_a_control_may_lack_the_last_frame_and_a_clip_may_not(encode, tmp_path, suffix):
    """Optical flow between the frames of a clip is one frame shorter than the clip."""
    clips, pixels = tmp_path / "clips", np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), np.uint8)
    clips.mkdir()
    for name, num_frames in (("a.mp4", 9), (f"a.control.{suffix}", 8), ("b.mp4", 9), ("b.control.mp4", 7)):
        if name.endswith(".webp"):
            pictures = [Image.fromarray(picture) for picture in pixels[:num_frames]]
            pictures[0].save(
                clips / name, save_all=True, append_images=pictures[1:], duration=[62, 63] * 4, lossless=True
            )
        else:
            write_video(clips / name, pixels[:num_frames], 16, num_threads=1)
        (clips / f"{name[0]}.txt").write_text("noise")
    data = encode(clips, "conditioning.control=true")
    assert [name for name, _ in clips_of(data)] == ["a.mp4"]
    clip = data.index[0]
    task = DecodeTask(clip.path, clip.kind, None, 0.0, ClipShape(9, 64, 96), 16.0, "pyav", False, clip.control_path)
    control = decode(task).control
    assert np.array_equal(control[8], control[7])
    assert not np.array_equal(control[7], control[6])
    with pytest.raises(DecodeError, match="too early"):
        decode(replace(task, path=str(clips / "b.control.mp4")))
    with pytest.raises(DecodeError, match=r"^control video unusable: .*too early"):
        decode(replace(task, control_path=str(clips / "b.control.mp4")))


def test_tables_and_lists_name_controls(encode, folder, tmp_path):
    rows = [
        {"path": str(folder / f"{name}.mp4"), "text": name, "pose": str(folder / "good.control.mp4")}
        for name in ("good", "alone")
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = encode(tmp_path / "list.jsonl", "conditioning.control=true", "data.columns={control: pose}")
    assert len(data.index) == 2
    lists = tmp_path / "lists"
    lists.mkdir()
    for name, lines in (("videos", ["good.mp4"]), ("prompts", ["noise"]), ("controls", ["good.control.mp4"])):
        (lists / f"{name}.txt").write_text("\n".join(lines))
    for name in ("good.mp4", "good.control.mp4"):
        shutil.copy(folder / name, lists)
    data = encode(lists, "conditioning.control=true")
    assert clips_of(data)["good.mp4", False].control_path == str(lists / "good.control.mp4")


def test_a_control_needs_a_lora(tiny_model, folder):
    with pytest.raises(UserError, match=r"^conditioning.control: not with train.method=full"):
        make_job(f"model.path={tiny_model}", f"data.path={folder}", "conditioning.control=true", "train.method=full")

"""From a dataset to encoded samples: what is cached, what misses the cache, what is left out."""

import contextlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import cogds.encode
from cogds.config import load_config
from cogds.core.conditioning import to_range
from cogds.data.cache import Cache
from cogds.data.dataset import ClipDataset, collate
from cogds.data.synthetic import draw_clips
from cogds.data.video import read_clip
from cogds.encode import make_buckets, prepare
from cogds.errors import UserError
from cogds.model.load import find_model, load_vae
from cogds.runtime.world import World

ALONE = World(0, 1, 0, 1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "clips"
    draw_clips(folder)
    return folder


@pytest.fixture
def encode(tiny_model, tmp_path):
    """`encode(folder, *overrides)`: the prepared dataset, with a cache of the test's own."""

    def run(folder, *overrides):
        cfg, _ = load_config(
            None,
            [f"model.path={tiny_model}", f"data.path={folder}", f"data.cache_dir={tmp_path / 'cache'}",
             "data.buckets=[9x64x96, 9x96x64, 1x64x64]", "data.num_workers=0", "train.precision=fp32", *overrides],
        )  # fmt: skip
        model = find_model(cfg.model.path)
        return prepare(cfg, model, make_buckets(cfg, model.geometry), ALONE)

    return run


@pytest.fixture
def count_encodes(monkeypatch):
    """Names of the cache entries written since the fixture was made."""
    written, write = [], Cache.write

    def counting(self, kind, key, tensors):
        written.append((kind, key))
        write(self, kind, key, tensors)

    monkeypatch.setattr(Cache, "write", counting)
    return written


def test_samples_stand_in_bucket_order_with_their_encodings(encode, drawn, tiny_model, tmp_path):
    data = encode(drawn)
    assert sum(data.sizes) == len(data.samples) == 7
    assert [s.shape for s in data.samples] == [b for b, n in zip(data.buckets, data.sizes) for _ in range(n)]
    assert data.rejected == ()
    batch = collate([ClipDataset(data.samples, tmp_path / "cache")[0]])
    shape = data.samples[0].shape
    pixels = read_clip(data.samples[0].clip.path, shape, 16)
    assert torch.equal(batch["first_frame"][0], pixels[0])
    vae = load_vae(find_model(str(tiny_model)), torch.float32, "cpu")
    with torch.no_grad():
        moments = vae.encode(to_range(pixels, torch.float32).transpose(0, 1)[None]).latent_dist.parameters
    assert torch.equal(batch["moments"], moments)
    assert batch["text_states"].shape == (1, 32, 32)


def test_nothing_is_encoded_twice(encode, drawn, count_encodes):
    first = encode(drawn)
    assert len([kind for kind, _ in count_encodes if kind == "clips"]) == 7
    assert len(set(count_encodes)) == len(count_encodes)
    count_encodes.clear()
    again = encode(drawn)
    assert count_encodes == []
    assert again.fingerprint == first.fingerprint
    # What does not change an encoding hits the cache.
    assert encode(drawn, "optimizer.lr=1", "seed=5").fingerprint == first.fingerprint
    assert count_encodes == []


@pytest.mark.parametrize("change", ["data.fps=8", "data.buckets=[9x64x80]", "train.precision=bf16"])
def test_what_changes_an_encoding_misses_the_cache(encode, drawn, count_encodes, change):
    first = encode(drawn, "data.buckets=[9x64x96]")
    count_encodes.clear()
    assert encode(drawn, "data.buckets=[9x64x96]", change).fingerprint != first.fingerprint
    assert [kind for kind, _ in count_encodes].count("clips") >= 5


def test_changed_weights_and_files_miss_the_cache(encode, drawn, tiny_model, tmp_path, count_encodes):
    folder, model = tmp_path / "clips", tmp_path / "model"
    shutil.copytree(drawn, folder)
    shutil.copytree(tiny_model, model)
    encode(folder, f"model.path={model}")
    count_encodes.clear()
    shutil.copy(folder / "clip_0.mp4", folder / "clip_3.mp4")
    encode(folder, f"model.path={model}")
    # The same content in the same bucket is the same encoding, whatever its name.
    assert count_encodes == []
    Image.new("RGB", (64, 64)).save(folder / "image_0.png")
    encode(folder, f"model.path={model}")
    assert [kind for kind, _ in count_encodes] == ["clips"]
    count_encodes.clear()
    config = model / "vae/config.json"
    config.write_text(config.read_text() + "\n")
    encode(folder, f"model.path={model}")
    assert {kind for kind, _ in count_encodes} == {"clips"}


def test_a_bad_file_is_left_out_with_its_reason(encode, drawn, tmp_path, monkeypatch):
    folder = tmp_path / "clips"
    shutil.copytree(drawn, folder)
    (folder / "torn.mp4").write_bytes((folder / "clip_0.mp4").read_bytes()[:500])
    (folder / "torn.txt").write_text("torn")
    (folder / "clip_1.txt").unlink()
    data = encode(folder, "data.buckets=[9x64x96, 25x64x64]")  # the picture has no bucket of one frame here
    reasons = {one.path.rpartition("/")[2]: one.reason for one in data.rejected}
    assert set(reasons) == {"torn.mp4", "clip_1.mp4", "image_0.png"}
    assert "caption missing" in reasons["clip_1.mp4"]
    assert reasons["image_0.png"] == "too short: 1 frames at 16 fps, the shortest bucket has 9"
    assert len(data.samples) == 5

    # A file that probes well and fails to decode is found out while encoding.
    def fail(path, *_):
        raise cogds.encode.DecodeError(f"cannot decode {path}")

    monkeypatch.setattr(cogds.encode, "read_clip", fail)
    with pytest.raises(UserError, match=r"not one of the 8 clips .* can be trained"):
        encode(folder, "data.buckets=[9x64x80]")


def test_a_given_image_is_the_condition(encode, drawn, tmp_path):
    Image.fromarray(np.full((64, 96, 3), (250, 5, 5), np.uint8)).save(tmp_path / "first.png")
    (tmp_path / "videos.txt").write_text(f"{drawn / 'clip_0.mp4'}\n{drawn / 'clip_0.mp4'}\n")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    plain = encode(tmp_path)
    (tmp_path / "images.txt").write_text("first.png\nfirst.png\n")
    given = encode(tmp_path)
    dataset = ClipDataset(given.samples, tmp_path / "cache")
    assert torch.equal(dataset[0]["first_frame"][:, 0, 0], torch.tensor([250, 5, 5], dtype=torch.uint8))
    assert plain.samples[0].clip_key != given.samples[0].clip_key
    assert given.samples[0].clip_key == given.samples[1].clip_key
    assert given.samples[0].caption_key != given.samples[1].caption_key


def test_long_captions_are_counted(encode, drawn, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(drawn, folder)
    (folder / "clip_0.txt").write_text("a red circle " * 50)
    assert encode(folder).num_truncated == 1 + encode(drawn).num_truncated


def test_ranks_that_encode_one_after_the_other_leave_nothing_out(drawn, tmp_path, tiny_model, monkeypatch):
    """However far apart the ranks are, their shares are parts of one list."""
    asked = {}

    def ask_once(_world, function):
        # What rank 0 found before anyone wrote is what every rank is told.
        place = (function.__code__.co_firstlineno, function.__code__.co_name)
        if place not in asked:
            asked[place] = function()
        return asked[place]

    monkeypatch.setattr(cogds.encode, "on_rank0", ask_once)
    monkeypatch.setattr(cogds.encode, "on_all_ranks", lambda _, function: [function()])
    cfg, _ = load_config(
        None,
        [f"model.path={tiny_model}", f"data.path={drawn}", f"data.cache_dir={tmp_path / 'cache'}",
         "data.buckets=[9x64x96, 9x96x64, 1x64x64]", "data.num_workers=0", "train.precision=fp32"],
    )  # fmt: skip
    model = find_model(cfg.model.path)
    for rank in (1, 0):
        with suppress_missing(rank):
            data = prepare(cfg, model, make_buckets(cfg, model.geometry), World(rank, 2, rank, 2))
    cache = Cache(tmp_path / "cache")
    assert all(cache.has("clips", one.clip_key) and cache.has("captions", one.caption_key) for one in data.samples)


def suppress_missing(rank):
    # The rank that goes first cannot read what the other has yet to write.
    return contextlib.suppress(UserError) if rank else contextlib.nullcontext()

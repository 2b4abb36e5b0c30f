"""From a dataset to encoded clips: what is cached, what misses the cache, what is left out, what is evaluated."""

import dataclasses
import json
import re
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import cogds.data.cache.keys
import cogds.data.manifest.scan
import cogds.encode.clip_set
import cogds.encode.encoder
from cogds.core.conditioning import normalize_pixels
from cogds.data.cache.maintenance import prune
from cogds.data.cache.store import Cache
from cogds.data.loading.dataset import read_encoded
from cogds.data.video.media import DecodeError, read_clip
from cogds.encode.clip_set import load_clip_set
from cogds.encode.encoder import encode_dataset
from cogds.encode.encoding_plan import EncodingPlan
from cogds.encode.pruning import prune_unused
from cogds.encode.scan_data import scan_data
from cogds.errors import UserError
from cogds.files import process_tag
from cogds.model.load import load_vae
from tests.data import unruly
from tests.drawn import draw_clips
from tests.jobs import make_job

NAMES = [*(f"clip_{number}.mp4" for number in range(6)), "image_0.png"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The demo's dataset. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("drawn") / "clips"
    draw_clips(folder)
    return folder


@pytest.fixture(scope="module")
def job_of(tiny_model):
    """`job_of(folder, cache, *overrides)`: a job that trains the clips of a folder."""

    def make(folder, cache, *overrides):
        return make_job(
            f"model.path={tiny_model}", f"data.path={folder}", f"data.cache_dir={cache}", "train.precision=fp32",
            "data.buckets=[9x64x96, 9x96x64, 1x64x64]", "data.num_workers=0", *overrides,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def warm_cache(drawn, job_of, tmp_path_factory):
    """A cache that holds the encodings of `drawn`."""
    cache = tmp_path_factory.mktemp("warm") / "cache"
    encode_dataset(job_of(drawn, cache))
    return cache


@pytest.fixture
def cache(warm_cache, tmp_path):
    """A copy of the warm cache."""
    return shutil.copytree(warm_cache, tmp_path / "cache")


@pytest.fixture
def encode(job_of, cache):
    """`encode(folder, *overrides)`: encode a dataset with `cache`."""

    def run(folder, *overrides, max_unusable=1.0):
        return encode_dataset(job_of(folder, cache, *overrides), max_unusable=max_unusable)

    return run


@pytest.fixture
def folder(drawn, tmp_path):
    """A copy of the demo's dataset."""
    return shutil.copytree(drawn, tmp_path / "clips")


@pytest.fixture(scope="module")
def image(drawn, tmp_path_factory):
    """A dataset of one image."""
    folder = tmp_path_factory.mktemp("image")
    for suffix in (".png", ".txt"):
        shutil.copy(drawn / f"image_0{suffix}", folder)
    return folder


def keep_only(folder, *names):
    """Remove the other clips."""
    for path in folder.iterdir():
        if path.stem not in names:
            path.unlink()


def entries(cache):
    """Kind and key of every copy of every cache entry."""
    snapshots = {kind: Cache(cache).snapshot(kind) for kind in ("clips", "captions")}
    return Counter((kind, key) for kind, snapshot in snapshots.items() for key in snapshot.keys.to_pylist())


def kinds_added(cache, before):
    """Numbers of the entries added since `entries` returned `before`, by kind."""
    return Counter(kind for kind, _ in (entries(cache) - before).elements())


def clips_of(data):
    return [data.index[row] for row in range(len(data.index))]


def names_of(index):
    return [] if index is None else sorted(index[row].path.rpartition("/")[2] for row in range(len(index)))


def reasons_of(data):
    rows = map(json.loads, data.unusable.file.read_text().splitlines())
    return {row["path"].rpartition("/")[2]: row["reason"] for row in rows}


def categories_of(data):
    return {name: reason.split(":")[0] for name, reason in reasons_of(data).items()}


def test_clips_are_in_bucket_order_with_their_encodings(encode, drawn, job_of, cache):
    data = encode(drawn)
    assert sum(map(sum, data.index.sizes)) == len(data.index) == 7
    clips = clips_of(data)
    shapes = [shape for shape, sizes in zip(data.index.buckets, data.index.sizes) for _ in range(sum(sizes))]
    assert [clip.shape for clip in clips] == shapes
    assert data.unusable.num == 0
    encoded = read_encoded(Cache(cache), clips[0])
    pixels = torch.from_numpy(read_clip(clips[0].path, clips[0].shape, 16))
    assert torch.equal(encoded["first_frame"], pixels[0].permute(2, 0, 1))
    vae = load_vae(job_of(drawn, cache).model, torch.float32, "cpu")
    with torch.no_grad():
        video = normalize_pixels(pixels, torch.float32).permute(3, 0, 1, 2)[None]
        moments = vae.encode(video).latent_dist.parameters
    assert torch.equal(encoded["moments"], moments[0])
    assert encoded["text_states"].shape == (32, 32)


def test_decord_is_needed_only_if_clips_are_decoded(encode, drawn, monkeypatch):
    pytest.importorskip("decord")
    encode(drawn, "data.decoder=decord")
    monkeypatch.setitem(sys.modules, "decord", None)
    assert len(encode(drawn, "data.decoder=decord").index) == 7
    with pytest.raises(UserError, match=r"^data\.decoder: "):
        encode(drawn, "data.decoder=decord", "data.fps=8")


def test_nothing_is_encoded_twice(encode, drawn, cache):
    shutil.rmtree(cache)
    first = encode(drawn)
    before = entries(cache)
    assert kinds_added(cache, Counter()) == {"clips": 7, "captions": 8}  # and the empty caption
    assert set(before.values()) == {1}
    assert encode(drawn).fingerprint == first.fingerprint
    assert encode(drawn, "optimizer.lr=1", "seed=5").fingerprint == first.fingerprint
    assert entries(cache) == before


@pytest.mark.parametrize(
    "change",
    ["data.fps=8", "data.buckets=[1x64x80]", "train.precision=bf16", "data.decoder=decord", "data.vae_tiling=on"],
)
def test_a_setting_that_changes_encodings_misses_the_cache(encode, image, cache, change):
    before = entries(cache)
    first = encode(image)
    assert entries(cache) == before
    assert encode(image, change).fingerprint != first.fingerprint
    assert kinds_added(cache, before)["clips"] == 1


def test_another_encoding_version_misses_the_cache(encode, image, cache, monkeypatch):
    before = entries(cache)
    monkeypatch.setattr(cogds.data.cache.keys, "ENCODING_VERSION", cogds.data.cache.keys.ENCODING_VERSION + 1)
    encode(image)
    assert kinds_added(cache, before)["clips"] == 1


def test_a_changed_file_misses_the_cache_unless_its_new_content_is_known(encode, folder, cache):
    before = entries(cache)
    shutil.copy(folder / "clip_0.mp4", folder / "clip_3.mp4")
    encode(folder)
    assert entries(cache) == before
    Image.new("RGB", (64, 64)).save(folder / "image_0.png")
    encode(folder)
    assert kinds_added(cache, before) == {"clips": 1}


@pytest.mark.parametrize(
    "part, kind",
    [
        ("text_encoder/*.safetensors", "captions"), ("tokenizer/*.json", "captions"), ("vae/*.safetensors", "clips"),
        ("vae/config.json", "clips"),
    ],
)  # fmt: skip
def test_a_changed_part_of_the_model_misses_only_the_entries_it_makes(
    encode, image, tiny_model, tmp_path, cache, part, kind
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    before = entries(cache)
    first = encode(image, f"model.path={model}")
    assert entries(cache) == before
    file = next(model.glob(part))
    content = bytearray(file.read_bytes())
    if file.suffix == ".json":
        content += b"\n"
    else:
        content[-4] ^= 1  # the last bit of a weight
    file.write_bytes(content)
    assert encode(image, f"model.path={model}").fingerprint != first.fingerprint
    assert kinds_added(cache, before) == {kind: 1 if kind == "clips" else 2}  # captions: the image's and the empty one


def test_a_bad_file_is_left_out_with_its_reason(encode, folder):
    (folder / "torn.mp4").write_bytes((folder / "clip_0.mp4").read_bytes()[:500])
    (folder / "torn.txt").write_text("torn")
    (folder / "clip_1.txt").unlink()
    buckets = "data.buckets=[9x64x96, 25x64x64]"  # none of one frame, for the image
    data = encode(folder, buckets)
    categories = categories_of(data)
    assert categories.pop("torn.mp4")
    assert categories == {"clip_1.mp4": "caption missing", "image_0.png": "image without a 1-frame bucket"}
    assert (len(data.index), data.unusable.num, data.unusable.num_rows) == (5, 3, 8)
    with pytest.raises(UserError, match=r"^data\.max_unusable: 3 of 8 clips"):
        encode(folder, buckets, max_unusable=0.3)


def test_a_file_that_cannot_be_decoded_and_its_copies_are_not_tried_again(encode, folder, cache, monkeypatch):
    shutil.rmtree(cache)
    keep_only(folder, "clip_0", "clip_2", "image_0")
    for suffix in (".mp4", ".txt"):
        shutil.copy(folder / f"clip_2{suffix}", folder / f"copy{suffix}")
    tried, decode = [], cogds.encode.encoder.decode

    def failing(task):
        tried.append(task.path)
        if task.path.endswith(("clip_2.mp4", "copy.mp4")):
            raise DecodeError("the frame at 0.3 s is damaged")
        return decode(task)

    monkeypatch.setattr(cogds.encode.encoder, "decode", failing)
    data = encode(folder)
    assert reasons_of(data) == dict.fromkeys(["clip_2.mp4", "copy.mp4"], "damaged: the frame at 0.3 s is damaged")
    assert len(data.index) == 2
    again = encode(folder)
    assert len(tried) == 3  # the copies have one key
    assert (again.index.path, again.fingerprint) == (data.index.path, data.fingerprint)
    with pytest.raises(UserError, match=r"^data\.max_unusable: 2 of 4 clips"):
        encode(folder, max_unusable=0.4)


@pytest.mark.slow
def test_a_hang_and_a_memory_leak_lose_one_clip_each_until_the_next_run(encode, drawn, cache, monkeypatch):
    shutil.rmtree(cache)
    with monkeypatch.context() as patch:
        patch.setattr(cogds.encode.encoder, "decode", unruly.decode)
        data = encode(drawn, "data.num_workers=2", "data.decode_timeout_s=4", "data.decode_memory_gb=0.6")
    assert categories_of(data) == {"clip_0.mp4": "took too long", "clip_1.mp4": "needed too much memory"}
    assert len(data.index) == 5
    assert len(encode(drawn).index) == 7


def test_a_file_that_disappears_or_changes_while_it_is_encoded_is_left_out(encode, drawn, folder, cache, monkeypatch):
    shutil.rmtree(cache)
    keep_only(folder, "clip_0", "clip_1", "clip_3")
    decode = cogds.encode.encoder.decode

    def decode_and_change(task):
        clip = decode(task)
        (folder / "clip_0.mp4").unlink(missing_ok=True)
        shutil.copy(folder / "clip_3.mp4", folder / "clip_1.mp4")
        return clip

    with monkeypatch.context() as patch:
        patch.setattr(cogds.encode.encoder, "decode", decode_and_change)
        categories = categories_of(encode(folder))
    assert categories == {"clip_0.mp4": "disappeared", "clip_1.mp4": "changed while it was encoded"}
    shutil.copy(drawn / "clip_0.mp4", folder / "clip_0.mp4")
    assert reasons_of(encode(folder)) == {}


def test_an_image_of_the_data_set_is_the_condition(encode, drawn, tmp_path, cache):
    Image.fromarray(np.full((64, 96, 3), (250, 5, 5), np.uint8)).save(tmp_path / "first.png")
    (tmp_path / "videos.txt").write_text(f"{drawn / 'clip_0.mp4'}\n{drawn / 'clip_0.mp4'}\n")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    without_image = clips_of(encode(tmp_path))
    (tmp_path / "images.txt").write_text("first.png\nfirst.png\n")
    with_image = clips_of(encode(tmp_path))
    first_frame = read_encoded(Cache(cache), with_image[0])["first_frame"]
    assert torch.equal(first_frame[:, 0, 0], torch.tensor([250, 5, 5], dtype=torch.uint8))
    assert without_image[0].clip_key != with_image[0].clip_key
    assert with_image[0].clip_key == with_image[1].clip_key
    assert with_image[0].captions[0].key != with_image[1].captions[0].key


@pytest.fixture
def several(drawn, tmp_path):
    """A list of three clips with three, one and two captions, of which one is the same."""
    texts = {"clip_0.mp4": ["one", "two", "three"], "image_0.png": ["four"], "clip_1.mp4": ["two", "five"]}
    rows = [{"path": str(drawn / name), "captions": captions} for name, captions in texts.items()]
    (tmp_path / "several.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "several.jsonl"


def texts_of(data):
    return {clip.path.rpartition("/")[2]: [caption.text for caption in clip.captions] for clip in clips_of(data)}


def test_all_captions_are_cached_once_each(encode, several, cache):
    before = entries(cache)
    data = encode(several)
    assert texts_of(data) == {
        "clip_0.mp4": ["one", "two", "three"], "image_0.png": ["four"], "clip_1.mp4": ["two", "five"],
    }  # fmt: skip
    assert kinds_added(cache, before) == {"captions": 5}
    assert (entries(cache) - before).most_common(1)[0][1] == 1
    for clip in clips_of(data):
        for caption in clip.captions:
            states = Cache(cache).read("captions", caption.key, caption.place)["text_states"]
            (same,) = {other.key for row in clips_of(data) for other in row.captions if other.text == caption.text}
            assert (same, states.shape) == (caption.key, (32, 32))
    assert [clip.captions[0].text for clip in clips_of(data)] == [
        data.trained[row].captions[0].text for row in range(len(data.trained))
    ]
    assert {len(data.trained[row].captions) for row in range(len(data.trained))} == {1}  # evaluation uses the first


def test_mirror_images_are_trained_too_except_of_captions_with_a_side(encode, drawn, tmp_path, cache):
    texts = {
        "clip_0.mp4": ["a bright disc"], "clip_1.mp4": ["it moves to the Left"], "clip_2.mp4": ["it rises"],
        "image_0.png": ["still", "turned clockwise"],
    }  # fmt: skip
    rows = [{"path": str(drawn / name), "captions": captions} for name, captions in texts.items()]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = encode(tmp_path / "list.jsonl")
    before = entries(cache)
    data = encode(tmp_path / "list.jsonl", "data.mirror=true")
    clips = {}
    for clip in clips_of(data):
        clips.setdefault(clip.path.rpartition("/")[2], []).append(clip)
    assert {name: [clip.mirrored for clip in copies] for name, copies in clips.items()} == {
        "clip_0.mp4": [False, True], "clip_1.mp4": [False], "clip_2.mp4": [False, True], "image_0.png": [False],
    }  # fmt: skip
    assert kinds_added(cache, before) == {"clips": 2}  # the others are those without mirror images
    assert {clip.clip_key for clip in clips_of(plain)} == {copies[0].clip_key for copies in clips.values()}
    for clip, mirror_image in (clips["clip_0.mp4"], clips["clip_2.mp4"]):
        assert clip.captions == mirror_image.captions
        first, mirrored = (read_encoded(Cache(cache), each)["first_frame"] for each in (clip, mirror_image))
        assert torch.equal(first.flip(-1), mirrored)
        assert not torch.equal(first, mirrored)
    assert not any(data.trained[row].mirrored for row in range(len(data.trained)))


def test_pruning_keeps_all_captions(job_of, several, cache):
    job = job_of(several, cache)
    prune_unused(job, encode_dataset(job), is_confirmed=True)
    assert kinds_added(cache, Counter()) == {"clips": 3, "captions": 6}  # and the empty caption


def test_the_captions_are_part_of_the_fingerprint(encode, several):
    """On the fly, too. That of clips with one caption each is as in version 0.2."""
    for mode in ("data.encode=cached", "data.encode=on_the_fly"):
        fingerprints = [encode(several, mode).fingerprint]
        lines = several.read_text()
        for old, new in (('"two", "three"', '"three", "two"'), ('["two", "five"]', '["two"]')):
            several.write_text(lines.replace(old, new))
            assert several.read_text() != lines
            fingerprints.append(encode(several, mode).fingerprint)
        several.write_text(lines)
        fingerprints += [encode(several, mode, f"data.caption_prefix={prefix}").fingerprint for prefix in ("a", "b")]
        assert len(set(fingerprints)) == 5


def test_a_prefix_changes_the_keys_of_captions_only(encode, several, cache, monkeypatch):
    without, before = encode(several, "data.caption_prefix= "), entries(cache)
    monkeypatch.setattr(cogds.data.manifest.scan, "probe_file", None)  # no file is opened again
    data = encode(several, "data.caption_prefix= ohwx,")
    assert texts_of(data) == {name: [f"ohwx, {text}" for text in texts] for name, texts in texts_of(without).items()}
    assert kinds_added(cache, before) == {"captions": 5}
    assert [clip.clip_key for clip in clips_of(data)] == [clip.clip_key for clip in clips_of(without)]
    assert torch.equal(data.empty_caption_states, without.empty_caption_states)
    assert data.trained[0].captions[0].text.startswith("ohwx, ")


def test_each_data_set_has_its_own_prefix(encode, several):
    sets = f"[{{path: {several}, caption_prefix: mine}}, {{path: {several}, caption_prefix: ''}}, {{path: {several}}}]"
    data = encode("", f"data.sets={sets}", "data.caption_prefix=all", f"eval.path={several}")
    texts = [caption.text for clip in clips_of(data) for caption in clip.captions]
    assert sorted(text for text in texts if "five" in text) == ["all five", "five", "mine five"]
    assert sorted(data.held_out[row].captions[0].text for row in range(3)) == ["all four", "all one", "all two"]


def test_a_missing_caption_gets_the_default_and_the_prefix(encode, folder):
    keep_only(folder, "clip_0")
    (folder / "clip_0.txt").unlink(missing_ok=True)
    data = encode(folder, "data.default_caption=a film", "data.caption_prefix=ohwx")
    assert texts_of(data) == {"clip_0.mp4": ["ohwx a film"]}


def test_several_data_sets(encode, drawn):
    data = encode("", f"data.sets=[{{path: {drawn}}}, {{path: {drawn}, repeats: 2.5}}]")
    assert all(sizes[0] == sizes[1] for sizes in data.index.sizes)
    assert data.mixture.repeats == (1.0, 2.5)
    assert len({clip.clip_key for clip in clips_of(data)}) == 7


def test_windows_of_a_file_have_their_own_encodings(encode, folder):
    keep_only(folder, "clip_0")
    clips = clips_of(encode(folder, "data.windows=all"))
    assert len({clip.clip_key for clip in clips}) == len(clips)
    assert sorted(clip.start_s for clip in clips) == pytest.approx([9 / 16 * k for k in range(5)])


def make_plan(job):
    clips = load_clip_set(job.cfg, scan_data(job.cfg, job.world), job.buckets)
    return EncodingPlan(job, clips, held_out=None, trained=None)


def test_each_clip_is_encoded_by_one_rank(job_of, drawn, tmp_path):
    work = make_plan(job_of(drawn, tmp_path / "cache")).work(2)
    keys = [part.clips.column("key").to_pylist() for part in work]
    assert sorted(map(len, keys)) == [3, 4]
    assert len(set(keys[0] + keys[1])) == 7


def test_entries_that_are_pruned_meanwhile_are_an_error(job_of, drawn, cache):
    plan = make_plan(job_of(drawn, cache))
    prune(cache, {"clips": (), "captions": ()})
    with pytest.raises(UserError, match=r"^data\.cache_dir: 15 encodings"):
        plan.finish({})


def test_temporary_files_of_killed_writers_are_removed(encode, drawn, cache):
    abandoned = cache / "clips" / f"a.{process_tag().split('@')[0]}@999999999-0.tmp.safetensors"
    abandoned.mkdir()
    (abandoned / "a.safetensors").touch()
    encode(drawn)
    assert not abandoned.exists()


# --- evaluation


def test_held_out_clips_are_not_trained_and_stay_the_same(encode, drawn, tmp_path, cache, caplog):
    data = encode(drawn, "eval.held_out=0.3")
    held_out = names_of(data.held_out)
    assert len(held_out) == round(0.3 * len(NAMES)) == 2
    assert names_of(data.index) == [name for name in NAMES if name not in held_out]
    assert data.mixture.sizes == data.index.sizes
    assert data.fingerprint != encode(drawn).fingerprint
    assert data.unusable.num == 0
    assert all(read_encoded(Cache(cache), data.held_out[row]) for row in range(len(data.held_out)))
    assert set(names_of(data.trained)) <= set(names_of(data.index))
    # In another folder, with a clip removed and one added:
    moved = shutil.copytree(drawn, tmp_path / "elsewhere/other")
    removed = names_of(data.index)[0]
    (moved / removed).rename(moved / "new.mp4")
    (moved / removed.replace("mp4", "txt")).rename(moved / "new.txt")
    again = encode(moved, "eval.held_out=0.3")
    assert [name for name in names_of(again.held_out) if name != "new.mp4"] == held_out
    # With a larger share, and with fewer to evaluate:
    more = encode(drawn, "eval.held_out=0.6")
    assert set(held_out) < set(names_of(more.held_out))
    few = encode(drawn, "eval.held_out=0.6", "eval.num_clips=1")
    assert len(few.held_out) == len(few.trained) == 1
    assert few.index.path == more.index.path
    assert caplog.messages == []


def test_a_resumed_run_never_holds_out_a_file_that_it_trained(encode, drawn, tmp_path, job_of, cache):
    before = encode(drawn, "eval.held_out=0.3")
    fewer = shutil.copytree(drawn, tmp_path / "fewer")
    gone = names_of(before.held_out)[0]
    (fewer / gone).unlink()
    job = job_of(fewer, cache, "eval.held_out=0.3")
    assert set(names_of(encode_dataset(job).held_out)) & set(names_of(before.index))
    resumed = encode_dataset(dataclasses.replace(job, held_out_limit=before.held_out_limit))
    assert names_of(resumed.held_out) == names_of(before.held_out)[1:]


def test_all_windows_of_a_file_are_held_out_or_none(encode, drawn):
    data = encode(drawn, "eval.held_out=0.3", "data.windows=all", "data.num_windows=2", "eval.num_clips=100")
    held_out, trained = set(names_of(data.held_out)), set(names_of(data.index))
    assert len(data.held_out) > len(held_out) > 0
    assert not held_out & trained
    assert held_out | trained == set(NAMES)


def test_on_the_fly_only_evaluated_clips_are_encoded(encode, drawn, job_of, tmp_path):
    cache = tmp_path / "empty"
    assert encode_dataset(job_of(drawn, cache, "eval.every=null", "data.encode=on_the_fly")).trained is None
    job = dataclasses.replace(job_of(drawn, cache, "eval.every=null"), evaluated_only=True)
    assert {clip.clip_place for clip in clips_of(encode_dataset(job))} == {""}
    assert kinds_added(cache, Counter()) == {"captions": 1}  # the empty one
    evaluation = "eval.held_out=0.3", "eval.num_clips=2"
    on_the_fly = encode_dataset(job_of(drawn, cache, *evaluation, "data.encode=on_the_fly"))
    assert kinds_added(cache, Counter())["clips"] == 4
    assert {clip.clip_place for clip in clips_of(on_the_fly)} == {""}
    cached = encode(drawn, *evaluation)
    assert on_the_fly.held_out.names() == cached.held_out.names()
    assert on_the_fly.trained.names() == cached.trained.names()


def test_clips_are_evaluated_only_if_losses_or_videos_are_made(encode, drawn):
    prompt = "sample.prompts=[{prompt: a cat, image: cat.png}]"
    options = "eval.held_out=0.3", "eval.every=null", prompt
    data = encode(drawn, *options)
    assert (data.held_out, data.trained) == (None, None)
    assert encode(drawn, *options, "sample.every=5").held_out is not None


def test_another_data_set_is_evaluated_instead(encode, drawn, real_clips, tmp_path, caplog):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(real_clips / "carphone_pristine.mp4", other / "man.mp4")
    (other / "man.txt").write_text("a man")
    (other / "broken.mp4").write_bytes(b"nothing")
    (other / "broken.txt").write_text("nothing")
    data = encode(drawn, f"eval.path={other}")
    assert names_of(data.index) == NAMES
    assert names_of(data.held_out) == ["man.mp4"]
    assert data.fingerprint == encode(drawn).fingerprint
    assert data.unusable.num == 0
    (message,) = caplog.messages
    assert message.startswith("eval.path: 1 of 2 clips ")
    with pytest.raises(UserError, match=r"^eval\.path: .*nowhere"):
        encode(drawn, f"eval.path={tmp_path / 'nowhere'}")
    (other / "man.mp4").unlink()
    with pytest.raises(UserError, match=r"^eval\.path: .*other"):
        encode(drawn, f"eval.path={other}")


@pytest.mark.parametrize("mode", ["cached", "on_the_fly"])
def test_clips_that_are_evaluated_and_trained_give_a_warning(encode, drawn, caplog, mode):
    assert names_of(encode(drawn, f"eval.path={drawn}", f"data.encode={mode}").held_out) == NAMES
    (message,) = caplog.messages
    assert message.startswith("7 of the 7 clips ")


def test_other_ranges_of_trained_files_give_a_warning(encode, drawn, tmp_path, caplog):
    later = {"file_name": str(drawn / "clip_0.mp4"), "text": "later", "start_s": 1.0, "end_s": 2.9}
    (tmp_path / "later.jsonl").write_text(json.dumps(later))
    data = encode(drawn, f"eval.path={tmp_path / 'later.jsonl'}")
    assert not set(data.held_out.keys("clip_key")) & set(data.index.keys("clip_key"))
    (message,) = caplog.messages
    assert message.startswith("1 of the 1 clips ")


def test_candidates_suffice_for_eval_num_clips(encode, drawn, monkeypatch):
    monkeypatch.setattr(cogds.encode.clip_set, "MAX_CANDIDATES", 1)
    assert names_of(encode(drawn, "eval.num_clips=100").trained) == NAMES
    assert len(encode(drawn, "eval.num_clips=5").trained) == 5


def test_no_held_out_clip_gives_a_warning_with_a_share_that_holds_out_one(encode, drawn, caplog):
    assert encode(drawn, "eval.held_out=0.001").held_out is None
    (message,) = caplog.messages
    assert message.startswith("eval.held_out: 0.001 ")
    share = re.search(r"\(([\d.]+) or more holds out a file\)", message)[1]
    assert len(encode(drawn, f"eval.held_out={share}").held_out) == 1


def test_holding_out_all_clips_is_an_error(encode, drawn):
    with pytest.raises(UserError, match=r"^data\.path: .*eval\.held_out"):
        encode(drawn, "eval.held_out=0.999")


def test_a_damaged_held_out_file_is_unusable(encode, folder):
    held_out = names_of(encode(folder, "eval.held_out=0.3").held_out)
    content = bytearray((folder / held_out[0]).read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    (folder / held_out[0]).write_bytes(content)
    data = encode(folder, "eval.held_out=0.3")
    assert held_out[0] not in names_of(data.held_out)
    assert set(held_out[1:]) < set(names_of(data.held_out))  # and another takes its place
    assert (data.unusable.num, data.unusable.num_rows) == (1, 7)
    assert list(reasons_of(data)) == [held_out[0]]

"""From a dataset to encoded samples: what is cached, what misses the cache, what is left out."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cogds.data.cache.keys
import cogds.data.video.media
import cogds.encode.clip_set
import cogds.encode.encoder
import cogds.encode.encoding_plan
from cogds.config.loading import load_config
from cogds.core.conditioning import normalize_pixels
from cogds.data.cache.store import Cache, CacheWriter
from cogds.data.loading.dataset import read_encoded
from cogds.data.video.drawn import draw_clips
from cogds.data.video.media import read_clip
from cogds.distributed.world import World
from cogds.encode.clip_set import load_clip_set
from cogds.encode.encoder import encode_dataset
from cogds.encode.encoding_plan import EncodingPlan
from cogds.encode.scan_data import scan_data
from cogds.errors import UserError
from cogds.files import process_tag
from cogds.job import make_buckets
from cogds.model.load import find_model, load_vae
from tests.data import unruly

ALONE = World(0, 1, 0, 1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "clips"
    draw_clips(folder)
    return folder


def config(model, folder, cache, *overrides):
    cfg, _ = load_config(
        None,
        [f"model.path={model}", f"data.path={folder}", f"data.cache_dir={cache}", "train.precision=fp32",
         "data.buckets=[9x64x96, 9x96x64, 1x64x64]", "data.num_workers=0", *overrides],
    )  # fmt: skip
    return cfg


@pytest.fixture(scope="module")
def warm_cache(drawn, tiny_model, tmp_path_factory):
    """A cache that holds the encodings of `drawn`."""
    cache = tmp_path_factory.mktemp("warm") / "cache"
    cfg = config(tiny_model, drawn, cache)
    model = find_model(cfg.model.path)
    encode_dataset(cfg, model, make_buckets(cfg, model), ALONE)
    return cache


@pytest.fixture(scope="module")
def image(drawn, tmp_path_factory):
    """A data set of one image."""
    folder = tmp_path_factory.mktemp("image") / "clips"
    folder.mkdir()
    for suffix in (".png", ".txt"):
        shutil.copy(drawn / f"image_0{suffix}", folder)
    return folder


@pytest.fixture
def encode(tiny_model, warm_cache, tmp_path):
    """`encode(folder, *overrides)`: the encoded data set, with a copy of the warm cache."""
    shutil.copytree(warm_cache, tmp_path / "cache")

    def run(folder, *overrides, max_unusable=1.0):
        cfg = config(tiny_model, folder, tmp_path / "cache", *overrides)
        model = find_model(cfg.model.path)
        return encode_dataset(cfg, model, make_buckets(cfg, model), ALONE, max_unusable=max_unusable)

    return run


def samples(data):
    return [data.index[row] for row in range(len(data.index))]


def reasons_of(data):
    rows = map(json.loads, data.unusable.file.read_text().splitlines())
    return {row["path"].rpartition("/")[2]: row["reason"] for row in rows}


def phrases_of(data):
    """The beginnings of the reasons, by which clips are counted."""
    return {name: reason.split(":")[0] for name, reason in reasons_of(data).items()}


@pytest.fixture
def count_encodes(monkeypatch):
    """Names of the cache entries written since the fixture was made."""
    written, write = [], CacheWriter.write

    def counting(self, key, tensors):
        written.append(("clips" if "moments" in tensors else "captions", key))
        write(self, key, tensors)

    monkeypatch.setattr(CacheWriter, "write", counting)
    return written


def test_samples_stand_in_bucket_order_with_their_encodings(encode, drawn, tiny_model, tmp_path):
    data = encode(drawn)
    assert sum(map(sum, data.index.sizes)) == len(data.index) == 7
    clips = samples(data)
    assert [c.shape for c in clips] == [b for b, n in zip(data.index.buckets, data.index.sizes) for _ in range(sum(n))]
    assert data.unusable.num == 0
    read = read_encoded(Cache(tmp_path / "cache"), clips[0])
    pixels = torch.from_numpy(read_clip(clips[0].path, clips[0].shape, 16))
    assert torch.equal(read["first_frame"], pixels[0].permute(2, 0, 1))
    vae = load_vae(find_model(str(tiny_model)), torch.float32, "cpu")
    with torch.no_grad():
        video = normalize_pixels(pixels, torch.float32).permute(3, 0, 1, 2)[None]
        moments = vae.encode(video).latent_dist.parameters
    assert torch.equal(read["moments"], moments[0])
    assert read["text_states"].shape == (32, 32)


def test_decord_is_needed_only_if_clips_are_decoded(encode, drawn, monkeypatch):
    pytest.importorskip("decord")
    encode(drawn, "data.decoder=decord")
    monkeypatch.setitem(sys.modules, "decord", None)
    assert len(encode(drawn, "data.decoder=decord").index) == 7
    with pytest.raises(UserError, match=r"^data\.decoder: "):
        encode(drawn, "data.decoder=decord", "data.fps=8")


def test_nothing_is_encoded_twice(encode, drawn, count_encodes, tmp_path):
    shutil.rmtree(tmp_path / "cache")
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


@pytest.mark.parametrize(
    "change",
    ["data.fps=8", "data.buckets=[1x64x80]", "train.precision=bf16", "data.decoder=decord", "data.vae_tiling=on"],
)
def test_what_changes_an_encoding_misses_the_cache(encode, image, count_encodes, change):
    first = encode(image)
    assert count_encodes == []
    assert encode(image, change).fingerprint != first.fingerprint
    assert [kind for kind, _ in count_encodes].count("clips") == 1


def test_another_version_of_the_code_misses_the_cache(encode, image, count_encodes, monkeypatch):
    """How frames are resized and cropped is code: whoever changes it increases the version."""
    monkeypatch.setattr(cogds.data.cache.keys, "ENCODING_VERSION", cogds.data.cache.keys.ENCODING_VERSION + 1)
    encode(image)
    assert [kind for kind, _ in count_encodes].count("clips") == 1


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


@pytest.mark.parametrize(
    "part, kind",
    [("text_encoder/*.safetensors", "captions"), ("tokenizer/*.json", "captions"), ("vae/*.safetensors", "clips")],
)
def test_a_changed_part_of_the_model_misses_what_it_makes_and_nothing_else(
    encode, image, tiny_model, tmp_path, count_encodes, part, kind
):
    shutil.rmtree(tmp_path / "cache")
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    first = encode(image, f"model.path={model}")
    before = list(count_encodes)
    count_encodes.clear()
    file = next(model.glob(part))
    content = bytearray(file.read_bytes())
    if file.suffix == ".json":
        content += b"\n"
    else:
        content[-4] ^= 1  # the last bit of a weight
    file.write_bytes(content)
    assert encode(image, f"model.path={model}").fingerprint != first.fingerprint
    assert [one for one, _ in count_encodes] == [one for one, _ in before if one == kind] != []
    assert not set(count_encodes) & set(before)


def test_a_bad_file_is_left_out_with_its_reason(encode, drawn, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(drawn, folder)
    (folder / "torn.mp4").write_bytes((folder / "clip_0.mp4").read_bytes()[:500])
    (folder / "torn.txt").write_text("torn")
    (folder / "clip_1.txt").unlink()
    buckets = "data.buckets=[9x64x96, 25x64x64]"  # the picture has no bucket of one frame here
    data = encode(folder, buckets)
    reasons = reasons_of(data)
    assert set(reasons) == {"torn.mp4", "clip_1.mp4", "image_0.png"}
    assert reasons["clip_1.mp4"].startswith("caption missing: ")
    assert reasons["image_0.png"].startswith("too short: ")
    assert (len(data.index), data.unusable.num, data.unusable.num_rows) == (5, 3, 8)
    with pytest.raises(UserError, match=r"^data\.max_unusable: 3 of 8 clips"):
        encode(folder, buckets, max_unusable=0.3)


def test_a_file_that_fails_to_decode_is_not_tried_again(encode, drawn, tmp_path, monkeypatch):
    """It probes well; what is found out while encoding is kept, for its copies too, and for later runs."""
    shutil.rmtree(tmp_path / "cache")
    folder = tmp_path / "clips"
    shutil.copytree(drawn, folder)
    for suffix in (".mp4", ".txt"):
        shutil.copy(folder / f"clip_2{suffix}", folder / f"copy{suffix}")
    tried, decode = [], cogds.encode.encoder.decode

    def failing(task):
        tried.append(task.path)
        if task.path.endswith(("clip_2.mp4", "copy.mp4")):
            raise cogds.data.video.media.DecodeError("the frame at 0.3 s is damaged")
        return decode(task)

    monkeypatch.setattr(cogds.encode.encoder, "decode", failing)
    data = encode(folder)
    assert reasons_of(data) == dict.fromkeys(["clip_2.mp4", "copy.mp4"], "damaged: the frame at 0.3 s is damaged")
    assert len(data.index) == 6
    assert len(tried) == 7
    again = encode(folder)
    assert len(tried) == 7
    assert again.index.path == data.index.path
    with pytest.raises(UserError, match=r"^data\.max_unusable: 2 of 8 clips"):
        encode(folder, max_unusable=0.2)
    monkeypatch.setattr(cogds.encode.encoder, "decode", lambda _: pytest.fail("all is there"))
    assert encode(folder).fingerprint == data.fingerprint


@pytest.mark.slow
def test_a_hang_and_a_memory_leak_cost_one_clip_each(encode, drawn, monkeypatch, tmp_path):
    shutil.rmtree(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(cogds.encode.encoder, "decode", unruly.decode)
        data = encode(drawn, "data.num_workers=2", "data.decode_timeout_s=4", "data.decode_memory_gb=0.6")
    assert phrases_of(data) == {"clip_0.mp4": "took too long", "clip_1.mp4": "needed too much memory"}
    assert len(data.index) == 5
    # The machine may have been at fault: the next run tries them again, and nothing else.
    assert len(encode(drawn).index) == 7


def test_a_file_that_disappears_or_changes_while_it_is_encoded_is_not_kept(encode, drawn, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "cache")
    folder = tmp_path / "clips"
    shutil.copytree(drawn, folder)

    class Meanwhile(cogds.encode.encoder.WorkerPool):
        def imap(self, tasks, ahead=0):
            for clip in super().imap(tasks, ahead):
                (folder / "clip_0.mp4").unlink(missing_ok=True)
                shutil.copy(folder / "clip_3.mp4", folder / "clip_1.mp4")
                yield clip

    with monkeypatch.context() as patch:
        patch.setattr(cogds.encode.encoder, "WorkerPool", Meanwhile)
        data = encode(folder)
    reasons = reasons_of(data)
    assert set(reasons) == {"clip_0.mp4", "clip_1.mp4"}
    assert reasons["clip_0.mp4"].startswith("disappeared")
    assert reasons["clip_1.mp4"].startswith("changed")
    shutil.copy(drawn / "clip_0.mp4", folder / "clip_0.mp4")
    assert reasons_of(encode(folder)) == {}


def test_a_given_image_is_the_condition(encode, drawn, tmp_path):
    Image.fromarray(np.full((64, 96, 3), (250, 5, 5), np.uint8)).save(tmp_path / "first.png")
    (tmp_path / "videos.txt").write_text(f"{drawn / 'clip_0.mp4'}\n{drawn / 'clip_0.mp4'}\n")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    plain = encode(tmp_path)
    (tmp_path / "images.txt").write_text("first.png\nfirst.png\n")
    given = samples(encode(tmp_path))
    first = read_encoded(Cache(tmp_path / "cache"), given[0])["first_frame"]
    assert torch.equal(first[:, 0, 0], torch.tensor([250, 5, 5], dtype=torch.uint8))
    assert samples(plain)[0].clip_key != given[0].clip_key
    assert given[0].clip_key == given[1].clip_key
    assert given[0].caption_key != given[1].caption_key


def test_what_is_pruned_meanwhile_is_missed(encode, drawn, monkeypatch):
    """The index never names an encoding that is not there."""
    find = cogds.encode.encoding_plan.Snapshot.find
    monkeypatch.setattr(
        cogds.encode.encoding_plan.Snapshot, "find", lambda self, keys: np.full_like(find(self, keys), -1)
    )
    with pytest.raises(UserError, match=r"^data\.cache_dir: 14 encodings"):
        encode(drawn)


def test_several_sets_and_windows(encode, drawn):
    sets = f"data.sets=[{{path: {drawn}}}, {{path: {drawn}, repeats: 2.5}}]"
    data = encode("", sets)
    assert all(one[0] == one[1] for one in data.index.sizes)
    assert data.mixture.repeats == (1.0, 2.5)
    assert len({clip.clip_key for clip in samples(data)}) == 7
    long = encode(drawn, "data.windows=all")
    assert len(long.index) > 7
    starts = sorted(clip.start_s for clip in samples(long) if clip.path.endswith("clip_0.mp4"))
    assert starts == pytest.approx([9 / 16 * k for k in range(5)])
    assert len({clip.clip_key for clip in samples(long)}) == len(long.index)


def test_ranks_share_the_work(drawn, tmp_path, tiny_model):
    """Each clip is encoded by one rank."""
    cfg = config(tiny_model, drawn, tmp_path / "cache")
    model = find_model(cfg.model.path)
    clips = load_clip_set(cfg, scan_data(cfg, ALONE), make_buckets(cfg, model))
    plan = EncodingPlan(cfg, model, clips, held_out=None, trained=None)
    shares = [work.clips.column("key").to_pylist() for work in plan.work(2)]
    assert sorted(map(len, shares)) == [3, 4]
    assert len(set(shares[0] + shares[1])) == 7


def test_what_killed_writers_left_is_removed(encode, drawn, tmp_path):
    encode(drawn)
    left = tmp_path / "cache/clips" / f"a.{process_tag().split('@')[0]}@999999999-0.tmp.safetensors"
    left.mkdir()
    (left / "a.safetensors").touch()
    encode(drawn)
    assert not left.exists()


# ------------------------------------------------------------------------------------------- what is evaluated


def names(index):
    return [] if index is None else sorted(index[row].path.rpartition("/")[2] for row in range(len(index)))


ALL = ["clip_0.mp4", "clip_1.mp4", "clip_2.mp4", "clip_3.mp4", "clip_4.mp4", "clip_5.mp4", "image_0.png"]


def test_what_is_held_out_is_not_trained_and_stays_whatever_comes(encode, drawn, tmp_path, caplog):
    data = encode(drawn, "eval.held_out=0.3")
    held = names(data.held_out)
    assert held
    assert names(data.index) == [name for name in ALL if name not in held]
    assert data.mixture.sizes == data.index.sizes
    assert data.fingerprint != encode(drawn).fingerprint
    assert data.unusable.num == 0
    assert all(read_encoded(Cache(tmp_path / "cache"), data.held_out[row]) for row in range(len(data.held_out)))
    assert set(names(data.trained)) <= set(names(data.index))
    # Moved, with one clip less and one more: the same are held out.
    moved = tmp_path / "elsewhere/other"
    shutil.copytree(drawn, moved)
    gone = names(data.index)[0]
    (moved / gone).rename(moved / "new.mp4")
    (moved / gone.replace("mp4", "txt")).rename(moved / "new.txt")
    again = encode(moved, "eval.held_out=0.3")
    assert [name for name in names(again.held_out) if name != "new.mp4"] == held
    # More of them: the same and others, up to eval.num_clips, and those still in the same places of the index.
    more = encode(drawn, "eval.held_out=0.6")
    assert set(held) < set(names(more.held_out))
    few = encode(drawn, "eval.held_out=0.6", "eval.num_clips=1")
    assert len(few.held_out) == len(few.trained) == 1
    assert few.index.path == more.index.path
    assert caplog.messages == []


def test_all_windows_of_a_file_are_on_one_side(encode, drawn):
    data = encode(drawn, "eval.held_out=0.3", "data.windows=all", "eval.num_clips=100")
    held, trained = set(names(data.held_out)), set(names(data.index))
    assert len(data.held_out) > len(held)
    assert held
    assert not held & trained
    assert held | trained == set(ALL)


def test_on_the_fly_only_what_is_evaluated_is_encoded(encode, drawn, count_encodes, tmp_path):
    shutil.rmtree(tmp_path / "cache")
    on_the_fly = encode(drawn, "eval.held_out=0.3", "eval.num_clips=2", "data.encode=on_the_fly")
    assert len([kind for kind, _ in count_encodes if kind == "clips"]) == 4
    assert {clip.clip_place for clip in samples(on_the_fly)} == {""}
    cached = encode(drawn, "eval.held_out=0.3", "eval.num_clips=2")
    for name in ("held_out", "trained"):
        one, other = (getattr(data, name) for data in (on_the_fly, cached))
        assert names(one) == names(other)
        assert one.names() == other.names()  # the same encodings
    count_encodes.clear()
    nothing = encode(drawn, "eval.every=null", "data.encode=on_the_fly")
    assert (nothing.held_out, nothing.trained) == (None, None)
    assert count_encodes == []


def test_another_data_set_is_evaluated_instead(encode, drawn, real_clips, tmp_path, caplog):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(real_clips / "carphone_pristine.mp4", other / "man.mp4")
    (other / "man.txt").write_text("a man")
    (other / "broken.mp4").write_bytes(b"nothing")
    (other / "broken.txt").write_text("nothing")
    data = encode(drawn, f"eval.path={other}")
    assert names(data.index) == ALL
    assert names(data.held_out) == ["man.mp4"]
    assert data.fingerprint == encode(drawn).fingerprint
    assert data.unusable.num == 0
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("eval.path: 1 of 2 clips ")
    with pytest.raises(UserError, match=r"^eval\.path: .*nowhere"):
        encode(drawn, f"eval.path={tmp_path / 'nowhere'}")
    (other / "man.mp4").unlink()
    with pytest.raises(UserError, match=r"^eval\.path: .*other"):
        encode(drawn, f"eval.path={other}")


def test_clips_that_are_trained_too_are_warned_of(encode, drawn, caplog):
    assert names(encode(drawn, f"eval.path={drawn}").held_out) == ALL
    assert [message[:13] for message in caplog.messages] == ["7 of the 7 cl"]
    caplog.clear()
    encode(drawn, f"eval.path={drawn}", "data.encode=on_the_fly")
    assert [message[:13] for message in caplog.messages] == ["7 of the 7 cl"]
    caplog.clear()


def test_other_parts_of_files_that_are_trained_are_warned_of(encode, drawn, tmp_path, caplog):
    """Another encoding, of the same file."""
    later = {"file_name": str(drawn / "clip_0.mp4"), "text": "later", "start_s": 1.0, "end_s": 2.9}
    (tmp_path / "later.jsonl").write_text(json.dumps(later))
    data = encode(drawn, f"eval.path={tmp_path / 'later.jsonl'}")
    assert not set(data.held_out.keys("clip_key")) & set(data.index.keys("clip_key"))
    assert [message[:13] for message in caplog.messages] == ["1 of the 1 cl"]
    caplog.clear()


def test_nothing_is_evaluated_where_nothing_wants_it(encode, drawn, count_encodes, tmp_path):
    shutil.rmtree(tmp_path / "cache")
    prompt = "sample.prompts=[{prompt: a cat, image: cat.png}]"
    data = encode(drawn, "eval.held_out=0.3", "eval.every=null", "data.encode=on_the_fly", prompt)
    assert (data.held_out, data.trained) == (None, None)
    assert [kind for kind, _ in count_encodes] == ["captions"]  # the empty one
    data = encode(drawn, "eval.held_out=0.3", "eval.every=null", "sample.every=5", "data.encode=on_the_fly", prompt)
    assert data.held_out is not None
    assert [kind for kind, _ in count_encodes].count("clips") > 0


def test_all_clips_are_evaluated_where_all_are_wanted(encode, drawn, monkeypatch):
    monkeypatch.setattr(cogds.encode.clip_set, "MAX_CANDIDATES", 1)
    assert names(encode(drawn, "eval.num_clips=100").trained) == ALL
    assert len(encode(drawn, "eval.num_clips=5").trained) == 5


def test_much_more_held_out_than_wanted_gives_a_warning(encode, drawn, caplog, monkeypatch):
    encode(drawn, "eval.held_out=0.3")
    assert caplog.messages == []
    monkeypatch.setattr(cogds.encode.clip_set, "_is_held_out", lambda table, *_: np.arange(len(table)) < 3)
    encode(drawn, "eval.held_out=0.1")
    assert [message.split(":")[0] for message in caplog.messages] == ["eval.held_out"]
    assert " 3 of 7 clips" in caplog.messages[0]


def test_nothing_held_out_gives_a_warning_with_a_share_that_holds_out_a_clip(encode, drawn, caplog):
    assert encode(drawn, "eval.held_out=0.001").held_out is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("eval.held_out: 0.001 ")
    share, name = re.search(r"from ([\d.]+), (\S+)", caplog.messages[0]).groups()
    assert names(encode(drawn, f"eval.held_out={share}").held_out) == [name]


def test_everything_held_out_is_an_error(encode, drawn):
    with pytest.raises(UserError, match=r"^data\.path: .*eval\.held_out"):
        encode(drawn, "eval.held_out=0.999")


def test_a_held_out_file_that_breaks_is_among_what_cannot_be_used(encode, drawn, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(drawn, folder)
    held = names(encode(folder, "eval.held_out=0.3").held_out)
    content = bytearray((folder / held[0]).read_bytes())
    middle = len(content) // 3
    content[middle : 2 * middle] = bytes(middle)
    (folder / held[0]).write_bytes(content)
    data = encode(folder, "eval.held_out=0.3")
    assert names(data.held_out) == held[1:]
    assert (data.unusable.num, data.unusable.num_rows) == (1, 7)
    assert list(reasons_of(data)) == [held[0]]

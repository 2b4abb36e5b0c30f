"""From a dataset to encoded samples: what is cached, what misses the cache, what is left out."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cogds.data.digest
import cogds.data.video
import cogds.prepare.desk
import cogds.prepare.encoding
import cogds.prepare.survey
from cogds.config import load_config
from cogds.core.conditioning import to_range
from cogds.data.cache import Cache, Writer
from cogds.data.dataset import read_encoded
from cogds.data.synthetic import draw_clips
from cogds.data.video import read_clip
from cogds.errors import UserError
from cogds.model.load import find_model, load_vae
from cogds.prepare.encoding import prepare
from cogds.prepare.survey import make_buckets
from cogds.runtime.world import World
from tests.data import unruly

ALONE = World(0, 1, 0, 1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "clips"
    draw_clips(folder)
    return folder


@pytest.fixture
def encode(tiny_model, tmp_path):
    """`encode(folder, *overrides)`: the prepared dataset, with a cache of the test's own."""

    def run(folder, *overrides, max_unusable=1.0):
        cfg, _ = load_config(
            None,
            [f"model.path={tiny_model}", f"data.path={folder}", f"data.cache_dir={tmp_path / 'cache'}",
             "data.buckets=[9x64x96, 9x96x64, 1x64x64]", "data.num_workers=0", "train.precision=fp32", *overrides],
        )  # fmt: skip
        model = find_model(cfg.model.path)
        return prepare(cfg, model, make_buckets(cfg, model), ALONE, max_unusable)

    return run


def samples(data):
    return [data.index[row] for row in range(len(data.index))]


def reasons_of(data):
    listed = map(json.loads, data.unusable.file.read_text().splitlines())
    return {one["path"].rpartition("/")[2]: one["reason"] for one in listed}


@pytest.fixture
def count_encodes(monkeypatch):
    """Names of the cache entries written since the fixture was made."""
    written, write = [], Writer.write

    def counting(self, key, tensors):
        written.append(("clips" if "moments" in tensors else "captions", key))
        write(self, key, tensors)

    monkeypatch.setattr(Writer, "write", counting)
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
        video = to_range(pixels, torch.float32).permute(3, 0, 1, 2)[None]
        moments = vae.encode(video).latent_dist.parameters
    assert torch.equal(read["moments"], moments[0])
    assert read["text_states"].shape == (32, 32)


def test_decord_is_needed_only_where_clips_are_decoded(encode, drawn, monkeypatch):
    pytest.importorskip("decord")
    encode(drawn, "data.decoder=decord")
    monkeypatch.setitem(sys.modules, "decord", None)
    assert len(encode(drawn, "data.decoder=decord").index) == 7
    with pytest.raises(UserError, match=r"data\.decoder"):
        encode(drawn, "data.decoder=decord", "data.fps=8")


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


@pytest.mark.parametrize(
    "change",
    ["data.fps=8", "data.buckets=[9x64x80]", "train.precision=bf16", "data.decoder=decord", "data.vae_tiling=on"],
)
def test_what_changes_an_encoding_misses_the_cache(encode, drawn, count_encodes, change):
    first = encode(drawn, "data.buckets=[9x64x96]")
    count_encodes.clear()
    assert encode(drawn, "data.buckets=[9x64x96]", change).fingerprint != first.fingerprint
    assert [kind for kind, _ in count_encodes].count("clips") >= 5


def test_another_version_of_the_code_misses_the_cache(encode, drawn, count_encodes, monkeypatch):
    """How frames are resized and cropped is code: whoever changes it raises the version."""
    encode(drawn)
    count_encodes.clear()
    monkeypatch.setattr(cogds.data.digest, "ENCODING_VERSION", cogds.data.digest.ENCODING_VERSION + 1)
    encode(drawn)
    assert len([kind for kind, _ in count_encodes if kind == "clips"]) == 7


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
    encode, drawn, tiny_model, tmp_path, count_encodes, part, kind
):
    model, bucket = tmp_path / "model", "data.buckets=[1x64x64]"
    shutil.copytree(tiny_model, model)
    first = encode(drawn, bucket, f"model.path={model}")
    before = list(count_encodes)
    count_encodes.clear()
    file = next(model.glob(part))
    content = bytearray(file.read_bytes())
    if file.suffix == ".json":
        content += b"\n"
    else:
        content[-4] ^= 1  # the last bit of a weight
    file.write_bytes(content)
    assert encode(drawn, bucket, f"model.path={model}").fingerprint != first.fingerprint
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
    assert "caption missing" in reasons["clip_1.mp4"]
    assert reasons["image_0.png"] == "too short: a picture, and no bucket has one frame: the shortest has 9"
    assert (len(data.index), data.unusable.num, data.unusable.num_rows) == (5, 3, 8)
    with pytest.raises(UserError, match=r"3 of 8 clips cannot be used .* data\.max_unusable \(0\.3\)"):
        encode(folder, buckets, max_unusable=0.3)


def test_a_file_that_fails_to_decode_is_not_tried_again(encode, drawn, tmp_path, monkeypatch):
    """It probes well; what is found out while encoding is kept, for its copies too, and for later runs."""
    folder = tmp_path / "clips"
    shutil.copytree(drawn, folder)
    for suffix in (".mp4", ".txt"):
        shutil.copy(folder / f"clip_2{suffix}", folder / f"copy{suffix}")
    tried, decode = [], cogds.prepare.encoding.decode

    def failing(task):
        tried.append(task.path)
        if task.path.endswith(("clip_2.mp4", "copy.mp4")):
            raise cogds.data.video.DecodeError("the frame at 0.3 s is damaged")
        return decode(task)

    monkeypatch.setattr(cogds.prepare.encoding, "decode", failing)
    data = encode(folder)
    assert reasons_of(data) == dict.fromkeys(["clip_2.mp4", "copy.mp4"], "damaged: the frame at 0.3 s is damaged")
    assert len(data.index) == 6
    assert len(tried) == 7
    again = encode(folder)
    assert len(tried) == 7
    assert again.index.path == data.index.path
    with pytest.raises(UserError, match="2 of 8 clips cannot be used"):
        encode(folder, max_unusable=0.2)
    monkeypatch.setattr(cogds.prepare.encoding, "decode", lambda _: pytest.fail("all is there"))
    assert encode(folder).fingerprint == data.fingerprint


def test_a_hang_and_a_glutton_cost_one_clip_each(encode, drawn, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cogds.prepare.encoding, "decode", unruly.decode)
        data = encode(drawn, "data.num_workers=2", "data.decode_timeout_s=4", "data.decode_memory_gb=0.6")
    reasons = reasons_of(data)
    assert set(reasons) == {"clip_0.mp4", "clip_1.mp4"}
    assert "took more than 4 s" in reasons["clip_0.mp4"]
    assert "needed more than 0.6 GB of memory" in reasons["clip_1.mp4"]
    assert len(data.index) == 5
    # It may have been the machine: the next run tries them again, and nothing else.
    assert len(encode(drawn).index) == 7


def test_a_file_that_goes_or_changes_meanwhile_is_told_and_not_kept(encode, drawn, tmp_path, monkeypatch):
    folder = tmp_path / "clips"
    shutil.copytree(drawn, folder)

    class Meanwhile(cogds.prepare.encoding.GuardedPool):
        def imap(self, tasks, ahead=0):
            for clip in super().imap(tasks, ahead):
                (folder / "clip_0.mp4").unlink(missing_ok=True)
                shutil.copy(folder / "clip_3.mp4", folder / "clip_1.mp4")
                yield clip

    with monkeypatch.context() as patch:
        patch.setattr(cogds.prepare.encoding, "GuardedPool", Meanwhile)
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
    find = cogds.prepare.desk.Snapshot.find
    monkeypatch.setattr(cogds.prepare.desk.Snapshot, "find", lambda self, keys: np.full_like(find(self, keys), -1))
    with pytest.raises(UserError, match=r"14 encodings are no longer in .*start again"):
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


def test_shares_of_ranks_make_the_whole(drawn, tmp_path, tiny_model):
    """Every entry is some rank's, and none is two ranks'."""
    cfg, _ = load_config(
        None,
        [f"model.path={tiny_model}", f"data.path={drawn}", f"data.cache_dir={tmp_path / 'cache'}",
         "data.buckets=[9x64x96, 9x96x64, 1x64x64]", "data.num_workers=0", "train.precision=fp32"],
    )  # fmt: skip
    model = find_model(cfg.model.path)
    buckets = make_buckets(cfg, model)
    manifest = cogds.prepare.encoding.update_manifest(cfg, ALONE, digests=True)
    desk = cogds.prepare.encoding.Desk(cfg, model, cogds.prepare.encoding.survey(cfg, manifest, buckets))
    shares = [work.clips.column("key").to_pylist() for work in desk.work(2)]
    assert sorted(map(len, shares)) == [3, 4]
    assert len(set(shares[0] + shares[1])) == 7


def test_what_killed_writers_left_is_packed(encode, drawn, tmp_path):
    cache = Cache(tmp_path / "cache")
    encode(drawn)
    writer = Writer(tmp_path / "cache/clips", 1 << 20)
    writer.write("ab" * 16, {"moments": torch.ones(3)})
    writer._close_staging()  # as a kill does: the lock is gone, the folder stays
    assert list(tmp_path.glob("cache/clips/staging*"))
    encode(drawn)
    assert not list(tmp_path.glob("cache/clips/staging*"))
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]
    assert cache.snapshot("clips").place("ab" * 16)


# ------------------------------------------------------------------------------------------- what is evaluated


def names(index):
    return [] if index is None else sorted(index[row].path.rpartition("/")[2] for row in range(len(index)))


ALL = ["clip_0.mp4", "clip_1.mp4", "clip_2.mp4", "clip_3.mp4", "clip_4.mp4", "clip_5.mp4", "image_0.png"]


def test_what_is_held_out_is_not_trained_and_stays_whatever_comes(encode, drawn, tmp_path, capsys):
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
    assert "warning" not in capsys.readouterr().err


def test_all_windows_of_a_file_are_on_one_side(encode, drawn):
    data = encode(drawn, "eval.held_out=0.3", "data.windows=all", "eval.num_clips=100")
    held, trained = set(names(data.held_out)), set(names(data.index))
    assert len(data.held_out) > len(held)
    assert held
    assert not held & trained
    assert held | trained == set(ALL)


def test_on_the_fly_only_what_is_evaluated_is_encoded(encode, drawn, count_encodes):
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


def test_another_data_set_is_evaluated_instead(encode, drawn, real_clips, tmp_path, capsys):
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
    assert "warning: 1 of 2 clips of eval.path cannot be evaluated: 1 x" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^eval.path .*nowhere does not exist"):
        encode(drawn, f"eval.path={tmp_path / 'nowhere'}")
    (other / "man.mp4").unlink()
    with pytest.raises(UserError, match=r"^eval.path: 0 of 1 clip of .*other can be evaluated"):
        encode(drawn, f"eval.path={other}")


def test_clips_that_are_trained_too_are_warned_of(encode, drawn, capsys):
    assert names(encode(drawn, f"eval.path={drawn}").held_out) == ALL
    assert "warning: 7 of the 7 clips that are to be evaluated only are trained too" in capsys.readouterr().err
    encode(drawn, f"eval.path={drawn}", "data.encode=on_the_fly")
    assert "warning: 7 of the 7 clips that are to be evaluated only are trained too" in capsys.readouterr().err


def test_other_parts_of_files_that_are_trained_are_warned_of(encode, drawn, tmp_path, capsys):
    """Another encoding, of the same file."""
    later = {"file_name": str(drawn / "clip_0.mp4"), "text": "later", "start_s": 1.0, "end_s": 2.9}
    (tmp_path / "later.jsonl").write_text(json.dumps(later))
    data = encode(drawn, f"eval.path={tmp_path / 'later.jsonl'}")
    assert not set(data.held_out.keys("clip_key")) & set(data.index.keys("clip_key"))
    assert "warning: 1 of the 1 clips that are to be evaluated only are trained too" in capsys.readouterr().err


def test_nothing_is_evaluated_where_nothing_wants_it(encode, drawn, count_encodes):
    prompt = "sample.prompts=[{prompt: a cat, image: cat.png}]"
    data = encode(drawn, "eval.held_out=0.3", "eval.every=null", "data.encode=on_the_fly", prompt)
    assert (data.held_out, data.trained) == (None, None)
    assert [kind for kind, _ in count_encodes] == ["captions"]  # the empty one
    data = encode(drawn, "eval.held_out=0.3", "eval.every=null", "sample.every=5", "data.encode=on_the_fly", prompt)
    assert data.held_out is not None
    assert [kind for kind, _ in count_encodes].count("clips") > 0


def test_all_clips_are_evaluated_where_all_are_wanted(encode, drawn, monkeypatch):
    monkeypatch.setattr(cogds.prepare.survey, "MAX_CANDIDATES", 1)
    assert names(encode(drawn, "eval.num_clips=100").trained) == ALL
    assert len(encode(drawn, "eval.num_clips=5").trained) == 5


def test_more_held_out_than_asked_is_said(encode, drawn, capsys, monkeypatch):
    encode(drawn, "eval.held_out=0.3")
    assert "eval.held_out" not in capsys.readouterr().err
    monkeypatch.setattr(cogds.prepare.survey, "_held_out", lambda table, *_: np.arange(len(table)) < 3)
    encode(drawn, "eval.held_out=0.1")
    assert "warning: eval.held_out=0.1 holds out 3 of 7 clips, which are not trained" in capsys.readouterr().err


def test_nothing_and_everything_held_out_is_said(encode, drawn, capsys):
    data = encode(drawn, "eval.held_out=0.001")
    assert data.held_out is None
    said = capsys.readouterr().err
    assert "warning: eval.held_out=0.001 holds out none of 7 files to be trained" in said
    share, name = said.partition("raise it (from ")[2].partition(" is held out")[0].split(" on ")
    assert names(encode(drawn, f"eval.held_out={share}").held_out) == [name]
    with pytest.raises(UserError, match=r"0 of 7 clips of .* can be trained \(eval.held_out holds out 7: lower it\)"):
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

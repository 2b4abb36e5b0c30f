"""What is wrong is said in one sentence, with an exit code, before any weight is loaded."""

import json
import shutil
import sys

import pytest

from cogds.metrics.jsonl import step_lines
from tests.conftest import ROOT

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    from cogds.data.video.drawn import draw_clips

    folder = tmp_path_factory.mktemp("errors") / "clips"
    draw_clips(folder)
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Loading any weight fails the test."""
    import cogds.model.load as load

    def refuse(*args, **kwargs):
        pytest.fail(f"weights were loaded before the error was told: {args} {kwargs}")

    for loader in (load.AutoencoderKLCogVideoX, load.T5EncoderModel):
        monkeypatch.setattr(loader, "from_pretrained", refuse)
    monkeypatch.setattr(load, "safe_open", refuse)


@pytest.fixture
def error_of(tiny_model, clips, tmp_path, monkeypatch, capsys, no_weights):  # noqa: ARG001 (its presence is its effect)
    """`error_of(*argv)`: what the main command, of one process without a process group, says before it gives up."""
    from cogds import cli
    from cogds.train import main as train

    monkeypatch.setattr(train, "connect", lambda *_: None)
    monkeypatch.setattr(train, "disconnect", lambda: None)
    monkeypatch.setattr(train.StopRequest, "listen", lambda _: None)  # pytest keeps its signals
    good = [
        f"model.path={tiny_model}", f"data.path={clips}", f"data.cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'run'}", "data.buckets=[9x64x64, 1x64x64]", "data.num_workers=0",
        "train.num_steps=1",
    ]  # fmt: skip

    def error_of(*argv):
        assert cli.run(lambda: cli.call("train", [*good, *argv], starts_ranks=False)) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if "file/s]" not in line and line.strip()]
        assert len(said) == 1
        assert said[0].startswith("error: ")
        return said[0]

    return error_of


def test_without_a_mistake_weights_are_loaded(error_of):
    """So that the tests below cannot pass because nothing ever gets that far."""
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        error_of()


def test_missing_model_folder(error_of, tmp_path):
    said = error_of(f"model.path={tmp_path}/nowhere")
    assert f"there is no folder {tmp_path}/nowhere" in said
    assert "give a diffusers model folder or a hub id" in said


def test_model_folder_without_a_part(error_of, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model/vae")
    said = error_of(f"model.path={tmp_path / 'model'}")
    assert "has no vae/ folder" in said


def test_missing_data_folder(error_of, tmp_path):
    said = error_of(f"data.path={tmp_path}/nowhere")
    assert "error: data.path: " in said
    assert f"{tmp_path}/nowhere" in said


def test_empty_data_folder(error_of, tmp_path):
    (tmp_path / "empty").mkdir()
    said = error_of(f"data.path={tmp_path / 'empty'}")
    assert f"error: data.path: {tmp_path / 'empty'} " in said
    assert all(layout in said for layout in (".txt", "metadata.csv"))  # the layouts it expects


def test_every_caption_missing(error_of, clips, tmp_path):
    (tmp_path / "clips").mkdir()
    for name in ("clip_0.mp4", "clip_1.mp4"):
        shutil.copy(clips / name, tmp_path / "clips")
    said = error_of(f"data.path={tmp_path / 'clips'}")
    assert "error: data.path: none of the 2 clips" in said
    assert "2 x caption missing" in said
    assert "clip_0.mp4: caption missing" in said


def test_every_clip_too_short(error_of):
    said = error_of("data.buckets=[161x64x64]")
    assert "too short: 48 frames at 16 fps, the shortest bucket has 161" in said


def test_bucket_that_the_model_cannot_take(error_of):
    said = error_of("data.buckets=[9x64x64, 10x64x70]")
    assert "bucket 10x64x70 " in said
    assert "9x64x64" in said


def test_bucket_beyond_the_rotary_axis(error_of):
    said = error_of("data.buckets=[9x64x496]")
    assert "bucket 9x64x496 " in said
    assert "480 pixels high and 480 wide" in said


def test_ranks_that_do_not_divide_the_batch(error_of, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    ds = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps({**ds, "train_batch_size": 3}))
    said = error_of("--deepspeed", str(tmp_path / "ds.json"))
    assert "train_batch_size is 3" in said


@pytest.mark.parametrize(
    "text, parts",
    [
        ('{\n  "train_batch_size": "auto",\n}', ["ds.json:3:1: "]),
        ("[]", []),
        ('{"train_batch_sise": 2}', ["train_batch_sise", "did you mean 'train_batch_size'?"]),
        (
            '{"gradient_clipping": 7.0, "zero_optimization": {"stage": 2}}',
            ["gradient_clipping is 7.0", "optimizer.max_grad_norm is 1.0"],
        ),
    ],
)
def test_wrong_deepspeed_file(error_of, tmp_path, text, parts):
    (tmp_path / "ds.json").write_text(text)
    said = error_of("--deepspeed", str(tmp_path / "ds.json"), "optimizer.max_grad_norm=1.0")
    for part in [*parts, str(tmp_path / "ds.json")]:
        assert part in said


@pytest.mark.parametrize(
    "override, parts",
    [
        ("train.nun_steps=5", ["train.nun_steps: ", "train.num_steps?"]),
        ("lr=1e-4", ["lr: ", "optimizer.lr?"]),
        ("train.num_steps=many", ["train.num_steps: ", "many"]),
        ("checkpoint.resume=nowhere", ["nowhere"]),
        ("lora.target_modules=[to_z]", ["lora.target_modules", "'to_z'"]),
    ],
)
def test_wrong_setting(error_of, override, parts):
    said = error_of(override)
    for part in parts:
        assert part in said


def test_decord_where_it_is_not_installed(error_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    for encode in ("cached", "on_the_fly"):
        said = error_of("data.decoder=decord", f"data.encode={encode}")
        assert said.startswith("error: data.decoder: ")
        assert "data.decoder=pyav" in said


# ------------------------------------------------------------------------------------------------- for real


def test_bad_files_among_good_ones_are_listed_and_the_run_goes_on(run_train, tiny_model, clips, tmp_path):
    shutil.copytree(clips, tmp_path / "clips")
    (tmp_path / "clips/clip_0.txt").unlink()
    (tmp_path / "clips/clip_1.mp4").write_bytes(b"no film at all")
    whole = (tmp_path / "clips/clip_2.mp4").read_bytes()
    (tmp_path / "clips/clip_2.mp4").write_bytes(whole[: len(whole) // 2])
    done = run_train(
        f"model.path={tiny_model}", f"data.path={tmp_path / 'clips'}", f"data.cache_dir={tmp_path / 'cache'}",
        "data.buckets=[17x64x64]", f"output_dir={tmp_path / 'run'}", "train.num_steps=1", "data.max_unusable=0.8",
        launcher="python",
    )  # fmt: skip
    listed = [json.loads(line) for line in (tmp_path / "run/unusable.jsonl").read_text().splitlines()]
    reasons = {one["path"].rpartition("/")[2]: one["reason"] for one in listed}
    assert sorted(reasons) == ["clip_0.mp4", "clip_1.mp4", "clip_2.mp4", "clip_4.mp4", "image_0.png"]
    assert reasons["clip_0.mp4"].startswith("caption missing")
    assert "cannot be opened as a video" in reasons["clip_1.mp4"]
    assert "truncated" in reasons["clip_2.mp4"]
    assert reasons["clip_4.mp4"] == "too short: 12 frames at 16 fps, the shortest bucket has 17"
    assert "5 files cannot be trained" in done.stdout
    assert len(step_lines((tmp_path / "run/metrics.jsonl").read_text())) == 1


def said_by(done):
    assert "Traceback" not in done.stdout
    return [line for line in done.stdout.splitlines() if line.startswith("error")]


def test_python_ends_with_code_2_and_one_line(run_train, tmp_path):
    (tmp_path / "ds.json").write_text("{stage: 2}")
    done = run_train("--deepspeed", tmp_path / "ds.json", launcher="python", check=False)
    assert done.returncode == 2
    (said,) = said_by(done)
    assert f"{tmp_path / 'ds.json'}:1:2: " in said


def test_two_ranks_say_it_once_and_fail(run_train, tiny_model, tmp_path):
    """An error of the data, which only rank 0 reads while the other waits for it."""
    (tmp_path / "empty").mkdir()
    done = run_train(
        "--deepspeed", "ds_configs/zero2.json", f"model.path={tiny_model}", f"data.path={tmp_path / 'empty'}",
        f"data.cache_dir={tmp_path / 'cache'}", "data.buckets=[9x64x64]", f"output_dir={tmp_path / 'run'}",
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert len(said_by(done)) == 1
    assert done.stdout.count("holds no clips") == 1  # wherever in a line: ranks write over each other
    assert not list(tmp_path.glob("cache/**/*.safetensors"))

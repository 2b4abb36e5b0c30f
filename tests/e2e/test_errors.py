"""Errors in the input are printed in one line with exit code 2, before any weight is loaded."""

import json
import shutil
import sys

import pytest
from PIL import Image

from cogds.metrics.jsonl import step_lines
from tests.conftest import ROOT, with_config

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    from tests.drawn import draw_clips

    folder = tmp_path_factory.mktemp("errors") / "clips"
    draw_clips(folder)
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Loading any weight fails the test."""
    import cogds.model.load as load

    def refuse(*args, **kwargs):
        pytest.fail(f"weights were loaded before the error was reported: {args} {kwargs}")

    for loader in (load.AutoencoderKLCogVideoX, load.T5EncoderModel):
        monkeypatch.setattr(loader, "from_pretrained", refuse)
    monkeypatch.setattr(load, "safe_open", refuse)


@pytest.fixture
def error_of(tiny_model, clips, tmp_path, monkeypatch, capsys, no_weights):  # noqa: ARG001 (used for its effect)
    """`error_of(*argv)`: the error that the train verb prints, in one process without a process group."""
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
        assert cli.run(lambda: cli.call("train", with_config([*good, *argv]), starts_ranks=False)) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "file/s]" not in line and line.strip()]
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        return lines[0]

    return error_of


def test_without_an_error_weights_are_loaded(error_of):
    """Checks that `no_weights` works, without which the tests below would prove nothing."""
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        error_of()


def test_missing_model_folder(error_of, tmp_path):
    error = error_of(f"model.path={tmp_path}/nowhere")
    assert "model.path" in error
    assert f"{tmp_path}/nowhere" in error


def test_model_folder_without_a_part(error_of, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model/vae")
    error = error_of(f"model.path={tmp_path / 'model'}")
    assert f"{tmp_path / 'model'}" in error
    assert "vae" in error


def test_missing_data_folder(error_of, tmp_path):
    error = error_of(f"data.path={tmp_path}/nowhere")
    assert "error: data.path: " in error
    assert f"{tmp_path}/nowhere" in error


def test_missing_inputs_are_found_before_the_model(error_of, tmp_path, monkeypatch):
    monkeypatch.setattr("cogds.job.find_model", lambda *_: pytest.fail("the model was looked for first"))
    prompt = "sample.prompts=[{prompt: a cat, image: /nowhere/cat.png}]"
    for key, words in (
        ("data.path", ["data.path=/nowhere"]),
        ("data.root", ["data.root=/nowhere"]),
        ("data.sets[1].path", [f"data.sets=[{{path: {tmp_path}}}, {{path: /nowhere}}]", "data.path="]),
        ("eval.path", ["eval.path=/nowhere"]),
        ("sample.prompts[0].image", ["sample.every=1", prompt]),
        ("sample.prompts[0].image", ["sample.every=1", prompt, "--dry-run"]),
    ):
        error = error_of(*words)
        assert error.startswith(f"error: {key}: ")
        assert "/nowhere" in error


def test_a_prompt_that_cannot_be_used(error_of, tmp_path):
    (tmp_path / "cat.png").write_text("not an image")
    Image.new("RGB", (64, 64)).save(tmp_path / "dog.png")
    for image, key in (("cat.png", "sample.prompts[0].image"), ("dog.png, size: 10x64x64", "sample.prompts[0].size")):
        words = [f"sample.prompts=[{{prompt: a cat, image: {tmp_path}/{image}}}]", "sample.every=5"]
        for flags in ([], ["--dry-run"]):
            assert error_of(*words, *flags).startswith(f"error: {key}: ")


def test_empty_data_folder(error_of, tmp_path):
    (tmp_path / "empty").mkdir()
    error = error_of(f"data.path={tmp_path / 'empty'}")
    assert f"error: data.path: {tmp_path / 'empty'} " in error
    assert all(layout in error for layout in (".txt", "metadata.csv"))  # the layouts it expects


def test_every_caption_missing(error_of, clips, tmp_path):
    (tmp_path / "clips").mkdir()
    for name in ("clip_0.mp4", "clip_1.mp4"):
        shutil.copy(clips / name, tmp_path / "clips")
    error = error_of(f"data.path={tmp_path / 'clips'}")
    assert error.startswith("error: data.path: ")
    assert "2 x caption missing" in error
    assert "clip_0.mp4" in error


def test_every_clip_too_short(error_of):
    error = error_of("data.buckets=[161x64x64]")
    assert all(text in error for text in ("too short", "48 frames", "161"))


def test_bucket_that_the_model_does_not_support(error_of):
    error = error_of("data.buckets=[9x64x64, 10x64x70]")
    assert "10x64x70" in error
    assert "9x64x64" in error


def test_bucket_beyond_the_rotary_axis(error_of):
    error = error_of("data.buckets=[9x64x496]")
    assert "9x64x496" in error
    assert "480" in error


def test_ranks_that_do_not_divide_the_batch(error_of, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    ds = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps({**ds, "train_batch_size": 3}))
    error = error_of("--deepspeed", str(tmp_path / "ds.json"))
    assert "train_batch_size is 3" in error


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
    error = error_of("--deepspeed", str(tmp_path / "ds.json"), "optimizer.max_grad_norm=1.0")
    for part in [*parts, str(tmp_path / "ds.json")]:
        assert part in error


@pytest.mark.parametrize(
    "override, parts",
    [
        ("train.nun_steps=5", ["train.nun_steps: ", "train.num_steps"]),
        ("lr=1e-4", ["lr: ", "optimizer.lr"]),
        ("train.num_steps=many", ["train.num_steps: ", "many"]),
        ("checkpoint.resume=nowhere", ["nowhere"]),
        ("lora.target_modules=[to_z]", ["lora.target_modules", "'to_z'"]),
    ],
)
def test_wrong_setting(error_of, override, parts):
    error = error_of(override)
    for part in parts:
        assert part in error


def test_decord_that_is_not_installed(error_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    for encode in ("cached", "on_the_fly"):
        error = error_of("data.decoder=decord", f"data.encode={encode}")
        assert error.startswith("error: data.decoder: ")
        assert "data.decoder=pyav" in error


# ------------------------------------------------------------------------------------------------- real runs


@pytest.mark.slow
def test_bad_files_are_listed_and_the_others_are_trained(run_train, tiny_model, clips, tmp_path):
    shutil.copytree(clips, tmp_path / "clips")
    (tmp_path / "clips/clip_0.txt").unlink()
    (tmp_path / "clips/clip_1.mp4").write_bytes(b"not a video")
    whole = (tmp_path / "clips/clip_2.mp4").read_bytes()
    (tmp_path / "clips/clip_2.mp4").write_bytes(whole[: len(whole) // 2])
    done = run_train(
        f"model.path={tiny_model}", f"data.path={tmp_path / 'clips'}", f"data.cache_dir={tmp_path / 'cache'}",
        "data.buckets=[17x64x64]", f"output_dir={tmp_path / 'run'}", "train.num_steps=1", "data.max_unusable=0.8",
        launcher="python",
    )  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "run/unusable.jsonl").read_text().splitlines()]
    reasons = {record["path"].rpartition("/")[2]: record["reason"] for record in records}
    assert sorted(reasons) == ["clip_0.mp4", "clip_1.mp4", "clip_2.mp4", "clip_4.mp4", "image_0.png"]
    assert reasons["clip_0.mp4"].startswith("caption missing")
    assert "cannot be opened: Invalid data" in reasons["clip_1.mp4"]
    assert "truncated" in reasons["clip_2.mp4"]
    assert all(text in reasons["clip_4.mp4"] for text in ("too short", "12 frames", "17"))
    assert "5 files, listed in " in done.stdout
    assert len(step_lines((tmp_path / "run/metrics.jsonl").read_text())) == 1


def errors_of(done):
    assert "Traceback" not in done.stdout
    return [line for line in done.stdout.splitlines() if line.startswith("error")]


@pytest.mark.slow
def test_a_single_process_ends_with_code_2_and_one_line(run_train, tmp_path):
    (tmp_path / "ds.json").write_text("{stage: 2}")
    done = run_train("--deepspeed", tmp_path / "ds.json", launcher="python", check=False)
    assert done.returncode == 2
    (error,) = errors_of(done)
    assert f"{tmp_path / 'ds.json'}:1:2: " in error


@pytest.mark.slow
def test_two_ranks_report_an_error_once(run_train, tiny_model, tmp_path):
    """An error in the data, which only rank 0 reads while the other rank waits."""
    (tmp_path / "empty").mkdir()
    done = run_train(
        "--deepspeed", "ds_configs/zero2.json", f"model.path={tiny_model}", f"data.path={tmp_path / 'empty'}",
        f"data.cache_dir={tmp_path / 'cache'}", "data.buckets=[9x64x64]", f"output_dir={tmp_path / 'run'}",
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert len(errors_of(done)) == 1
    assert done.stdout.count("error: data.path: ") == 1  # anywhere in a line: the output of ranks may be mixed
    assert not list(tmp_path.glob("cache/**/*.safetensors"))

"""Videos during training, in one process: what is made, what stays unchanged, and how failures are handled.

tests/dist/test_samples.py covers several ranks, ZeRO and the whole command.
"""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import cogds.sample
import cogds.train.samples
from cogds.cli import call
from cogds.config.loading import load_config, replace
from cogds.core.condition_modes import ConditionSettings
from cogds.core.geometry import ClipShape
from cogds.data.cache.store import Cache
from cogds.data.video.media import probe_video
from cogds.distributed.world import World
from cogds.encode.cache_keys import CacheKeys
from cogds.errors import UserError
from cogds.job import open_cache
from cogds.model.load import TextEncoder, find_model, load_transformer
from cogds.model.lora.adapter import export, inject
from cogds.train.callbacks import TrainContext
from cogds.train.samples import compare_videos, evenly_spaced_rows, make_sample_callback
from cogds.train.step import load_step_builder
from cogds.videos.sample_folder import Prompt, read_videos

BUCKETS = (ClipShape(9, 32, 48), ClipShape(9, 32, 32), ClipShape(1, 32, 32))


class Recorder:
    """A monitor that records its calls."""

    def __init__(self):
        self.scalars, self.images, self.videos, self.texts = [], {}, {}, {}
        self.fps = 0.0

    def add_scalars(self, step, scalars):
        self.scalars.append((step, *scalars))

    def add_text(self, name, text):
        self.texts[name] = text

    def add_image(self, step, name, pixels):
        self.images[step, name] = pixels

    def add_video(self, step, name, frames, fps):
        self.videos[step, name], self.fps = frames, fps


@pytest.fixture(scope="module")
def parts(tiny_model, tmp_path_factory):
    """A model with a random LoRA, and a cache with the states of its prompts."""
    folder, model = tmp_path_factory.mktemp("samples"), find_model(str(tiny_model))
    Image.linear_gradient("L").convert("RGB").resize((100, 60)).save(folder / "first.png")
    transformer = load_transformer(model, torch.float32)
    inject(transformer, 4, 8, 0.5, ["to_q", "to_v"], seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    cfg, _ = load_config(None, [
        f"model.path={tiny_model}", "data.path=unused", f"data.cache_dir={folder / 'cache'}", "train.precision=fp32",
        "data.fps=8", "sample.every=2", "sample.num_steps=2",
        f"sample.prompts=[{{prompt: a red circle, image: {folder / 'first.png'}}}, "
        f"{{prompt: a blue star, image: {folder / 'first.png'}, size: 9x32x32, seed: 4}}]",
    ])  # fmt: skip
    encoder, keys = TextEncoder(model, torch.float32, "cpu"), CacheKeys(cfg, model)
    with Cache(cfg.data.cache_dir).writer("captions") as writer:
        for text in ("a red circle", "a blue star"):
            writer.write(keys.caption(text).hex(), {"text_states": encoder.encode(text)})
    empty = encoder.encode("")
    builder = load_step_builder(model, cfg.conditioning, empty, torch.float32, torch.device("cpu"))
    engine = SimpleNamespace(
        module=transformer, torch_autocast_dtype=lambda: torch.bfloat16, torch_autocast_enabled=lambda: False
    )
    return SimpleNamespace(cfg=cfg, model=model, engine=engine, builder=builder, empty=empty, folder=folder)


@pytest.fixture
def make_callback(parts, tmp_path):
    """`make_callback(**changes)`: the callback of a run, its monitor and its folder."""

    def make(first_step=0, is_stopping=lambda: False, output=None, stage=2, buckets=BUCKETS, **changes):
        cfg = replace(parts.cfg, {"output_dir": str(output or tmp_path / "run"), **changes})
        index = SimpleNamespace(sizes=((0, 0), (1, 0), (0, 2)))
        data = SimpleNamespace(empty_caption_states=parts.empty, index=index)
        run = SimpleNamespace(
            cfg=cfg, model=parts.model, buckets=buckets, world=World(0, 1, 0, 1), data=data, first_step=first_step,
            ds_config={"zero_optimization": {"stage": stage}}, job=SimpleNamespace(cache=open_cache(cfg)),
        )  # fmt: skip
        monitor = Recorder()
        callback = make_sample_callback(
            TrainContext(run, parts.engine, parts.builder, monitor, is_stopping=is_stopping)
        )
        return callback, monitor, Path(cfg.output_dir) / "samples"

    return make


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("**/*") if path.is_file())


def test_base_videos_are_made_once_and_others_at_every_step(make_callback):
    callback, monitor, folder = make_callback()
    assert callback.every == 2
    callback.run(0)
    callback.run(2)
    names = [Path(name).name for name in files(folder / "base")]
    assert [name[:-13] for name in names] == ["a-blue-star", "a-red-circle"]
    videos = [f"{place}/{name}" for place in ("base", "step-000000", "step-000002") for name in names]
    first_frames = [f"first_frames/{name[:-4]}.png" for name in names]
    assert files(folder) == sorted([*videos, *first_frames, "prompts.json"])
    assert [prompt.prompt for prompt in read_videos(folder)] == [
        Prompt("a red circle", "9x32x48", 0), Prompt("a blue star", "9x32x32", 4),
    ]  # fmt: skip
    for name in names:
        base, first, later = ((folder / place / name).read_bytes() for place in ("base", "step-000000", "step-000002"))
        assert base == first  # at step 0 the LoRA is assumed to be zero
        assert base != later
        assert later.index(b"moov") < later.index(b"mdat")  # it plays while it loads
    info = probe_video(folder / "step-000002" / names[1])
    assert (info.num_frames, info.height, info.width, info.fps) == (9, 32, 48, 8)
    red = f"samples/{names[1][:-4]}"
    # A column of four frames of each video, below a label.
    assert monitor.images[2, red].shape == (18 + 4 * 32 + 3 * 4, 2 * 48 + 4, 3)
    assert monitor.images[0, red].shape[1] == 48
    assert monitor.videos[2, red + "/clip"].shape == (9, 2 * (32 + 18) + 4, 48, 3)
    assert monitor.fps == 8
    assert monitor.scalars == [(0, "sample/seconds"), (2, "sample/seconds")]
    assert f"{names[1][:-4]}: a red circle" in monitor.texts["samples"]


def test_weights_modes_and_random_states_are_not_changed(make_callback, parts):
    transformer, vae = parts.engine.module.train(), parts.builder.vae
    transformer.set_checkpointing("full")
    vae.enable_tiling()
    callback, *_ = make_callback()
    before = {name: (weight.clone(), weight.requires_grad) for name, weight in transformer.named_parameters()}
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    callback.run(2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in transformer.modules())
    assert {block.checkpointing for block in transformer.transformer_blocks} == {"full"}
    assert vae.use_tiling
    vae.disable_tiling()
    assert callback._pipeline.transformer is transformer  # not that of the last video
    for name, weight in transformer.named_parameters():
        assert torch.equal(weight, before[name][0])
        assert (weight.requires_grad, weight.grad) == (before[name][1], None)
    assert not any(getattr(module, "disable_adapters", False) is True for module in transformer.modules())


def test_the_lora_is_disabled_only_if_base_videos_are_missing(make_callback, parts, monkeypatch):
    """The thread of the last checkpoint may still be reading it."""
    callback, *_ = make_callback()
    callback.run(0)
    monkeypatch.setattr(parts.engine.module, "disable_adapters", fail(AssertionError("no video is missing")))
    callback.run(2)


def test_a_resumed_run_makes_no_video_twice(make_callback, monkeypatch):
    callback, _, folder = make_callback()
    callback.run(0)
    callback.run(2)
    before = {path: (folder / path).stat().st_mtime_ns for path in files(folder)}
    monkeypatch.setattr(cogds.train.samples, "sample_latents", fail(AssertionError("the videos exist")))
    callback, monitor, _ = make_callback(first_step=2)
    callback.run(2)
    assert monitor.scalars == []
    assert {path: (folder / path).stat().st_mtime_ns for path in files(folder)} == before
    monkeypatch.undo()
    callback.run(4)
    assert len(files(folder / "step-000004")) == 2
    assert {path: (folder / path).stat().st_mtime_ns for path in before} == before


def test_a_broken_prompt_is_named_and_left_out(make_callback, parts, capsys):
    prompts = [
        {"prompt": "a red circle", "image": "/nowhere/first.png"},
        {"prompt": "a blue star", "image": str(parts.folder / "first.png"), "size": "10x32x32"},
        {"prompt": "never encoded", "image": str(parts.folder / "first.png")},
    ]
    callback, _, _ = make_callback(**{"sample.prompts": prompts})
    warnings = capsys.readouterr().err.splitlines()
    assert callback is None
    for number, words in enumerate((("a red circle", "/nowhere/first.png"), ("10x32x32",), ("never encoded",))):
        assert warnings[number].startswith(f"warning: sample.prompts[{number}]: ")
        assert all(word in warnings[number] for word in words)
    assert warnings[-1].startswith("warning: sample.every: ")
    callback, _, folder = make_callback(**{"sample.prompts": [*prompts, {**prompts[1], "size": "9x32x32"}]})
    callback.run(2)
    assert len(files(folder / "step-000002")) == 1


def test_any_other_error_loses_only_its_prompt(make_callback, monkeypatch, capsys):
    fail_once(monkeypatch, "load_conditions", ValueError("planted"))
    callback, _, folder = make_callback()
    stderr = capsys.readouterr().err
    assert "sample.prompts[0]: 'a red circle'" in stderr
    assert "ValueError: planted" in stderr
    assert "Traceback" in stderr
    callback.run(2)
    assert [name[:11] for name in files(folder / "step-000002")] == ["a-blue-star"]


def test_a_clip_that_fails_is_left_out(parts, monkeypatch, capsys):
    class Index(list):
        buckets, sizes = BUCKETS[1:2], ((2,),)

        def row(self, _bucket, clip):
            return clip

    index = Index(
        SimpleNamespace(path=f"{name}.mp4", captions=[SimpleNamespace(text=name), None], shape=BUCKETS[1])
        for name in ("broken", "sound")
    )
    encoded = {"first_frame": torch.zeros(3, 32, 32, dtype=torch.uint8), "text_states": parts.empty}
    monkeypatch.setattr(
        cogds.train.samples, "read_encoded", lambda _, clip: {} if clip.path == "broken.mp4" else encoded
    )
    cfg = replace(parts.cfg, {"sample.prompts": []})
    job = SimpleNamespace(cache=open_cache(cfg), condition_settings=ConditionSettings(), condition_frames=lambda _: ())
    data = SimpleNamespace(held_out=index)
    run = SimpleNamespace(cfg=cfg, model=parts.model, data=data, job=job)
    assert [spec.prompt for spec in cogds.train.samples._find_specs(run, None).values()] == ["sound"]
    stderr = capsys.readouterr().err
    assert stderr.startswith("warning: broken.mp4: ")
    assert "KeyError: 'text_states'" in stderr
    assert "in _specs_of_clips\n" in stderr  # a bug keeps its traceback


@pytest.mark.parametrize("stage, is_warned", [(2, False), (3, True)])
def test_a_video_larger_than_all_buckets_causes_a_warning_if_it_could_end_the_run(
    make_callback, capsys, stage, is_warned
):
    make_callback(stage=stage)  # 9x32x48 and 9x32x32; only the latter has clips
    text = capsys.readouterr().err
    assert ("9x32x48" in text) == ("44 tokens" in text) == ("40." in text) == is_warned
    assert "9x32x32" not in text


def test_the_first_frame_is_scaled_as_in_training_and_as_in_the_sample_verb(
    make_callback, parts, tmp_path, monkeypatch
):
    last, image, module = {}, str(parts.folder / "first.png"), parts.engine.module
    write_video = cogds.train.samples.write_video
    monkeypatch.setattr(
        cogds.train.samples, "write_video", lambda *args: last.update(callback=args[1]) or write_video(*args)
    )
    monkeypatch.setattr(cogds.sample, "write_video", lambda *args: last.update(verb=args[1].numpy()))
    weights = {name: weight.detach() for name, weight in module.named_parameters() if weight.requires_grad}
    videos = []
    for convention in ("pipeline", "scaled"):
        prompts = [{"prompt": "a red circle", "image": image, "size": "9x32x32"}]
        changes = {"sample.prompts": prompts, "conditioning.image_latents": convention}
        callback, *_ = make_callback(output=tmp_path / convention, **changes)
        callback.run(2)
        export(tmp_path / "lora", module, weights, {"image_latents": convention})
        call("sample", ["--model", str(parts.model.path), "--lora", str(tmp_path / "lora"), "--prompt", "a red circle",
             "--image", image, "--size", "9x32x32", "--steps", "2", "--output", str(tmp_path / "fresh.mp4")]
        )  # fmt: skip
        videos.append(last["callback"].astype(int))
        # Before compression. In float32, rounding makes a difference of at most one level of 255.
        assert abs(videos[-1] - last["verb"]).max() <= 1
    assert abs(videos[0] - videos[1]).max() > 10


def test_without_sample_every_there_is_no_callback(make_callback):
    assert make_callback(**{"sample.every": None})[0] is None


def fail(error):
    """Return a function that raises an error."""

    def failing(*_args, **_options):
        raise error

    return failing


def fail_once(monkeypatch, name, error):
    """Let the first call of a function of cogds.train.samples raise an error."""
    function, errors = getattr(cogds.train.samples, name), [error]
    monkeypatch.setattr(cogds.train.samples, name, lambda *args: fail(errors.pop())() if errors else function(*args))


@pytest.mark.parametrize(
    "function, error",
    [
        ("sample_latents", torch.OutOfMemoryError("CUDA out of memory")),
        ("decode_frames", RuntimeError("the VAE cannot")),
        ("write_video", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_failure_loses_only_its_video(make_callback, monkeypatch, capsys, function, error):
    fail_once(monkeypatch, function, error)
    callback, _, folder = make_callback()
    callback.run(0)
    text = capsys.readouterr().err
    assert "warning: base model: no video of 'a red circle': " in text
    assert (getattr(error, "strerror", None) or str(error)) in text
    assert [name[:11] for name in files(folder / "step-000000")] == ["a-blue-star"]
    callback.run(2)  # and the missing video of the base model
    assert len(files(folder / "step-000002")) == len(files(folder / "base")) == 2


@pytest.mark.parametrize(
    "error, raised, named",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), UserError, "^sample.prompts: "),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer"), RuntimeError, "closed by peer"),
        (dist.DistBackendError("NCCL error: remote process exited"), dist.DistBackendError, "remote process"),
        (ZeroDivisionError("a bug"), ZeroDivisionError, "a bug"),
    ],
)
def test_inside_the_transformer_only_running_out_of_memory_is_a_user_error(
    make_callback, parts, monkeypatch, error, raised, named
):
    """After a lost connection, the same command resumes the run, so its exit code must not be that of a user error."""
    callback, *_ = make_callback(stage=3)
    monkeypatch.setattr(parts.engine.module, "forward", fail(error))
    with pytest.raises(raised, match=named):
        callback.run(2)


def test_a_lost_connection_between_calls_ends_the_run(make_callback, monkeypatch):
    callback, *_ = make_callback()
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer")
    monkeypatch.setattr(cogds.train.samples, "sample_latents", fail(lost))
    with pytest.raises(RuntimeError, match="closed by peer"):
        callback.run(2)


def test_no_timestep_is_negative(make_callback, parts, capsys, monkeypatch):
    """With 61 steps, diffusers rounds so that the last of its own timesteps is -1."""
    timesteps, module = [], parts.engine.module
    forward = module.forward
    monkeypatch.setattr(
        module, "forward", lambda **inputs: timesteps.append(int(inputs["timestep"][0])) or forward(**inputs)
    )
    prompt = {"prompt": "a blue star", "image": str(parts.folder / "first.png"), "size": "1x16x16"}
    callback, _, folder = make_callback(**{"sample.num_steps": 61, "sample.prompts": [prompt]})
    assert "61 forward passes" in capsys.readouterr().out
    callback.run(0)
    assert len(timesteps) == 61
    assert timesteps == sorted(timesteps, reverse=True)
    assert timesteps[0] == 999
    assert timesteps[-1] >= 0
    assert len(files(folder / "step-000000")) == 1


def test_more_steps_than_timesteps_are_refused_at_the_start(make_callback):
    with pytest.raises(UserError, match=r"sample\.num_steps .* 1001 .* 1000 "):
        make_callback(**{"sample.num_steps": 1001})


def test_leftovers_of_a_killed_process_are_removed(make_callback):
    callback, _, folder = make_callback()
    (folder / "base").mkdir()
    (folder / "base/a-red-circle.1a2b3c4d.tmp.mp4").write_bytes(b"half a vid")
    (folder / "step-000002.1a2b3c4d.tmp").mkdir()
    callback.run(2)
    assert not list(folder.glob("**/*.tmp*"))


def test_a_full_disk_loses_only_the_files(make_callback, monkeypatch, capsys):
    callback, monitor, folder = make_callback()
    write = Path.write_bytes

    def full(path, data):
        if folder in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    callback.run(2)
    text = capsys.readouterr().err
    assert "step-000002: " in text
    assert "No space left on device" in text
    assert files(folder) == []
    assert len(monitor.images) == 2  # with the base model's beside it
    monkeypatch.undo()
    callback.run(4)
    assert len(files(folder)) == 4 + 3


def test_a_folder_that_cannot_be_written_causes_a_warning_at_the_start(make_callback, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/samples").write_text("a file")
    callback, monitor, _ = make_callback()
    assert f"warning: {tmp_path / 'run/samples'}: " in capsys.readouterr().err
    callback.run(2)
    assert "step-000002: " in capsys.readouterr().err
    assert len(monitor.images) == 2
    os.remove(tmp_path / "run/samples")
    callback.run(4)
    assert len(files(tmp_path / "run/samples/step-000004")) == 2


def test_a_run_that_is_asked_to_stop_makes_no_videos(make_callback):
    callback, monitor, folder = make_callback(is_stopping=lambda: True)
    callback.run(2)
    assert files(folder) == []
    assert monitor.scalars == []


def test_clips_are_spread_over_the_video_buckets():
    index = SimpleNamespace(
        buckets=BUCKETS, sizes=((3, 1), (6,), (50,)), row=lambda bucket, clip: (0, 4, 10)[bucket] + clip
    )
    assert evenly_spaced_rows(index, 1) == [5]
    assert evenly_spaced_rows(index, 5) == [1, 3, 5, 7, 9]
    assert evenly_spaced_rows(index, 99) == list(range(10))
    still = SimpleNamespace(buckets=BUCKETS[2:], sizes=((4,),), row=lambda _bucket, clip: clip)
    assert evenly_spaced_rows(still, 2) == [1, 3]


def test_videos_are_compared_side_by_side_and_landscapes_one_above_the_other():
    base, now = (np.full((9, 96, 64, 3), gray, np.uint8) for gray in (100, 200))
    frames, played = compare_videos({"base": base, "step 5": now})
    assert frames.shape == (18 + 4 * 96 + 3 * 4, 2 * 64 + 4, 3)
    assert (frames[18 : 18 + 96, :64] == 100).all()
    assert (frames[-96:, -64:] == 200).all()
    assert played.shape == (9, 96 + 18, 2 * 64 + 4, 3)
    wide = {name: np.zeros((5, 450, 800, 3), np.uint8) for name in ("base", "step 5")}
    # At least as wide as TensorBoard's cards, which have 350 pixels.
    assert compare_videos(wide)[1].shape == (5, 2 * (224 + 18) + 4, 400, 3)

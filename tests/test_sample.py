"""Sampling follows how the LoRA was trained: image latent scale, size and frame rate."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cogds.sample
from cogds.arguments import parse_args
from cogds.cli import call
from cogds.core.condition_modes import MODES
from cogds.core.geometry import TRAINED_SIZE, ClipShape, latent_frames, padding_frames
from cogds.data.video.media import write_video
from cogds.errors import UserError
from cogds.model.load import TextEncoder, find_model, load_transformer, load_vae
from cogds.model.lora.adapter import export, inject
from cogds.model.lora.file import AlphaSource, LoraFile
from cogds.model.pipelines import apply_convention, count_transformer_calls, load_pipeline, load_whole_pipeline
from cogds.sample import WeightedLora, plan_jobs, recorded_value
from cogds.train.summary import example_flags
from cogds.videos.conditions import modes_of
from cogds.videos.sample_spec import best_bucket, load_first_frame
from tests.model.lora.adapters import write_lora
from tests.train.test_parity import Parts, differences, our_inputs, pipeline_inputs


@pytest.fixture(scope="module")
def model(tiny_model):
    return find_model(str(tiny_model))


@pytest.fixture
def pipeline(model):
    from diffusers import CogVideoXImageToVideoPipeline

    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(model.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("convention, factor", [("pipeline", 1.0), ("scaled", 0.49), ("unscaled", 0.7)])
def test_the_pipeline_feeds_the_transformer_as_training_did(model, pipeline, convention, factor):
    """All inputs of the transformer at the first step, for a LoRA of each convention."""
    encoder, vae = TextEncoder(model, torch.float32, "cpu"), load_vae(model, torch.float32, "cpu")
    shape = ClipShape.parse("17x64x96")
    assert apply_convention(pipeline, convention) == pytest.approx(factor)
    parts = Parts(model, pipeline, encoder, vae)
    theirs = pipeline_inputs(parts, shape)
    ours, _ = our_inputs(parts, shape, image_latents=convention)
    # 0.7 x latents and 0.49 x (latents / 0.7) differ in the last bits.
    assert differences(ours, theirs) == ([] if convention == "pipeline" else ["hidden_states"])
    channels = vae.config.latent_channels
    torch.testing.assert_close(
        ours["hidden_states"][:, :, channels:], theirs["hidden_states"][:, :, channels:], atol=0, rtol=1e-6
    )


@pytest.fixture
def sample(model, tmp_path, monkeypatch):
    """`sample(convention, *argv)`: the path, frames and frame rate that `cogds sample` writes for such a LoRA."""
    transformer = load_transformer(model, torch.float32)
    inject(transformer, 4, 8, 0.0, ["to_q", "to_v"], seed=0)
    tensors = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        for name, tensor in transformer.named_parameters()
        if tensor.requires_grad
    }
    Image.linear_gradient("L").convert("RGB").resize((100, 60)).save(tmp_path / "first.png")
    written = []
    monkeypatch.setattr(cogds.sample, "write_video", lambda *args: written.append(args))

    def sample(convention, *argv, weight=()):
        metadata = {"image_latents": convention, "buckets": ["1x32x48", "9x32x32", "9x32x48"], "fps": 8.0}
        export(tmp_path / convention, transformer, tensors, metadata)
        call("sample",
            ["--model", str(model.path), "--lora", str(tmp_path / convention), *weight,
             "--image", str(tmp_path / "first.png"), "--prompt", "a red circle", "--steps", "1", *argv]
        )  # fmt: skip
        return written[-1]

    sample.written, sample.folder = written, tmp_path
    return sample


def test_a_video_equals_that_of_the_plain_pipeline(sample, pipeline, model):
    """Bit for bit, including T5."""
    _, frames, _ = sample("pipeline", "--seed", "5", "--steps", "2")
    shape = ClipShape(9, 32, 48)
    _, pixels = load_first_frame(str(sample.folder / "first.png"), str(shape), [], model.geometry)
    pipeline.load_lora_weights(sample.folder / "pipeline")
    latents = pipeline(
        image=Image.fromarray(pixels), prompt="a red circle", num_frames=9, height=32, width=48, num_inference_steps=2,
        guidance_scale=6.0, max_sequence_length=model.geometry.text_tokens, generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).frames  # fmt: skip
    pipeline.vae.enable_tiling()
    padding = padding_frames(latent_frames(9, model.geometry), model.geometry.patch_size_t)
    video = pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents[:, padding:]), output_type="pt")
    expected = (video[0][-9:].clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(frames, expected)


def test_seeds_and_scales_make_a_grid(sample):
    sample("pipeline", "--seed", "1", "2", "--lora-scale", "0", "0.5", "1", "--output", str(sample.folder / "made.mp4"))
    names = [Path(path).relative_to(sample.folder / "made").as_posix() for path, _, _ in sample.written]
    assert names == [
        *(f"01-a-red-circle-seed{seed}-scale{scale}.mp4" for seed in (1, 2) for scale in ("0", "0.5", "1")),
        "01-a-red-circle-grid.mp4",
    ]
    *videos, grid = (torch.as_tensor(frames) for _, frames, _ in sample.written)
    assert grid.shape[0] == 9
    assert grid.shape[1] > 2 * 32
    assert grid.shape[2] > 3 * 48
    assert len({frames.numpy().tobytes() for frames in videos}) == 6
    assert (sample.folder / "made/01-a-red-circle-grid.png").stat().st_size > 0
    # The same video made alone is identical.
    _, alone, _ = sample("pipeline", "--seed", "2", "--lora-scale", "0.5")
    assert torch.equal(alone, videos[4])


def test_several_loras_add_up(sample, capsys):
    _, whole, _ = sample("pipeline")
    lora = str(sample.folder / "pipeline")
    _, halves, _ = sample("pipeline", "--lora", lora, "0.75", weight=["0.25"])
    # W x + s B A x, summed once or twice
    assert (whole.int() - halves.int()).abs().max() <= 1
    _, weaker, _ = sample("pipeline", weight=["0.25"])
    assert (whole.int() - weaker.int()).abs().max() > 1
    capsys.readouterr()
    sample("scaled", "--lora", lora)
    output = capsys.readouterr()
    assert output.err.startswith("warning: ")
    assert "image_latents scaled" in output.err
    assert "(scaled)" in output.out


def test_a_lora_without_a_recorded_convention_counts_as_pipeline(capsys):
    scaled, silent, own = (
        WeightedLora(LoraFile(Path(name), {}, AlphaSource.FILE, metadata), 1.0)
        for name, metadata in (
            ("scaled", {"image_latents": "scaled", "fps": 8.0}), ("silent", {}), ("own", {"image_latents": "pipeline"})
        )
    )  # fmt: skip
    for loras, expected, warned in (
        ([scaled, silent], "scaled", True), ([silent, scaled], "pipeline", True), ([silent, own], "pipeline", False),
        ([silent], "pipeline", False), ([], "pipeline", False),
    ):  # fmt: skip
        assert recorded_value(loras, "image_latents", "pipeline", if_missing="pipeline") == expected
        assert ("image_latents" in capsys.readouterr().err) == warned
    assert recorded_value([silent, scaled], "fps", 16.0) == 8.0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_no_denoising_step_has_a_negative_timestep(model, kind):
    import diffusers

    pipeline = load_pipeline(model, torch.float32)
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config)
    assert count_transformer_calls(pipeline, 61) == 62  # with diffusers' own timesteps
    pipeline = load_pipeline(model, torch.float32)
    for num_steps in (50, 61, 103, 121, 1000):
        assert count_transformer_calls(pipeline, num_steps) == num_steps
        assert pipeline.scheduler.timesteps[-1] >= 0


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--lora", "{folder}/pipeline", "much"], "--lora: .*pipeline .*'much'"),
        (["--lora", "{folder}/other"], "layer transformer_blocks.7.attn1.to_q"),
        (["--lora", "{folder}/none"], "/none"),
        (["--lora", "{folder}/pipeline", "nan"], "^--lora: "),
        (["--lora-scale", "1", "nan"], "--lora-scale: "),
        (["--guidance", "inf"], "--guidance: "),
        (["--steps", "0"], "--steps: "),
        (["--steps", "-2"], "--steps: "),
        (["--fps", "nan"], "--fps: "),
        (["--fps", "0"], "--fps: "),
        (["--lora-alpha", "8"], "--lora-alpha"),
        (["--image", "{folder}/none.png"], "^--image: .*none.png"),
        (["--size", "10x64x64"], "^--size: 10x64x64 .*9x64x64"),
        (["--size", "64x64"], "^--size: '64x64' "),
        (["--prompt", "a second", "--prompt", "a third", "--image", "{folder}/first.png"], "3 --prompt .*2 --image"),
        (["--output", "{folder}/first.png/sample.mp4"], "--output: .*first.png"),
        pytest.param(
            ["--offload"], "--offload: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_errors_are_raised_before_any_weight_is_loaded(sample, monkeypatch, argv, named):
    layer = "transformer.transformer_blocks.7.attn1.to_q"
    save_file({f"{layer}.lora_{half}.weight": torch.zeros(1, 1) for half in "AB"}, sample.folder / "x")
    (sample.folder / "other").mkdir()
    (sample.folder / "x").rename(sample.folder / "other/pytorch_lora_weights.safetensors")
    monkeypatch.setattr(cogds.sample, "TextEncoder", None)
    with pytest.raises(UserError, match=named):
        sample("pipeline", *(word.format(folder=sample.folder) for word in argv))


def test_a_cudnn_that_computes_the_vae_wrongly_is_refused(sample, monkeypatch):
    monkeypatch.setattr(cogds.sample, "TextEncoder", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    with pytest.raises(UserError, match=r"^cuDNN 9\.10\.2: "):
        sample("pipeline")


def test_another_convention_is_followed_and_logged(sample, capsys):
    _, frames, fps = sample("pipeline")
    assert frames.shape == (9, 32, 48, 3)
    assert fps == 8
    assert "image latents" not in capsys.readouterr().out
    _, other, _ = sample("scaled")
    assert "(scaled)" in capsys.readouterr().out
    assert not torch.equal(frames, other)


def test_size_frame_rate_and_strength_can_be_given(sample):
    path, frames, fps = sample("pipeline", "--size", "17x64x64", "--fps", "12", "--output", "here.mp4")
    assert (path, frames.shape, fps) == (Path("here.mp4"), (17, 64, 64, 3), 12)
    _, weaker, _ = sample("pipeline", "--size", "17x64x64", "--lora-scale", "0")
    assert not torch.equal(frames, weaker)


def test_size_is_the_bucket_that_crops_the_image_least(tmp_path):
    buckets = [ClipShape.parse(text) for text in ("1x64x64", "9x64x96", "9x96x64")]
    for width, height, expected in ((90, 60, "9x64x96"), (60, 90, "9x96x64"), (90, 90, "9x64x96")):
        Image.new("RGB", (width, height)).save(tmp_path / "image.png")
        assert str(best_bucket(str(tmp_path / "image.png"), buckets)) == expected


def test_without_recorded_buckets_the_size_is_the_models_own(model, tmp_path):
    Image.new("RGB", (90, 60)).save(tmp_path / "image.png")
    args = parse_args("sample", ["--model", "m", "--prompt", "p", "--image", str(tmp_path / "image.png")])
    with pytest.raises(UserError, match=str(TRAINED_SIZE)):  # which the tiny model does not support
        plan_jobs(args, [], model, 16.0, {})


def test_nothing_is_overwritten(sample, monkeypatch):
    monkeypatch.chdir(sample.folder)
    written = sample.written
    monkeypatch.setattr(cogds.sample, "write_video", lambda path, *rest: written.append((path, *rest)) or path.touch())
    assert [sample("pipeline")[0].name for _ in range(3)] == ["sample.mp4", "sample-2.mp4", "sample-3.mp4"]
    sample("pipeline", "--seed", "1", "2", "--output", "several")
    encoders = []
    monkeypatch.setattr(cogds.sample, "TextEncoder", lambda *_: encoders.append(1))
    for output, words, named in (
        ("sample.mp4", [], "sample.mp4"),
        ("several", ["--seed", "3", "2"], "several/01-a-red-circle-seed2-scale1.mp4"),
        ("several", ["--seed", "3", "4"], "several/01-a-red-circle-grid.mp4"),
    ):
        with pytest.raises(UserError, match=f"^--output: {named} already exists"):
            sample("pipeline", *words, "--output", output)
    assert not encoders


def test_the_first_frame_of_a_video_may_be_given(model, tmp_path):
    frames = np.stack([np.full((64, 96, 3), level, np.uint8) for level in (200, 20, 20)])
    write_video(tmp_path / "clip.mp4", frames, 8)
    buckets = [ClipShape(9, 64, 64), ClipShape(9, 64, 96)]
    shape, pixels = load_first_frame(str(tmp_path / "clip.mp4"), None, buckets, model.geometry)
    assert shape == ClipShape(9, 64, 96)
    assert pixels.shape == (64, 96, 3)
    assert abs(pixels.astype(int) - 200).max() < 5


@pytest.mark.parametrize("name", ["1.5-5b", "2b"])
def test_a_video_from_text_equals_that_of_the_plain_pipeline(family, tmp_path, monkeypatch, name):
    """Bit for bit, with a LoRA. There is no image, and the size is that of the largest bucket."""
    model, written = find_model(str(family(name))), []
    monkeypatch.setattr(cogds.sample, "write_video", lambda *args: written.append(args))
    metadata = {"task": "text-to-video", "buckets": ["1x64x96", "9x32x32", "9x32x48"], "fps": 8.0}
    lora = write_lora(model.path, tmp_path / "lora", metadata=metadata)
    words = ["--model", str(model.path), "--lora", str(lora), "--prompt", "a red circle", "--steps", "2"]
    call("sample", words)
    pipeline = load_whole_pipeline(model)
    pipeline.load_lora_weights(lora)
    latents = pipeline(
        prompt="a red circle", num_frames=9, height=32, width=48, num_inference_steps=2, guidance_scale=6.0,
        max_sequence_length=model.geometry.text_tokens, generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames  # fmt: skip
    pipeline.vae.enable_tiling()
    padding = padding_frames(latent_frames(9, model.geometry), model.geometry.patch_size_t)
    video = pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents[:, padding:]), output_type="pt")
    expected = (video[0][-9:].clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(written[0][1], expected)
    assert written[0][2] == 8.0


def test_images_and_models_must_fit(family, tmp_path):
    text, image = (["--model", str(family(name)), "--prompt", "a"] for name in ("5b", "5b-i2v"))
    Image.new("RGB", (96, 64)).save(tmp_path / "first.png")
    with pytest.raises(UserError, match=r"^--image: .*first\.png is given"):
        call("sample", [*text, "--image", str(tmp_path / "first.png")])
    (tmp_path / "list.csv").write_text("prompt,image\na,first.png\n")
    with pytest.raises(UserError, match=r"list\.csv:2: image first\.png is given"):
        call("sample", [*text[:2], "--list", str(tmp_path / "list.csv")])
    with pytest.raises(UserError, match="--image missing"):
        call("sample", image)
    with pytest.raises(UserError, match=r"^--size: 9x64x96 .* 17x64x96"):
        call("sample", [*image, "--image", str(tmp_path / "first.png"), "--size", "9x64x96"])


@pytest.fixture
def run_shapes(tmp_path, monkeypatch):
    """`run_shapes(*argv)`: the video that the shapes model makes; `.clips`: conditions and seed of each clip."""
    written, clips = [], []
    monkeypatch.setattr(cogds.sample, "write_video", lambda *args: written.append(args))
    generate = cogds.sample.sample_latents

    def sample_latents(pipeline, conditions, states, shape, seed, denoising):
        clips.append((conditions, seed))
        return generate(pipeline, conditions, states, shape, seed, denoising)

    monkeypatch.setattr(cogds.sample, "sample_latents", sample_latents)
    Image.linear_gradient("L").convert("RGB").resize((48, 48)).save(tmp_path / "first.png")
    Image.linear_gradient("L").rotate(90).convert("RGB").resize((48, 48)).save(tmp_path / "last.png")
    write_video(tmp_path / "clip.mp4", np.zeros((40, 48, 48, 3), np.uint8), 8)

    def run(*argv):
        clips.clear()
        common = ["--model", "builtin:shapes", "--prompt", "the circle moves", "--size", "17x48x48", "--steps", "1"]
        call("sample", [*common, "--guidance", "1", *(word.format(folder=tmp_path) for word in argv)])
        return torch.as_tensor(written[-1][1])

    run.clips, run.folder = clips, tmp_path
    return run


def test_each_segment_continues_the_last_frames_of_the_one_before(run_shapes, capsys):
    frames = run_shapes("--image", "{folder}/first.png", "--segments", "4", "--seed", "3")
    assert len(frames) == 17 + 3 * 12
    (first, _), *following = run_shapes.clips
    assert first.image is not None
    assert first.video is None
    for number, (conditions, _) in enumerate(following):
        end = 17 + 12 * number
        assert conditions.image is None
        assert torch.equal(torch.from_numpy(conditions.video), frames[end - 5 : end])
    assert [seed for _, seed in run_shapes.clips] == [3, 4, 5, 6]
    assert "mode prefix was not trained: the model was trained with first." in capsys.readouterr().err
    frames = run_shapes("--video", "{folder}/clip.mp4", "--segments", "2", "--context", "3")
    assert len(frames) == 17 + 8
    assert [conditions.video.shape[0] for conditions, _ in run_shapes.clips] == [9, 9]


def test_a_loop_is_written_without_the_repeated_frame(run_shapes):
    loop = run_shapes("--image", "{folder}/first.png", "--loop")
    whole = run_shapes("--image", "{folder}/first.png", "--last-image", "{folder}/first.png")
    assert len(whole) == 17
    assert torch.equal(loop, whole[:16])


def test_a_list_sets_the_last_image_of_each_line(run_shapes):
    (run_shapes.folder / "list.csv").write_text("prompt,image,last_image\na,first.png,last.png\nb,,last.png\n")
    common = ["--model", "builtin:shapes", "--size", "17x48x48", "--list", str(run_shapes.folder / "list.csv")]
    jobs = plan_jobs(parse_args("sample", common), [], find_model("builtin:shapes"), 8.0, {})
    assert [job.conditions.image is not None for job in jobs] == [True, False]
    last = np.asarray(Image.open(run_shapes.folder / "last.png"))
    assert all(np.array_equal(job.conditions.last_image, last) for job in jobs)


def test_a_full_fine_tune_is_sampled_with_its_sizes_and_its_context(run_shapes):
    video = str(run_shapes.folder / "clip.mp4")
    args = parse_args("sample", ["--model", "builtin:shapes", "--prompt", "a", "--video", video])
    own = {"buckets": ["17x48x48"], "context_latents": 3}
    (job,) = plan_jobs(args, [], find_model("builtin:shapes"), 8.0, own)
    assert str(job.shape) == "17x48x48"
    assert len(job.conditions.video) == 9


def test_a_line_with_a_video_needs_no_image_and_errors_name_the_line(run_shapes):
    (run_shapes.folder / "list.csv").write_text("prompt,image,video\na,,clip.mp4\nb,,\nc,first.png,clip.mp4\n")
    image = str(run_shapes.folder / "first.png")
    common = ["--model", "builtin:shapes", "--size", "17x48x48", "--image", image]
    words = [*common, "--list", str(run_shapes.folder / "list.csv")]
    with pytest.raises(UserError, match=r"list\.csv:4: --video: --image is also given"):
        plan_jobs(parse_args("sample", words), [], find_model("builtin:shapes"), 8.0, {})
    (run_shapes.folder / "list.csv").write_text("prompt,image,video\na,,clip.mp4\nb,,\n")
    jobs = plan_jobs(parse_args("sample", words), [], find_model("builtin:shapes"), 8.0, {})
    assert [(job.conditions.image is None, job.conditions.video is None) for job in jobs] == [
        (True, False), (False, True)
    ]  # fmt: skip


def test_the_modes_of_a_lora_decide_about_the_warning(sample, capsys):
    lora = write_lora(find_model("builtin:shapes").path, sample.folder / "lora", metadata={
        "modes": {"first": 0.5, "last": 0.5}, "buckets": ["17x48x48"], "fps": 8.0, "context_latents": 3,
    })  # fmt: skip
    image = str(sample.folder / "first.png")
    for flags, warning in (
        (["--last-image", image], ""),
        (["--keyframe", "1", image], "mode keyframes was not trained: the LoRA was trained with first, last."),
    ):
        argv = ["--model", "builtin:shapes", "--lora", str(lora), "--prompt", "a", "--steps", "1", *flags]
        call("sample", argv)
        errors = capsys.readouterr().err
        assert warning in errors
        assert bool(warning) == ("not trained" in errors)


@pytest.mark.parametrize("mode", MODES)
def test_the_command_that_training_shows_uses_its_mode(run_shapes, mode):
    video, image = (str(run_shapes.folder / name) for name in ("clip.mp4", "first.png"))
    common = ["--model", "builtin:shapes", "--prompt", "a", "--size", "17x48x48"]
    args = parse_args("sample", [*common, *example_flags(mode, video, image, [0.5, 2])])
    (job,) = plan_jobs(args, [], find_model("builtin:shapes"), 8.0, {})
    assert modes_of(job.conditions) == ("first" if mode == "none" else mode,)


@pytest.mark.parametrize(
    "flags", [["--last-image", "a.png"], ["--video", "a.mp4"], ["--keyframe", "1", "a.png"], ["--segments", "2"]]
)
def test_a_text_to_video_model_takes_no_conditions(family, flags):
    with pytest.raises(UserError, match=rf"^{flags[0]}: this model makes videos from the prompt alone"):
        call("sample", ["--model", str(family("1.5-5b")), "--prompt", "a", *flags])


def test_a_model_that_does_not_exist_is_named_by_its_flag(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"^--model: no such folder: nothing"):
        call("sample", ["--model", "nothing", "--prompt", "a", "--image", str(tmp_path / "a.png")])


def test_a_keyframe_needs_a_time(family):
    with pytest.raises(UserError, match=r"^--keyframe: 'soon' is not a time"):
        call("sample", ["--model", str(family("1.5-5b-i2v")), "--prompt", "a", "--keyframe", "soon", "a.png"])

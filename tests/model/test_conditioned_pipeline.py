"""ConditionedPipeline: identical to diffusers' pipeline for a first image; every condition at its place."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, DiffusionPipeline
from PIL import Image

from cogds.model.conditioned_pipeline import ConditionedPipeline
from cogds.model.load import find_model
from cogds.model.pipelines import Conditions, apply_convention, build_pipeline
from tests.tiny import FIXED_SIZE

FRAMES, HEIGHT, WIDTH = map(int, FIXED_SIZE.split("x"))  # 17 frames: 5 latent frames, padded to 6 in 1.5
V15, V10 = "1.5-5b-i2v", "5b-i2v"
PADDING = {V15: 1, V10: 0}


def image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def video(num_frames, seed=50):
    return [image(seed + number) for number in range(num_frames)]


@pytest.fixture(scope="module")
def load(family):
    """`load(class, name)`: a pipeline of that class whose transformer calls are recorded in `.calls`."""
    loaded = {}

    def pipeline_of(create, name=V15):
        if (create, name) not in loaded:
            pipe = create.from_pretrained(family(name), dtype=torch.float32)
            pipe.set_progress_bar_config(disable=True)
            forward, pipe_calls = pipe.transformer.forward, []

            def record(**inputs):
                pipe_calls.append(inputs)
                return forward(**inputs)

            pipe.transformer.forward = record
            loaded[create, name] = pipe, pipe_calls
        return loaded[create, name]

    return pipeline_of


def run(loaded, steps=1, **conditions):
    """Return the latents and the keyword arguments of the transformer's calls."""
    pipe, calls = loaded
    calls.clear()
    arguments = {
        "prompt": "a red circle", "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "num_inference_steps": steps,
        "guidance_scale": 1.0, "max_sequence_length": pipe.transformer.config.max_text_seq_length,
        "generator": torch.Generator().manual_seed(7), "output_type": "latent",
    }  # fmt: skip
    return pipe(**arguments | conditions).frames, list(calls)


def condition_of(loaded, **conditions):
    """Return the condition [F, C, H, W] that the transformer gets."""
    _, calls = run(loaded, **conditions)
    channels = loaded[0].vae.config.latent_channels
    return calls[0]["hidden_states"][0, :, channels:]


@pytest.mark.parametrize("name", [V15, V10])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_a_first_image_gives_the_same_as_diffusers(load, name, guidance):
    """Bit for bit: the latents of a whole run, and everything that the transformer gets."""
    results = [
        run(load(create, name), steps=3, image=image(1), guidance_scale=guidance)
        for create in (CogVideoXImageToVideoPipeline, ConditionedPipeline)
    ]
    (theirs, their_calls), (ours, our_calls) = results
    assert torch.equal(theirs, ours)
    assert len(their_calls) == len(our_calls) == 3
    for their_inputs, our_inputs in zip(their_calls, our_calls, strict=True):
        assert their_inputs.keys() == our_inputs.keys()
        for key, value in their_inputs.items():
            torch.testing.assert_close(our_inputs[key], value, atol=0, rtol=0, equal_nan=True)
    # A keyframe at 0 is the first image.
    assert torch.equal(
        run(load(ConditionedPipeline, name), steps=3, keyframes={0: image(1)}, guidance_scale=guidance)[0], ours
    )


CASES = {
    # arguments, and the clips with their first latent frame without padding, in the order of encoding
    "last": ({"last_image": image(2)}, [([image(2)], 4)]),
    "first_last": ({"image": image(1), "last_image": image(2)}, [([image(2)], 4)]),
    "prefix": ({"video": video(5)}, [(video(5), 0)]),
    "suffix": ({"video": video(5), "video_at": "end"}, [(video(5), 3)]),
    "keyframes": ({"keyframes": {6: image(3), 16: image(4)}}, [([image(3)], 2), ([image(4)], 4)]),
    "keyframes with the first": ({"keyframes": {16: image(4), 0: image(1)}}, [([image(4)], 4)]),
    "prefix and last": ({"video": video(9), "last_image": image(2)}, [([image(2)], 4), (video(9), 0)]),
    "none": ({}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", [V15, V10])
@pytest.mark.parametrize("case", CASES)
def test_every_condition_is_at_its_place(load, name, case):
    conditions, clips = CASES[case]
    pipe, _ = ours = load(ConditionedPipeline, name)
    has_image = "image" in conditions or 0 in conditions.get("keyframes", ())
    # As in the docstring: the image and the noise as in diffusers, then the rest from the same generator.
    generator, scale = torch.Generator().manual_seed(7), pipe.vae.config.scaling_factor
    scale = 1 / scale if name == V15 else scale

    def encode(frames):
        pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).float() / 255 * 2 - 1
        moments = pipe.vae.encode(pixels.permute(3, 0, 1, 2)[None]).latent_dist
        noise = torch.randn(moments.mean.shape, generator=generator)
        return scale * (moments.mean + moments.std * noise)[0].transpose(0, 1)

    with torch.no_grad():
        first = encode([image(1)])[0]
        channels, height, width = first.shape
        padding = PADDING[name]
        expected = torch.zeros(5 + padding, channels, height, width)
        noise = torch.randn(1, *expected.shape, generator=generator)
        if has_image:
            expected[0] = first
        for frames, place in clips:
            latents = encode(frames)
            assert len(latents) == (len(frames) + 3) // 4
            expected[padding + place : padding + place + len(latents)] = latents
            if len(frames) > 1 and place == 0:
                expected[:padding] = latents[:1]
    _, calls = run(ours, **conditions)
    noisy, condition = calls[0]["hidden_states"][0].split(channels, dim=1)
    torch.testing.assert_close(condition, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(condition == 0, expected == 0)
    assert torch.equal(noisy, noise[0] * pipe.scheduler.init_noise_sigma)


def test_a_failed_or_earlier_call_leaves_no_conditions(load):
    ours = load(ConditionedPipeline)
    before = condition_of(ours, image=image(1))
    condition_of(ours, image=image(1), last_image=image(2))
    with pytest.raises(ValueError, match="divisible by 8"):
        run(ours, last_image=image(2), height=HEIGHT + 4)
    assert torch.equal(condition_of(ours, image=image(1)), before)


def test_each_prompt_has_its_own_conditions(load):
    ours = load(ConditionedPipeline)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    _, calls = run(ours, prompt=["a", "b"], last_image=[image(2), image(3)], generator=generators)
    channels = ours[0].vae.config.latent_channels
    alone = [
        condition_of(ours, last_image=image(number), generator=torch.Generator().manual_seed(seed))
        for number, seed in ((2, 7), (3, 8))
    ]
    torch.testing.assert_close(calls[0]["hidden_states"][:, :, channels:], torch.stack(alone), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="`last_image` has 2 samples, but there are 3 prompts"):
        run(ours, prompt=["a", "b", "c"], last_image=[image(2), image(3)])


def test_the_convention_of_a_lora_scales_all_conditions(family):
    from cogds.model.load import load_transformer, load_vae

    model = find_model(str(family(V15)))
    pipe = build_pipeline(model, load_transformer(model, torch.float32), load_vae(model, torch.float32, "cpu"))
    states = torch.zeros(1, model.geometry.text_tokens, pipe.transformer.config.text_embed_dim)
    found = []
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda **inputs: (found.append(inputs["hidden_states"]), forward(**inputs))[1]
    conditions = Conditions(np.asarray(image(1)), np.asarray(image(2)), keyframes={8: np.asarray(image(3))})
    for convention in ("pipeline", "scaled"):
        factor = apply_convention(pipe, convention)
        pipe(
            **conditions.pipeline_arguments(), prompt_embeds=states, num_frames=FRAMES, height=HEIGHT, width=WIDTH,
            num_inference_steps=1, guidance_scale=1.0, max_sequence_length=states.shape[1],
            generator=torch.Generator().manual_seed(7), output_type="latent",
        )  # fmt: skip
    theirs, scaled = (inputs[0, :, pipe.vae.config.latent_channels :] for inputs in found)
    assert factor == pytest.approx(0.49)
    torch.testing.assert_close(scaled, theirs * 0.49)
    assert [bool(frame.any()) for frame in theirs] == [True, False, False, True, False, True]


@pytest.mark.parametrize(
    "conditions, message",
    [
        ({"image": image(1), "video": video(5)}, "same latent frame: frame 0 and frames 0 to 4"),
        ({"last_image": image(1), "video": video(5), "video_at": "end"}, "frame 16 and frames 12 to 16"),
        ({"last_image": image(1), "keyframes": {14: image(2)}}, "frame 16 and frame 14"),
        ({"image": image(1), "keyframes": {0: image(2)}}, "frame 0 and frame 0"),
        ({"keyframes": {17: image(1)}}, "frame 17 is after the end of a clip of 17"),
        ({"keyframes": {-1: image(1)}}, "Use frame numbers from 0"),
        ({"video": video(6)}, r"`video` has 6 frames. Pass 4N \+ 1"),
        ({"video": video(1)}, "`video` has 1 frames"),
        ({"video": video(17)}, "leaves none to generate"),
        ({"video": video(5), "video_at": "middle"}, "`video_at` is 'middle'"),
        ({"last_image": image(1), "num_frames": 16}, "`num_frames` is 16"),
    ],
)
def test_impossible_conditions_are_refused(load, conditions, message):
    with pytest.raises(ValueError, match=message):
        run(load(ConditionedPipeline), **conditions)


def test_a_saved_pipeline_loads_without_cogds(family, tmp_path):
    ConditionedPipeline.from_pretrained(family(V15)).save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is CogVideoXImageToVideoPipeline

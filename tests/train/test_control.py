"""What training feeds the transformer of a control video equals what sampling feeds it."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image

from cogds.config.schema import ConditioningConfig
from cogds.core.geometry import ClipShape
from cogds.model.conditioned_pipeline import ConditionedPipeline
from cogds.model.control import add_control, control_of, encode_control
from cogds.model.load import find_model, load_alphas_cumprod, load_vae
from cogds.model.pipelines import load_pipeline
from cogds.train.step import Draws, StepBuilder, random_batch

SHAPE, CPU = ClipShape(17, 64, 96), torch.device("cpu")
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (17, 64, 96, 3), np.uint8))


def training_inputs(model, vae, control=True):
    """The transformer's input channels in a training step with the control video PIXELS."""
    batch = random_batch(SHAPE, 1, model.geometry, 32, "fp32")
    with torch.no_grad():
        video = PIXELS.permute(3, 0, 1, 2)[None] / 127.5 - 1
        batch["control_moments"] = vae.encode(video).latent_dist.parameters
    batch["control_moments"][:, 8:] = -30  # no variance
    conditioning = ConditioningConfig(control=control)
    builder = StepBuilder(vae, model.geometry, conditioning, load_alphas_cumprod(model), torch.zeros(32, 32), CPU)
    no_dropout = torch.zeros(1, dtype=torch.bool)
    return builder.build(batch, SHAPE, Draws(torch.tensor([500]), no_dropout, no_dropout, 0, 0, [0]))[0][
        "hidden_states"
    ]


@pytest.mark.parametrize("name", ["1.5-5b-i2v", "1.5-5b", "5b-i2v"])
def test_training_and_sampling_give_the_same_control(family, name):
    model = find_model(str(family(name)))
    vae = load_vae(model, torch.float32, "cpu")
    hidden, plain = training_inputs(model, vae), training_inputs(model, vae, control=False)
    assert torch.equal(hidden[:, :, :-8], plain)  # the other channels do not depend on it
    control = hidden[:, :, -8:]
    sampled = encode_control(vae, PIXELS, model.geometry.patch_size_t, device=CPU)
    torch.testing.assert_close(control, sampled, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        video = PIXELS.permute(3, 0, 1, 2)[None] / 127.5 - 1
        mean = vae.encode(video).latent_dist.mean.transpose(1, 2) * vae.config.scaling_factor
    padded = torch.cat([mean[:, :1], mean], 1) if model.geometry.patch_size_t else mean
    torch.testing.assert_close(control, padded, atol=1e-5, rtol=1e-5)


def test_both_branches_of_guidance_get_the_control(tiny_model):
    model, seen = find_model(str(tiny_model)), []
    pipeline = load_pipeline(model, torch.float32)
    assert isinstance(pipeline, ConditionedPipeline)
    weight = add_control(pipeline.transformer, 8)
    control_of(pipeline.transformer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    settings = {
        "image": Image.fromarray(PIXELS[0].numpy()), "prompt_embeds": torch.zeros(1, 32, 32), "num_frames": 17,
        "negative_prompt_embeds": torch.zeros(1, 32, 32), "height": 64, "width": 96, "num_inference_steps": 1,
        "guidance_scale": 6.0, "output_type": "latent", "max_sequence_length": 32,
    }  # fmt: skip
    frames = [Image.fromarray(frame) for frame in PIXELS.numpy()]

    def run():
        return pipeline(**settings, control_video=frames, generator=torch.Generator().manual_seed(0)).frames

    before = run()
    expected = encode_control(pipeline.vae, PIXELS, 2, device=CPU)
    torch.testing.assert_close(seen[0], expected.expand(2, -1, -1, -1, -1), atol=1e-5, rtol=1e-5)
    torch.nn.init.normal_(weight.detach(), std=0.1)
    assert (run() - before).abs().max() > 1e-2
    with pytest.raises(ValueError, match="Pass `control_video`"):
        pipeline(**settings, generator=torch.Generator().manual_seed(0))


def test_every_prompt_of_a_batch_gets_its_own_control(tiny_model):
    pipeline = load_pipeline(find_model(str(tiny_model)), torch.float32)
    add_control(pipeline.transformer, 8)
    seen = []
    control_of(pipeline.transformer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    videos = [PIXELS, PIXELS.flip(0)]
    settings = {
        "image": [Image.fromarray(PIXELS[0].numpy())] * 2, "prompt_embeds": torch.zeros(2, 32, 32), "num_frames": 17,
        "negative_prompt_embeds": torch.zeros(2, 32, 32), "height": 64, "width": 96, "num_inference_steps": 1,
        "guidance_scale": 6.0, "output_type": "latent", "max_sequence_length": 32,
    }  # fmt: skip
    given = [video.permute(0, 3, 1, 2) / 255 for video in videos]
    pipeline(**settings, control_video=given)
    expected = torch.cat([encode_control(pipeline.vae, video, 2, device=CPU) for video in videos])
    torch.testing.assert_close(seen[0], torch.cat([expected, expected]), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="`control_video` has 3 samples, but there are 2 prompts"):
        pipeline(**settings, control_video=[given[0]] * 3)


def test_a_control_must_have_the_frames_and_the_size_of_the_clip(tiny_model):
    pipeline = load_pipeline(find_model(str(tiny_model)), torch.float32)
    add_control(pipeline.transformer, 8)
    settings = {
        "image": Image.fromarray(PIXELS[0].numpy()), "prompt_embeds": torch.zeros(1, 32, 32), "num_frames": 17,
        "negative_prompt_embeds": torch.zeros(1, 32, 32), "num_inference_steps": 1, "output_type": "latent",
        "max_sequence_length": 32,
    }  # fmt: skip
    frames = [Image.fromarray(frame) for frame in PIXELS.numpy()]
    for num_frames in (9, 10, 13, 21, 33):
        with pytest.raises(ValueError, match=f"`control_video` has {num_frames} frames, but the clip has 17"):
            pipeline(**settings, height=64, width=96, control_video=(frames + frames)[:num_frames])
    # The default size is that of the model, for both.
    pipeline.transformer.register_to_config(sample_height=4, sample_width=6)
    seen = []
    control_of(pipeline.transformer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pipeline(**settings, control_video=frames)
    assert seen[0].shape[3:] == (4, 6)


def test_an_offloaded_vae_encodes_on_the_given_device(tiny_model):
    vae = load_vae(find_model(str(tiny_model)), torch.float32, "cpu")
    expected = encode_control(vae, PIXELS, 2, device=CPU)
    cpu_offload(vae, CPU)
    assert vae.device.type == "meta"
    assert torch.equal(encode_control(vae, PIXELS, 2, device=CPU), expected)


def test_the_tiling_of_the_vae_is_kept_unless_given(tiny_model):
    vae = load_vae(find_model(str(tiny_model)), torch.float32, "cpu")
    used = []
    vae.encode = lambda video, encode=vae.encode: (used.append(vae.use_tiling), encode(video))[1]
    for before in (False, True):
        vae.use_tiling = before
        for tiled, expected in ((None, before), (False, False), (True, True)):
            encode_control(vae, PIXELS, 2, device=CPU, tiled=tiled)
            assert (used.pop(), vae.use_tiling) == (expected, before)

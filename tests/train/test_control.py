"""What training feeds the transformer of a control video equals what sampling feeds it."""

import numpy as np
import pytest
import torch
from PIL import Image

from cogds.config.schema import ConditioningConfig
from cogds.core.geometry import ClipShape
from cogds.model.conditioned_pipeline import ConditionedPipeline
from cogds.model.control import add_control, control_of, encode_control
from cogds.model.load import find_model, load_alphas_cumprod, load_vae
from cogds.model.pipelines import load_pipeline
from cogds.train.step import Draws, StepBuilder, random_batch

SHAPE = ClipShape(17, 64, 96)
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (17, 64, 96, 3), np.uint8))


def training_inputs(model, vae, control=True):
    """The transformer's input channels in a training step with the control video PIXELS."""
    batch = random_batch(SHAPE, 1, model.geometry, 32, "fp32")
    with torch.no_grad():
        video = PIXELS.permute(3, 0, 1, 2)[None] / 127.5 - 1
        batch["control_moments"] = vae.encode(video).latent_dist.parameters
    batch["control_moments"][:, 8:] = -30  # no variance
    conditioning = ConditioningConfig(control=control)
    builder = StepBuilder(
        vae, model.geometry, conditioning, load_alphas_cumprod(model), torch.zeros(32, 32), torch.device("cpu")
    )
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
    sampled = encode_control(vae, PIXELS, model.geometry.patch_size_t)
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
    expected = encode_control(pipeline.vae, PIXELS, 2)
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
    expected = torch.cat([encode_control(pipeline.vae, video, 2) for video in videos])
    torch.testing.assert_close(seen[0], torch.cat([expected, expected]), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="`control_video` has 3 samples, but there are 2 prompts"):
        pipeline(**settings, control_video=[given[0]] * 3)

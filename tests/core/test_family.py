"""The members of the family, recognized by the values that diffusers' conversion script writes."""

import pytest

from cogds.config.loading import load_config
from cogds.core.buckets import generate_buckets, parse_buckets
from cogds.core.family import Family
from cogds.core.geometry import ClipShape
from cogds.errors import UserError
from tests.conftest import ROOT
from tests.published_model import PUBLISHED

TRANSFORMER = {
    "in_channels": 32, "patch_size_t": 2, "ofs_embed_dim": 512, "use_rotary_positional_embeddings": True,
}  # fmt: skip
VAE = {"latent_channels": 16, "scaling_factor": 0.7, "invert_scale_latents": True}
SCHEDULER = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"}
CONFIGS = {
    "CogVideoX1.5-5B-I2V": "cogvideox1.5_i2v_lora",
    "CogVideoX1.5-5B": "cogvideox1.5_t2v_lora",
    "CogVideoX-5b-I2V": "cogvideox_5b_i2v_lora",
    "CogVideoX-5b": "cogvideox_5b_lora",
    "CogVideoX-2b": "cogvideox_2b_lora",
}


@pytest.mark.parametrize(
    "name, image, patch_size_t, positions, ofs, scale, inverted",
    [
        ("CogVideoX1.5-5B-I2V", True, 2, "rope_slice", True, 0.7, True),
        ("CogVideoX1.5-5B", False, 2, "rope_slice", False, 0.7, True),
        ("CogVideoX-5b-I2V", True, None, "learned", False, 0.7, False),
        ("CogVideoX-5b", False, None, "rope_resize", False, 0.7, False),
        ("CogVideoX-2b", False, None, "sincos", False, 1.15258426, False),
    ],
)
def test_what_differs(name, image, patch_size_t, positions, ofs, scale, inverted):
    family = PUBLISHED[name].family
    assert (family.takes_image, family.patch_size_t, family.positions) == (image, patch_size_t, positions)
    assert (family.has_ofs, family.scaling_factor, family.invert_scale_latents) == (ofs, scale, inverted)
    assert family.task == ("image-to-video" if image else "text-to-video")
    assert family.has_rope is (name != "CogVideoX-2b")
    is_15 = patch_size_t == 2
    assert PUBLISHED[name].trained_size == ClipShape.parse("81x768x1360" if is_15 else "49x480x720")
    assert PUBLISHED[name].trained_fps == (16 if is_15 else 8)


def test_keys_that_older_configs_lack_have_diffusers_defaults():
    """CogVideoX-2b was published before rotary tables, temporal patches and image-to-video existed."""
    family = Family.from_configs({"in_channels": 16}, {"latent_channels": 16, "scaling_factor": 1.15258426}, SCHEDULER)
    assert (family.positions, family.patch_size_t, family.has_ofs) == ("sincos", None, False)
    assert (family.takes_image, family.invert_scale_latents) == (False, False)


@pytest.mark.parametrize(
    "transformer, scheduler, message",
    [
        ({"in_channels": 48}, {}, r"^transformer/config\.json: in_channels is 48, .* 16 .* 32"),
        ({"in_channels": 16}, {}, r"^transformer/config\.json: ofs_embed_dim is 512"),
        ({"use_rotary_positional_embeddings": False}, {}, r"patch_size_t 2, use_rotary_positional_embeddings False"),
        ({"use_learned_positional_embeddings": True}, {}, r"patch_size_t 2, .* use_learned_positional_embeddings True"),
        ({}, {"_class_name": "DDPMScheduler"}, r"^scheduler/scheduler_config\.json: DDPMScheduler"),
        ({}, {"prediction_type": "epsilon"}, r"^scheduler/scheduler_config\.json: .*epsilon"),
    ],
)
def test_other_models_are_refused(transformer, scheduler, message):
    with pytest.raises(UserError, match=message):
        Family.from_configs(TRANSFORMER | transformer, VAE, SCHEDULER | scheduler)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_model_has_a_config_that_fits_it(name):
    cfg, explicit = load_config(str(ROOT / f"launch/configs/{CONFIGS[name]}.yaml"), ["data.path=clips"])
    geometry, data = PUBLISHED[name], cfg.data
    assert cfg.model.path == f"zai-org/{name}"
    assert cfg.output_dir == f"outputs/{CONFIGS[name]}"
    assert data.fps == geometry.trained_fps
    if data.buckets:
        assert parse_buckets(data.buckets, geometry) == (geometry.trained_size,)
    else:
        shapes = generate_buckets(data.bucket_sizes, data.bucket_aspect_ratios, data.bucket_frames, geometry)
        assert max(shape.frames for shape in shapes) == geometry.trained_size.frames
    has_image_keys = any(key.startswith("conditioning.image_") for key in explicit)
    assert has_image_keys is geometry.family.takes_image

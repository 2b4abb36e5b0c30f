"""Rotary tables of 1.5 and 1.0, compared with those of the pipeline."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline

from cogds.core.geometry import ClipShape, padded_latent_frames, token_grid
from cogds.core.rope import rotary_tables
from cogds.errors import UserError
from tests.published_model import PUBLISHED

V15, ROPE_10 = PUBLISHED["CogVideoX1.5-5B"], PUBLISHED["CogVideoX-5b"]


def pipeline_tables(geometry, shape):
    config = SimpleNamespace(
        patch_size=geometry.patch_size,
        patch_size_t=geometry.patch_size_t,
        sample_width=geometry.sample_width,
        sample_height=geometry.sample_height,
        attention_head_dim=geometry.head_dim,
    )
    pipeline = SimpleNamespace(
        vae_scale_factor_spatial=geometry.vae_spatial, transformer=SimpleNamespace(config=config)
    )
    return CogVideoXImageToVideoPipeline._prepare_rotary_positional_embeddings(
        pipeline, shape.height, shape.width, padded_latent_frames(shape.frames, geometry), torch.device("cpu")
    )


@pytest.mark.parametrize("geometry", [V15, ROPE_10], ids=["1.5", "1.0"])
@pytest.mark.parametrize("text", ["81x768x1360", "49x480x720", "17x720x480", "13x256x256", "1x64x96", "17x2400x16"])
def test_tables_equal_those_of_the_pipeline(geometry, text):
    shape = ClipShape.parse(text)
    time, height, width = token_grid(shape, geometry)
    for table, expected in zip(rotary_tables(shape, geometry), pipeline_tables(geometry, shape), strict=True):
        assert table.dtype == torch.float32
        assert table.shape == (time * height * width, geometry.head_dim)
        assert torch.equal(table, expected)


def test_an_axis_beyond_the_grid_is_refused():
    with pytest.raises(UserError, match=r"^data\.buckets: 17x2416x64 "):
        rotary_tables(ClipShape(17, 2416, 64), V15)


def test_no_tables_for_a_model_without_rope():
    assert rotary_tables(ClipShape(49, 480, 720), PUBLISHED["CogVideoX-2b"]) is None

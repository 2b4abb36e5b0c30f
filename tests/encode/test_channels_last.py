"""The VAE in the memory layout `channels_last_3d`, which `benchmarks/vae.py` measures."""

import pytest
import torch

from cogds.encode.encoder import encode_pixels
from cogds.model.load import find_model, load_vae


@torch.no_grad()
@pytest.mark.parametrize("is_tiled", [False, True])
def test_encodings_differ_by_rounding_only(tiny_model, is_tiled):
    vae = load_vae(find_model(str(tiny_model)), torch.float32, "cpu")
    vae.tile_sample_min_height = vae.tile_sample_min_width = 64
    vae.tile_latent_min_height = vae.tile_latent_min_width = 8
    pixels = torch.randint(0, 256, (17, 96, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    default = encode_pixels(vae, pixels, is_tiled)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):  # the VAE has 2-D convolutions too
            module.to(memory_format=torch.channels_last_3d)
    weight = vae.encoder.conv_in.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not weight.is_contiguous()
    torch.testing.assert_close(encode_pixels(vae, pixels, is_tiled), default, rtol=1e-5, atol=1e-5)

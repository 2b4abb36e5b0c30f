"""The VAE's memory, compared with the tensors that the real encoder allocates on the meta device."""

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch.utils._python_dispatch import TorchDispatchMode

from cogds.core.geometry import ClipShape
from cogds.core.vae_memory import COGVIDEOX_VAE, VaeSize, vae_can_encode, vae_encode_bytes
from tests.live_bytes import LiveBytes
from tests.published_model import FULL


def build_vae(channels, layers_per_block, dtype, latent_channels=16, groups=32):
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX(
            block_out_channels=channels, down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4, latent_channels=latent_channels,
            layers_per_block=layers_per_block, norm_num_groups=groups,
        )  # fmt: skip
        return vae.to(dtype).eval()


def encode_peak(vae, shape, dtype, tiling=False):
    with torch.no_grad(), LiveBytes() as live:
        pixels = torch.zeros(1, 3, shape.frames, shape.height, shape.width, device="meta", dtype=dtype)
        vae.enable_tiling() if tiling else vae.disable_tiling()
        vae.encode(pixels)
    return live.peak


@pytest.fixture(scope="module")
def real_vae():
    return build_vae((128, 256, 256, 512), 3, torch.bfloat16)


@pytest.mark.parametrize("size", ["1x768x1360", "5x96x176", "9x768x1360", "13x768x1360", "17x768x1360", "17x96x176"])
def test_short_clips_at_the_published_size(real_vae, size):
    """Within 1%. From 768x1360 on, convolutions are split."""
    shape = ClipShape.parse(size)
    assert vae_encode_bytes(shape, tiling=False) == pytest.approx(
        encode_peak(real_vae, shape, torch.bfloat16), rel=0.01
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, tiling", [("81x768x1360", False), ("81x768x1360", True), ("85x768x1360", False), ("21x1200x2160", False)]
)
def test_whole_clips_at_the_published_size(real_vae, size, tiling):
    shape = ClipShape.parse(size)
    peak = encode_peak(real_vae, shape, torch.bfloat16, tiling)
    assert vae_encode_bytes(shape, tiling) == pytest.approx(peak, rel=0.03 if tiling else 0.01)


class CheckedConvolutions(TorchDispatchMode):
    """Make convolutions on the meta device refuse inputs smaller than their kernel, which torch 2.11 does not check."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            inputs, weight, _, _, padding, *_ = args
            sizes = [size + 2 * pad for size, pad in zip(inputs.shape[2:], padding)]
            if any(size < kernel for size, kernel in zip(sizes, weight.shape[2:])):
                raise RuntimeError(f"Kernel size {tuple(weight.shape[2:])} exceeds the input's {sizes}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", ["1x1440x1920", "1x1536x1920", "9x1536x2400", "17x1440x2320", "17x1536x2400"])
def test_sizes_that_the_vae_cannot_split(real_vae, size):
    shape = ClipShape.parse(size)
    if vae_can_encode(shape, tiling=False):
        assert vae_encode_bytes(shape, False) == pytest.approx(encode_peak(real_vae, shape, torch.bfloat16), rel=0.01)
    else:
        with CheckedConvolutions(), pytest.raises(RuntimeError, match="Kernel size"):
            encode_peak(real_vae, shape, torch.bfloat16)
    assert vae_can_encode(shape, tiling=True)


def test_a_vae_with_other_channels():
    vae = build_vae((8, 8, 8, 8), 1, torch.float32, latent_channels=8, groups=2)
    size = VaeSize.from_config(vae.config, 0)
    shape = ClipShape(17, 64, 96)
    assert vae_encode_bytes(shape, False, size, 4) == pytest.approx(encode_peak(vae, shape, torch.float32), rel=0.05)


def test_the_published_sizes_match_the_real_vae(real_vae):
    num_parameters = sum(parameter.numel() for parameter in real_vae.parameters())
    assert VaeSize.from_config(real_vae.config, num_parameters) == COGVIDEOX_VAE


def test_a_full_clip_needs_tiles_on_a_24_gb_gpu():
    assert vae_encode_bytes(FULL, tiling=False) > 24e9 > 10 * vae_encode_bytes(FULL, tiling=True)

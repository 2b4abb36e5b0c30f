"""Merged weights, in diffusers' format and in ComfyUI's, have the same effect as base model and LoRA together."""

import json
import shutil

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogds.errors import UserError
from cogds.model.load import ModelFolder, find_model
from cogds.model.lora.file import WeightedLora, read_lora
from cogds.model.lora.merge import (
    Merge,
    check_comfyui_supports,
    save_comfyui_merged,
    save_merged,
)
from cogds.model.weight_files import SHARD_BYTES, read_weights, save_other_parts, scale_image_channels, split_shards
from tests.model.lora.adapters import base_transformer, example_inputs, output, output_in_diffusers, write_lora
from tests.model.lora.test_convert import COMFYUI_RENAMES, LORAS

# Layers of ComfyUI's class (comfy/ldm/cogvideo/model.py), in a block and outside of the blocks.
COMFYUI_BLOCK = (
    "norm1.linear", "norm1.norm", "q", "k", "v", "norm_q", "norm_k", "attn_out", "norm2.linear", "norm2.norm",
    "ff_proj", "ff_out",
)  # fmt: skip
COMFYUI_OTHERS = (
    "patch_embed.proj", "patch_embed.text_proj", "time_embedding_linear_1", "time_embedding_linear_2",
    "ofs_embedding_linear_1", "ofs_embedding_linear_2", "norm_final", "norm_out.linear", "norm_out.norm", "proj_out",
)  # fmt: skip


def load_merged(folder):
    return CogVideoXTransformer3DModel.from_pretrained(folder, use_safetensors=True)


def merge_of(model_path, *loras, **options):
    loras = [WeightedLora(read_lora(path), weight) for path, weight in loras]
    return Merge(find_model(str(model_path)), loras, **options)


def merge(model_path, folder, *loras, shard_bytes=SHARD_BYTES, **options):
    save_merged(folder, merge_of(model_path, *loras, **options), {"image_latents": "pipeline"}, shard_bytes)
    return folder


@pytest.mark.parametrize("rank, alpha, targets", LORAS)
def test_the_output_equals_base_and_lora(tiny_model, tmp_path, rank, alpha, targets):
    lora = write_lora(tiny_model, tmp_path / "lora", rank, alpha, targets)
    merged = load_merged(merge(tiny_model, tmp_path / "merged", (lora, 1.0)))
    expected = output_in_diffusers(tiny_model, (lora, 1.0))
    assert (output(base_transformer(tiny_model)) - expected).abs().max() > 1e-2
    assert (output(merged) - expected).abs().max() < 1e-5


def test_several_weighted_loras_are_merged_into_several_shards(tiny_model, tmp_path):
    first = write_lora(tiny_model, tmp_path / "first")
    second = write_lora(tiny_model, tmp_path / "second", 2, 3.0, ("to_k", "ff.net.2"))
    folder = merge(tiny_model, tmp_path / "merged", (first, 0.7), (second, -0.5), shard_bytes=40_000)
    expected = output_in_diffusers(tiny_model, (first, 0.7), (second, -0.5))
    assert (output(load_merged(folder)) - expected).abs().max() < 1e-5
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in base_transformer(tiny_model).parameters())


def test_other_weights_stay_bit_identical(tiny_model, tmp_path):
    lora = write_lora(tiny_model, tmp_path / "lora", targets=("to_q",))
    merged, base = load_merged(merge(tiny_model, tmp_path / "m", (lora, 1.0))), base_transformer(tiny_model)
    weights = base.state_dict()
    changed = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, weights[name])}
    assert changed == {f"transformer_blocks.{block}.attn1.to_q.weight" for block in (0, 1)}


def test_the_sum_is_rounded_once(tiny_model, tmp_path):
    """The sum is computed in float32 and then rounded to bf16."""
    lora = write_lora(tiny_model, tmp_path / "lora")
    exact = load_merged(merge(tiny_model, tmp_path / "exact", (lora, 1.0))).state_dict()
    stored = load_file(
        merge(tiny_model, tmp_path / "bf16", (lora, 1.0), dtype=torch.bfloat16) / "diffusion_pytorch_model.safetensors"
    )
    assert all(torch.equal(value, exact[name].to(torch.bfloat16)) for name, value in stored.items())


@pytest.mark.parametrize("factor", [0.49, 0.7])
def test_the_image_latent_factor_is_folded_into_the_weights(tiny_model, tmp_path, factor):
    lora = write_lora(tiny_model, tmp_path / "lora")
    merged = load_merged(merge(tiny_model, tmp_path / "merged", (lora, 1.0), image_factor=factor))
    tuned = load_merged(merge(tiny_model, tmp_path / "plain", (lora, 1.0)))
    inputs = example_inputs()
    inputs["hidden_states"][:, :, 8:] *= factor
    with torch.no_grad():
        expected = tuned(**inputs)[0]
    assert (output(merged) - expected).abs().max() < 1e-5
    assert (output(tuned) - expected).abs().max() > 1e-3


def test_image_channels_of_a_convolution_are_scaled_too():
    """CogVideoX 1.0 has a convolution as its patch embedding."""
    conv, inputs = torch.nn.Conv2d(4, 3, 2, stride=2), torch.randn(1, 4, 4, 4)
    halved = inputs.clone()
    halved[:, 2:] *= 0.5
    expected = conv(halved)
    conv.weight.data = scale_image_channels(conv.weight.data, 4, 0.5)
    torch.testing.assert_close(conv(inputs), expected)


@pytest.mark.parametrize("copy", [True, False])
def test_the_other_parts_complete_the_pipeline(tiny_model, tmp_path, copy):
    model = find_model(str(tiny_model))
    merge(tiny_model, tmp_path / "whole/transformer", (write_lora(tiny_model, tmp_path / "lora"), 1.0))
    save_other_parts(tmp_path / "whole", model, copy)
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(tmp_path / "whole", use_safetensors=True)
    assert pipeline.vae.config.scaling_factor == 0.7
    assert (tmp_path / "whole/vae/config.json").is_symlink() is not copy
    find_model(str(tmp_path / "whole"))


def test_shards_keep_the_order_and_the_size_limit(tiny_model):
    weights = read_weights(find_model(str(tiny_model)))
    shards = split_shards(weights, 50_000)
    assert [weight for shard in shards for weight in shard] == weights
    assert all(sum(weight.num_bytes for weight in shard) <= 50_000 or len(shard) == 1 for shard in shards)
    assert len(split_shards(weights, 10**9)) == 1


def test_a_quantized_base_is_refused(tiny_model, tmp_path):
    model = find_model(str(tiny_model))
    (tmp_path / "transformer").mkdir()
    save_file({"proj_out.weight": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "transformer/x.safetensors")
    with pytest.raises(UserError, match="stored as I8"):
        read_weights(ModelFolder(tmp_path, model.transformer_config, model.vae_config, model.geometry))


def merge_for_comfyui(model_path, file, lora, **options):
    save_comfyui_merged(file, merge_of(model_path, (lora, 1.0), **options), {"image_latents": "scaled"})
    return load_file(file)


def test_comfyui_weights_are_merged_and_renamed(comfyui_model, tmp_path):
    lora = write_lora(comfyui_model, tmp_path / "lora", targets=("all-linear",))
    tensors = merge_for_comfyui(comfyui_model, tmp_path / "mine.safetensors", lora, image_factor=2.0)
    merged = load_merged(merge(comfyui_model, tmp_path / "merged", (lora, 1.0), image_factor=2.0)).state_dict()
    names = [f"blocks.{block}.{name}" for block in (0, 1) for name in COMFYUI_BLOCK]
    assert tensors.keys() == {f"{name}.{part}" for name in (*names, *COMFYUI_OTHERS) for part in ("weight", "bias")}
    for name, value in merged.items():
        for old, new in (*COMFYUI_RENAMES, (".attn1.norm_", ".norm_")):
            name = name.replace(old, new)
        assert torch.equal(tensors[name], value)
    with safe_open(tmp_path / "mine.safetensors", "pt") as file:
        assert json.loads(file.metadata()["cogds"]) == {"image_latents": "scaled"}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_tensors_in_a_comfyui_file_are_aligned(comfyui_model, tmp_path, dtype):
    """Every tensor starts at a multiple of its element size, as in safetensors' own files, which readers may map."""
    base = tmp_path / "model"
    shutil.copytree(comfyui_model, base)
    weights = base / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["a.bias"] = torch.ones(3, dtype=torch.bfloat16)  # 6 bytes, and first in the file
    save_file(tensors, weights, {"format": "pt"})
    lora = write_lora(comfyui_model, tmp_path / "lora")
    file = tmp_path / "mine.safetensors"
    stored = merge_for_comfyui(base, file, lora, dtype=dtype)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % value.itemsize == 0 for name, value in stored.items())
    for name in ("a.bias", "norm_final.weight", "patch_embed.proj.weight"):
        assert stored[name].dtype == (dtype or tensors[name].dtype)
        assert torch.equal(stored[name], tensors[name].to(stored[name].dtype))


def test_a_model_that_comfyui_does_not_support_is_refused(tiny_model, comfyui_model):
    check_comfyui_supports(find_model(str(comfyui_model)))
    with pytest.raises(UserError, match="attention_head_dim is 16"):
        check_comfyui_supports(find_model(str(tiny_model)))

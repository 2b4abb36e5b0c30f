"""The extra input channels for a control video: nothing at the start, and the same after export and loading."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn

from cogds.core.geometry import ClipShape
from cogds.core.rope import rotary_tables
from cogds.errors import UserError
from cogds.model.control import CONTROL_WEIGHT, add_control, control_of
from cogds.model.load import find_model, load_transformer
from cogds.model.lora.adapter import add_lora, check_initial_lora, export, inject
from cogds.model.lora.convert import check_control_fits, load_adapter, save_comfyui, save_diffusers
from cogds.model.lora.file import CONTROL_KEY, read_lora
from cogds.model.pipelines import load_pipeline

SHAPE = ClipShape(17, 64, 96)
LORA = (4, 8.0, 0.0, ("to_q", "to_v"), 0)


def inputs_of(model, num_extra):
    """Random inputs for a clip of SHAPE, with `num_extra` more channels that hold control latents."""
    numbers, geometry = torch.Generator().manual_seed(0), model.geometry
    channels = model.transformer_config["in_channels"] + num_extra
    frames = 6 if geometry.patch_size_t else 5
    return {
        "hidden_states": torch.randn(1, frames, channels, 8, 12, generator=numbers),
        "encoder_hidden_states": torch.randn(1, 32, 32, generator=numbers),
        "timestep": torch.tensor([500]),
        "ofs": torch.tensor([2.0]) if geometry.family.has_ofs else None,
        "image_rotary_emb": rotary_tables(SHAPE, geometry, torch.device("cpu")),
        "return_dict": False,
    }


def without_control(inputs, num_extra):
    return inputs | {"hidden_states": inputs["hidden_states"][:, :, :-num_extra]}


def trained(model):
    """A transformer with a LoRA and control weights that are not zero."""
    transformer = load_transformer(model, torch.float32)
    inject(transformer, *LORA)
    add_control(transformer, 8)
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=numbers))
    return transformer.eval()


def exported(transformer, folder):
    tensors = {name: value.detach() for name, value in transformer.named_parameters() if value.requires_grad}
    return export(folder, transformer, tensors, {"rank": 4})


@pytest.mark.parametrize("name", ["1.5-5b-i2v", "1.5-5b", "5b-i2v", "2b"])
def test_an_untrained_control_changes_nothing_and_a_trained_one_is_a_wider_patch_embedding(family, name):
    model = find_model(str(family(name)))
    inputs = inputs_of(model, 8)
    transformer = load_transformer(model, torch.float32)
    with torch.no_grad():
        base = transformer(**without_control(inputs, 8))[0]
    weight = add_control(transformer, 8)
    with torch.no_grad():
        assert torch.equal(transformer(**inputs)[0], base)
    transformer(**inputs)[0].square().mean().backward()
    assert weight.grad.abs().max() > 0
    torch.nn.init.normal_(weight, std=0.1)
    # The reference: diffusers' own class with more input channels.
    config = dict(model.transformer_config)
    wide = CogVideoXTransformer3DModel.from_config({**config, "in_channels": config["in_channels"] + 8})
    weights = {key: value for key, value in transformer.state_dict().items() if key != CONTROL_WEIGHT}
    proj = weights["patch_embed.proj.weight"]
    more = weight.detach().view(len(weight), 8, *proj.shape[2:]) if proj.ndim == 4 else weight.detach()
    weights["patch_embed.proj.weight"] = torch.cat([proj, more], 1)
    wide.load_state_dict(weights)
    with torch.no_grad():
        output = transformer(**inputs)[0]
        torch.testing.assert_close(output, wide(**inputs)[0], atol=1e-4, rtol=1e-4)
        control_of(transformer).scale = 0.0
        assert torch.equal(transformer(**inputs)[0], base)
    assert (output - base).abs().max() > 1e-2


def test_an_exported_control_gives_the_output_in_memory(tiny_model, tmp_path):
    model = find_model(str(tiny_model))
    transformer, inputs = trained(model), inputs_of(model, 8)
    file = read_lora(exported(transformer, tmp_path / "lora"))
    assert file.control == (32, 8 * 2 * 2 * 2)
    pipeline = load_pipeline(model, torch.float32)  # diffusers' own classes
    add_lora(pipeline.transformer, load_adapter(file), "lora0")
    with torch.no_grad():
        expected, output = transformer(**inputs)[0], pipeline.transformer(**inputs)[0]
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    # Converted again, also at half its strength.
    save_diffusers(load_adapter(file, 0.5), tmp_path)
    again = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert torch.equal(again[CONTROL_KEY], 0.5 * load_file(file.path)[CONTROL_KEY])


def test_diffusers_loads_the_lora_of_a_file_with_a_control(tiny_model, tmp_path):
    model = find_model(str(tiny_model))
    transformer, inputs = trained(model), without_control(inputs_of(model, 8), 8)
    path, pipeline = exported(transformer, tmp_path / "lora"), load_pipeline(model, torch.float32)
    pipeline.load_lora_weights(path)
    # Without the control, the transformer in memory is the LoRA alone.
    plain = load_transformer(model, torch.float32)
    tensors = load_file(path)
    del tensors[CONTROL_KEY]
    (tmp_path / "plain").mkdir()
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        save_file(tensors, tmp_path / "plain/pytorch_lora_weights.safetensors", opened.metadata())
    add_lora(plain, load_adapter(read_lora(tmp_path / "plain")))
    with torch.no_grad():
        expected, output = plain.eval()(**inputs)[0], pipeline.transformer(**inputs)[0]
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_a_control_of_another_model_or_format_is_refused(tiny_model, tmp_path):
    model = find_model(str(tiny_model))
    path = exported(trained(model), tmp_path / "lora")
    tensors = load_file(path)
    tensors[CONTROL_KEY] = torch.zeros(32, 7)
    save_file(tensors, path)
    with pytest.raises(UserError, match="is 32x7, not 32x64"):
        check_control_fits(read_lora(path), model)
    with pytest.raises(UserError, match="control video"):
        save_comfyui(load_adapter(read_lora(path)), tmp_path / "x.safetensors")


def test_the_control_weight_is_no_target_of_a_lora(tiny_model):
    transformer = load_transformer(find_model(str(tiny_model)), torch.float32)
    inject(transformer, 4, 8.0, 0.0, ("all-linear",), 0)
    add_control(transformer, 8)
    assert isinstance(transformer.patch_embed.proj.base_layer, nn.Linear)
    names = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    assert CONTROL_WEIGHT in names


def test_an_initial_lora_with_the_control_of_another_model_is_refused(family, tmp_path):
    """The models have the same attention layers."""
    models = {name: trained(find_model(str(family(name)))) for name in ("5b-i2v", "1.5-5b-i2v")}
    own, other = (read_lora(exported(model, tmp_path / name)) for name, model in models.items())
    check_initial_lora(models["5b-i2v"], own)
    with pytest.raises(UserError, match=r"^lora\.init_from: .* control weight of shape \(32, 64\), but .* \(32, 32\)"):
        check_initial_lora(models["5b-i2v"], other)

"""A LoRA converted to the formats of other tools has the same effect there as in diffusers, and can be read back."""

import json

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogds.errors import UserError
from cogds.model.load import empty_transformer, find_model
from cogds.model.lora.adapter import export, inject
from cogds.model.lora.convert import check_fits, load_adapter, save_comfyui, save_comfyui_wrapper, save_diffusers
from cogds.model.lora.file import read_lora
from tests.model.lora.adapters import (
    ATTENTION,
    base_transformer,
    load,
    output,
    output_in_diffusers,
    randomize,
    trainable,
    write_lora,
)

# Rank, alpha and layers of LoRAs with strengths 2, 1.5 and 1/4.
LORAS = [(4, 8.0, ATTENTION), (3, 4.5, ("to_q", "ff.net.2")), (4, 1.0, ("all-linear",))]
# Replacements that turn names of diffusers' weights into those of ComfyUI's class, applied in this order.
COMFYUI_RENAMES = [
    ("time_embedding.linear_", "time_embedding_linear_"), ("ofs_embedding.linear_", "ofs_embedding_linear_"),
    ("transformer_blocks.", "blocks."), (".attn1.to_q.", ".q."), (".attn1.to_k.", ".k."), (".attn1.to_v.", ".v."),
    (".attn1.to_out.0.", ".attn_out."), (".ff.net.0.proj.", ".ff_proj."), (".ff.net.2.", ".ff_out."),
]  # fmt: skip


def apply_like_comfyui(file, transformer):
    """Add alpha/rank (or 1 without alpha) times up x down to each weight, as ComfyUI's loader does."""
    tensors, used = load_file(file), set()
    for key, weight in transformer.state_dict().items():
        for old, new in COMFYUI_RENAMES:
            key = key.replace(old, new)
        name = "diffusion_model." + key.removesuffix(".weight")
        if f"{name}.lora_up.weight" in tensors:
            up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
            scale = tensors[f"{name}.alpha"].item() / down.shape[0] if f"{name}.alpha" in tensors else 1.0
            weight += scale * (up.float() @ down.float())
            used |= {f"{name}.lora_up.weight", f"{name}.lora_down.weight", f"{name}.alpha"}
    assert used == set(tensors)  # ComfyUI ignores other tensors with a warning
    return transformer


def apply_like_wrapper(file, transformer):
    """Add up x down to each weight, as the wrapper does with an old diffusers, which ignores the header."""
    weights = transformer.state_dict()
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    layers = {name.removesuffix(".lora_B.weight") for name in tensors if name.endswith(".lora_B.weight")}
    for layer in layers:
        weights[f"{layer}.weight"] += tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
    assert 2 * len(layers) == len(tensors)
    return transformer


@pytest.mark.parametrize("rank, alpha, targets", LORAS)
def test_every_format_equals_diffusers(tiny_model, tmp_path, rank, alpha, targets):
    lora = write_lora(tiny_model, tmp_path / "lora", rank, alpha, targets, {"image_latents": "scaled"})
    expected, base = output_in_diffusers(tiny_model, (lora, 1.0)), output(base_transformer(tiny_model))
    assert (expected - base).abs().max() > 1e-2
    adapter = load_adapter(read_lora(lora))
    save_comfyui(adapter, tmp_path / "comfyui.safetensors")
    save_comfyui_wrapper(adapter, tmp_path / "wrapper.safetensors")
    (tmp_path / "diffusers").mkdir()
    save_diffusers(adapter, tmp_path / "diffusers")
    outputs = {
        "comfyui": output(apply_like_comfyui(tmp_path / "comfyui.safetensors", base_transformer(tiny_model))),
        "wrapper": output(apply_like_wrapper(tmp_path / "wrapper.safetensors", base_transformer(tiny_model))),
        "wrapper in diffusers": output_in_diffusers(tiny_model, (tmp_path / "wrapper.safetensors", 1.0)),
        "diffusers": output_in_diffusers(tiny_model, (tmp_path / "diffusers", 1.0)),
    }
    # Merging rounds in another order, which changes the last bits.
    differences = {name: (converted - expected).abs().max().item() for name, converted in outputs.items()}
    assert max(differences.values()) < 1e-5, differences
    for file in ("comfyui.safetensors", "wrapper.safetensors", "diffusers/pytorch_lora_weights.safetensors"):
        again = load_adapter(read_lora(tmp_path / file))
        assert again.metadata == {"image_latents": "scaled"}
        assert again.layers.keys() == adapter.layers.keys()
        for name, layer in adapter.layers.items():
            assert torch.equal(again.layers[name].a, layer.a)
            if "wrapper" in file:
                assert torch.equal(again.layers[name].b, layer.b * layer.scale)
            else:
                assert torch.equal(again.layers[name].b, layer.b)
                assert again.layers[name].scale == pytest.approx(layer.scale, rel=1e-6)


def test_every_layer_keeps_its_own_strength_and_rank(tiny_model, tmp_path):
    """From PEFT's patterns and rank-stabilized scaling."""
    model = get_peft_model(
        base_transformer(tiny_model),
        LoraConfig(
            r=4, lora_alpha=6, target_modules=list(ATTENTION), use_rslora=True, alpha_pattern={"to_q": 1},
            rank_pattern={r"transformer_blocks\.1\.attn1\.to_k": 2},
        ),
    )  # fmt: skip
    randomize([parameter for parameter in model.parameters() if parameter.requires_grad])
    model.save_pretrained(tmp_path / "peft")
    expected = output(model)
    save_diffusers(load_adapter(read_lora(tmp_path / "peft")), tmp_path)
    assert (output_in_diffusers(tiny_model, (tmp_path, 1.0)) - expected).abs().max() < 1e-5
    assert read_lora(tmp_path / "pytorch_lora_weights.safetensors").ranks == [2, 4]


class OldLoraConfig(LoraConfig):
    """LoraConfig of an old PEFT, without newer fields."""

    def __init__(self, r, lora_alpha, target_modules, rank_pattern, alpha_pattern):
        super().__init__(
            r=r, lora_alpha=lora_alpha, target_modules=target_modules, rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
        )  # fmt: skip


def test_an_old_peft_knows_every_field_of_the_header(tiny_model, tmp_path, monkeypatch):
    """diffusers passes the header's fields to LoraConfig, which raises TypeError for an unknown one."""
    lora = write_lora(tiny_model, tmp_path / "lora", 4, 6.0)
    adapter = load_adapter(read_lora(lora))
    for file in (lora / "pytorch_lora_weights.safetensors", save_diffusers(adapter, tmp_path)):
        with safe_open(file, "pt") as tensors:
            fields = json.loads(tensors.metadata()["lora_adapter_metadata"])
        names = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
        assert fields.keys() == {f"transformer.{name}" for name in names}
        expected = output_in_diffusers(tiny_model, (file, 1.0))
        with monkeypatch.context() as patch:
            patch.setattr("peft.LoraConfig", OldLoraConfig)
            assert torch.equal(output_in_diffusers(tiny_model, (file, 1.0)), expected)
    save_comfyui_wrapper(adapter, tmp_path / "wrapper.safetensors")
    with safe_open(tmp_path / "wrapper.safetensors", "pt") as tensors:
        assert "lora_adapter_metadata" not in tensors.metadata()


def test_a_scale_changes_alpha_but_no_weights(tiny_model, tmp_path):
    lora = write_lora(tiny_model, tmp_path / "lora")
    save_diffusers(load_adapter(read_lora(lora), 0.5), tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as tensors:
        assert json.loads(tensors.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 4
    before, after = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (lora, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)
    half = output_in_diffusers(tiny_model, (lora, 0.5))
    assert (output_in_diffusers(tiny_model, (tmp_path, 1.0)) - half).abs().max() < 1e-6


@pytest.mark.parametrize("save", [save_diffusers, save_comfyui, save_comfyui_wrapper])
def test_a_negative_scale_can_be_read_back(tiny_model, tmp_path, save):
    lora = write_lora(tiny_model, tmp_path / "lora")
    file = tmp_path / "x.safetensors"
    file = save(load_adapter(read_lora(lora), -0.5), tmp_path if save is save_diffusers else file) or file
    again, before = load_adapter(read_lora(file)), load_adapter(read_lora(lora))
    for name, layer in again.layers.items():
        expected = -0.5 * before.layers[name].scale * before.layers[name].b
        torch.testing.assert_close(layer.scale * layer.b, expected, atol=0, rtol=1e-6)
        assert layer.scale > 0
    if save is not save_comfyui:
        expected = output_in_diffusers(tiny_model, (lora, -0.5))
        assert (output_in_diffusers(tiny_model, (file, 1.0)) - expected).abs().max() < 1e-5


def test_the_layer_that_does_not_fit_is_named(tiny_model, tmp_path):
    file = read_lora(write_lora(tiny_model, tmp_path / "lora"))
    weights = empty_transformer(find_model(str(tiny_model))).named_parameters()
    shapes = {name: tuple(weight.shape) for name, weight in weights}
    check_fits(file, shapes, tiny_model)
    layer = "transformer_blocks.1.attn1.to_q"
    with pytest.raises(UserError, match=rf"layer {layer} is 32x32 in the LoRA and is 64x32"):
        check_fits(file, {**shapes, f"{layer}.weight": (64, 32)}, tiny_model)
    del shapes[f"{layer}.weight"]
    with pytest.raises(UserError, match=rf"layer {layer} is 32x32 in the LoRA and is missing"):
        check_fits(file, shapes, tiny_model)


def test_values_that_are_not_finite_are_refused(tiny_model, tmp_path):
    adapter = load_adapter(read_lora(write_lora(tiny_model, tmp_path / "lora")))
    adapter.layers["transformer_blocks.0.attn1.to_q"].b[0, 0] = float("nan")
    save_diffusers(adapter, tmp_path)
    with pytest.raises(UserError, match="not finite"):
        load_adapter(read_lora(tmp_path / "pytorch_lora_weights.safetensors"))


def test_a_file_with_unknown_names_is_refused(tmp_path):
    save_file({"diffusion_model.blocks.0.q.hada_w1_a": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"'diffusion_model.blocks.0.q.hada_w1_a'"):
        read_lora(tmp_path / "x.safetensors")


def test_dropout_is_not_exported(tiny_model, tmp_path):
    """diffusers would add it to the pipeline's transformer and leave it enabled."""
    transformer = load(tiny_model)
    randomize(inject(transformer, 4, 8.0, 0.5, ATTENTION, seed=0))
    file = export(tmp_path, transformer, trainable(transformer), {})
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(file)
    torch.testing.assert_close(output(pipeline.transformer), output(transformer.eval()), atol=1e-5, rtol=0)

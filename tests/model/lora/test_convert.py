"""A LoRA in other tools' formats does there what it does in diffusers, and comes back the same."""

import json

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogds.errors import UserError
from cogds.model.load import empty_transformer, find_model, load_transformer
from cogds.model.lora.adapter import export, inject
from cogds.model.lora.convert import check_fits, load_adapter, save_comfyui, save_comfyui_wrapper, save_diffusers
from cogds.model.lora.file import read_lora
from tests.model.lora.adapters import base_transformer, output, output_in_diffusers, write_lora
from tests.model.lora.test_adapter import ATTENTION, randomize

# rank, alpha, layers: alpha/rank of 2, of 1.5 and of 1/4, all of them in one.
KINDS = [(4, 8.0, ATTENTION), (3, 4.5, ("to_q", "ff.net.2")), (4, 1.0, ("all-linear",))]
# As ComfyUI turns the names of diffusers' weights into those of its own class, one after another.
COMFYUI_RENAMES = [
    ("time_embedding.linear_", "time_embedding_linear_"), ("ofs_embedding.linear_", "ofs_embedding_linear_"),
    ("transformer_blocks.", "blocks."), (".attn1.to_q.", ".q."), (".attn1.to_k.", ".k."), (".attn1.to_v.", ".v."),
    (".attn1.to_out.0.", ".attn_out."), (".ff.net.0.proj.", ".ff_proj."), (".ff.net.2.", ".ff_out."),
]  # fmt: skip


def as_comfyui_does(file, transformer):
    """ComfyUI's loader by its rules: a weight takes alpha/rank times up x down, 1 where there is no alpha."""
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
    assert used == set(tensors)  # it only warns of the others
    return transformer


def as_the_wrapper_does(file, transformer):
    """The wrapper with an old diffusers: its names, no header read, alpha = rank."""
    weights = transformer.state_dict()
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    layers = {name.removesuffix(".lora_B.weight") for name in tensors if name.endswith(".lora_B.weight")}
    for layer in layers:
        weights[f"{layer}.weight"] += tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
    assert 2 * len(layers) == len(tensors)
    return transformer


@pytest.mark.parametrize("rank, alpha, targets", KINDS)
def test_every_format_does_what_diffusers_does(tiny_model, tmp_path, rank, alpha, targets):
    lora = write_lora(tiny_model, tmp_path / "lora", rank, alpha, targets, {"image_latents": "scaled"})
    expected, base = output_in_diffusers(tiny_model, (lora, 1.0)), output(base_transformer(tiny_model))
    assert (expected - base).abs().max() > 1e-2
    adapter = load_adapter(read_lora(lora))
    save_comfyui(adapter, tmp_path / "comfyui.safetensors")
    save_comfyui_wrapper(adapter, tmp_path / "wrapper.safetensors")
    (tmp_path / "diffusers").mkdir()
    save_diffusers(adapter, tmp_path / "diffusers")
    outputs = {
        "comfyui": output(as_comfyui_does(tmp_path / "comfyui.safetensors", base_transformer(tiny_model))),
        "wrapper": output(as_the_wrapper_does(tmp_path / "wrapper.safetensors", base_transformer(tiny_model))),
        "wrapper in diffusers": output_in_diffusers(tiny_model, (tmp_path / "wrapper.safetensors", 1.0)),
        "diffusers": output_in_diffusers(tiny_model, (tmp_path / "diffusers", 1.0)),
    }
    # Merged or added, a product is rounded in another order: float32's last bits.
    assert {name: (one - expected).abs().max().item() < 1e-5 for name, one in outputs.items()} == dict.fromkeys(
        outputs, True
    )
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


def test_layers_of_other_strengths_and_ranks_are_named(tiny_model, tmp_path):
    """PEFT's patterns, rank-stabilised too: every layer keeps its own strength."""
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
    """PEFT's of a version that knows no fields but the oldest."""

    def __init__(self, r, lora_alpha, target_modules, rank_pattern, alpha_pattern):
        super().__init__(
            r=r, lora_alpha=lora_alpha, target_modules=target_modules, rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
        )  # fmt: skip


def test_an_older_peft_knows_every_field_of_the_header(tiny_model, tmp_path, monkeypatch):
    """diffusers calls LoraConfig with the header's fields, and a field that it does not know is a TypeError."""
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


def test_a_scale_changes_alpha_and_no_weight(tiny_model, tmp_path):
    lora = write_lora(tiny_model, tmp_path / "lora")
    save_diffusers(load_adapter(read_lora(lora), 0.5), tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as tensors:
        assert json.loads(tensors.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 4
    before, after = (load_file(one / "pytorch_lora_weights.safetensors") for one in (lora, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)
    half = output_in_diffusers(tiny_model, (lora, 0.5))
    assert (output_in_diffusers(tiny_model, (tmp_path, 1.0)) - half).abs().max() < 1e-6


@pytest.mark.parametrize("save", [save_diffusers, save_comfyui, save_comfyui_wrapper])
def test_a_negative_scale_can_be_read_again(tiny_model, tmp_path, save):
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


def test_another_models_lora_is_refused_by_layer(tiny_model, tmp_path):
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


def test_a_file_with_names_of_neither_is_refused(tmp_path):
    save_file({"diffusion_model.blocks.0.q.hada_w1_a": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"'diffusion_model.blocks.0.q.hada_w1_a'"):
        read_lora(tmp_path / "x.safetensors")


def test_a_lora_that_was_trained_with_dropout_has_none_where_it_is_used(tiny_model, tmp_path):
    """diffusers would put it into the pipeline's transformer, and nothing would switch it off."""
    transformer = load_transformer(find_model(str(tiny_model)), torch.float32)
    randomize(inject(transformer, 4, 8.0, 0.5, ATTENTION, seed=0))
    tensors = {name: one.detach() for name, one in transformer.named_parameters() if one.requires_grad}
    file = export(tmp_path, transformer, tensors, {})
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(file)
    torch.testing.assert_close(output(pipeline.transformer), output(transformer.eval()), atol=1e-5, rtol=0)

"""A run that starts from a LoRA: step 0 equals the LoRA in its own loader."""

import dataclasses
import json

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from cogds.errors import UserError
from cogds.model.load import empty_transformer, find_model
from cogds.model.lora.adapter import (
    check_initial_lora,
    describe_initial_lora,
    export,
    inject,
    linear_layers,
    load_initial_lora,
    resolve_targets,
    shortest_targets,
)
from cogds.model.lora.file import read_lora
from tests.model.lora.adapters import ATTENTION, example_inputs, load, output, randomize, trainable, write_lora

RANK = 4
DIFFUSERS, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"


@pytest.fixture
def save(tiny_model, tmp_path):
    """`save(format, **settings)`: the folder of a LoRA with random weights in a format."""

    def write(kind, rank=RANK, targets=ATTENTION, **settings):
        folder = tmp_path / kind
        if kind == "cogds":
            alpha = settings.get("lora_alpha", rank)
            return write_lora(tiny_model, folder, rank, alpha, targets, {"image_latents": "scaled"})
        transformer = load(tiny_model)
        if kind == "no alpha":
            randomize(inject(transformer, rank, settings.get("lora_alpha", rank), 0.0, targets, seed=0))
            state = get_peft_model_state_dict(transformer)
            CogVideoXImageToVideoPipeline.save_lora_weights(folder, transformer_lora_layers=state)
            return folder
        model = get_peft_model(transformer, LoraConfig(r=rank, target_modules=list(targets), **settings))
        randomize([parameter for parameter in model.parameters() if parameter.requires_grad])
        model.save_pretrained(folder)
        return folder

    return write


def start(transformer, path, alpha=RANK, targets=ATTENTION):
    inject(transformer, RANK, alpha, 0.0, targets, seed=1)
    load_initial_lora(transformer, read_lora(path))
    return transformer


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("no alpha", {"lora_alpha": 8}),
        ("peft", {"lora_alpha": 8, "use_rslora": True}),
        ("peft", {"lora_alpha": 8, "alpha_pattern": {"to_q": 1, r"transformer_blocks\.1\.attn1\.to_k": 16}}),
    ],
)
@pytest.mark.parametrize("alpha", [4, 0.7])
def test_step_0_equals_the_original_loader(tiny_model, save, kind, settings, alpha):
    """For any `lora.alpha` of the run. test_formats.py covers the other formats."""
    folder, original = save(kind, **settings), load(tiny_model)
    base = output(original)
    if kind == "peft":
        original = PeftModel.from_pretrained(original, folder)
    else:
        pipeline = CogVideoXImageToVideoPipeline.from_pretrained(tiny_model, transformer=original)
        pipeline.load_lora_weights(folder)
    expected = output(original)
    assert (expected - base).abs().max() > 1e-2
    assert (output(start(load(tiny_model), folder, alpha)) - expected).abs().max() < 1e-6


def test_a_round_trip_is_exact(tiny_model, save, tmp_path):
    folder = save("cogds", lora_alpha=8, targets=("all-linear",))
    transformer = start(load(tiny_model), folder, alpha=8, targets=("all-linear",))
    before = load_file(folder / DIFFUSERS)
    after = load_file(export(tmp_path / "again", transformer, trainable(transformer), {}))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_continues(tiny_model, save):
    transformer = start(load(tiny_model), save("cogds"))
    transformer(**example_inputs())[0].square().mean().backward()
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert len(parameters) == 16
    assert all(parameter.grad.abs().max() > 0 for parameter in parameters)


def test_the_description_names_strength_and_source(save):
    lines = describe_initial_lora(read_lora(save("cogds", lora_alpha=8)), "pipeline")
    assert "8 layers, rank 4, strength 2 (alpha from the file)" in lines[0]
    assert "conditioning.image_latents=scaled" in lines[1]
    assert "pipeline" in lines[1]
    file = save("no alpha")
    lines = describe_initial_lora(read_lora(file), "pipeline")
    assert "rank 4, strength 1 (" in lines[0]
    assert "lora.init_alpha" in lines[1]
    (line,) = describe_initial_lora(read_lora(file, 2), "pipeline")
    assert "strength 0.5 (alpha from the user)" in line
    text = dataclasses.replace(read_lora(file, 2), metadata={"task": "text-to-video"})
    assert len(describe_initial_lora(text, "pipeline", "text-to-video")) == 1
    assert "was trained for text-to-video" in describe_initial_lora(text, "pipeline", "image-to-video")[1]


@pytest.mark.parametrize(
    "saved, targets, message",
    [
        ({"rank": 8}, ATTENTION, r"lora\.init_from: .*rank 8 on 8 layers .*rank 4 on 8 layers .* lora\.rank=8\.$"),
        (
            {"targets": ("to_q", "to_out.0")},
            ATTENTION,
            r"rank 4 on 4 layers \(to_out\.0, to_q\), .*rank 4 on 8 layers \(to_k, to_out\.0, to_q, to_v\)\. .*"
            r"'lora\.target_modules=\[to_out\.0,to_q\]'\.$",
        ),
        ({"targets": ("all-linear",)}, ("to_q",), r" 'lora\.target_modules=\[all-linear\]'\.$"),
        ({"rank": 2, "targets": ("to_q",)}, ("to_k",), r" lora\.rank=2 'lora\.target_modules=\[to_q\]'\."),
        ({}, ATTENTION, None),
    ],
)
def test_different_ranks_or_layers_are_refused_before_weights_are_loaded(tiny_model, save, saved, targets, message):
    """The message names the settings to change."""
    transformer = empty_transformer(find_model(str(tiny_model)))
    inject(transformer, RANK, RANK, 0.0, targets, seed=0)
    file = read_lora(save("cogds", **saved))
    if message is None:
        check_initial_lora(transformer, file)
        return
    with pytest.raises(UserError, match=message):
        check_initial_lora(transformer, file)


def rewrite(file, change):
    """Change the tensors of a file. change: modifies a dict, given its first names of A and B."""
    tensors = load_file(file)
    change(tensors, *(next(name for name in tensors if f"lora_{half}" in name) for half in "AB"))
    save_file(tensors, file)


def rename(tensors, old, new):
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, a, _: t.update({a: torch.zeros(RANK, 33)}), "layer .* is 32x33 in the LoRA and is 32x32"),
        (lambda t, *_: rename(t, "blocks.0", "blocks.7"), r"layer transformer_blocks\.7.* is missing"),
        (lambda t, a, b: t.update({a: torch.zeros(2, 32), b: torch.zeros(32, 2)}), "lora.init_from: .* 2, 4"),
        (lambda t, _, b: t[b].fill_(torch.nan), "not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tiny_model, save, change, message):
    folder = save("no alpha")
    rewrite(folder / DIFFUSERS, change)
    with pytest.raises(UserError, match=message):
        start(load(tiny_model), folder)


@pytest.mark.parametrize(
    "targets", [ATTENTION, ("all-linear",), ("to_out.0",), ("0.attn1.to_q", "proj"), ("proj_out",)]
)
def test_targets_are_recovered_from_their_layers(tiny_model, targets):
    transformer = load(tiny_model)
    linears = list(linear_layers(transformer))
    layers = resolve_targets(transformer, targets)
    assert set(resolve_targets(transformer, shortest_targets(layers, linears))) == set(layers)
    inject(transformer, RANK, RANK, 0.0, targets, seed=0)
    assert list(linear_layers(transformer)) == linears


def test_peft_without_its_config_is_refused(save):
    folder = save("peft")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read_lora(folder / PEFT)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_dora": True}, " DoRA"),
        ({"lora_bias": True}, "has biases"),
        ({"bias": "lora_only"}, "has biases"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save="),
        ({"peft_type": "LOKR"}, "LOKR"),
        ({"lora_alpha": "much"}, "lora_alpha.*much"),
    ],
)
def test_other_adapters_are_refused(save, settings, message):
    folder = save("peft")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(UserError, match=message):
        read_lora(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, a, _: t.update({a.replace("lora_A.weight", "dora_scale"): torch.ones(1)}), " DoRA"),
        (lambda t, _, b: t.update({b.replace(".weight", ".bias"): torch.ones(1)}), "has biases"),
        (lambda t, *_: t.update({"text_encoder.x.lora_A.weight": torch.ones(1)}), "1 of its 17 tensors .*'text_encode"),
        (lambda t, a, _: t.pop(a), r"layer .*A has shape none"),
        (lambda t, a, _: t.update({a: torch.zeros(0)}), r"layer .*A has shape \(0,\)"),
        (lambda t, *_: t.clear(), "no tensors"),
        (lambda t, *_: rename(t, "lora_", ""), "16 of its 16 tensors"),
    ],
)
def test_damaged_and_unrelated_files_are_refused(save, change, message):
    folder = save("no alpha")
    rewrite(folder / DIFFUSERS, change)
    with pytest.raises(UserError, match=message):
        read_lora(folder)


def test_a_folder_of_two_loras_is_refused(save):
    folder = save("cogds")
    (save("peft") / PEFT).rename(folder / PEFT)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors, pytorch_lora_weights\.safetensors"):
        read_lora(folder)
    assert read_lora(folder / DIFFUSERS).ranks == [RANK]

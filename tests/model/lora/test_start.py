"""A run that starts from a LoRA: at step 0 it is what the file's own loader makes of the file."""

import json

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from cogds.errors import UserError
from cogds.model.load import empty_transformer, find_model, load_transformer
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
from tests.model.lora.test_adapter import ATTENTION, example_inputs, randomize

RANK = 4
DIFFUSERS, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"


@pytest.fixture
def fresh(tiny_model):
    """Makes a transformer of the tiny model, always the same."""
    return lambda: load_transformer(find_model(str(tiny_model)), torch.float32)


@pytest.fixture
def save(fresh, tmp_path):
    """Writes a LoRA with random weights in one of the formats; returns its folder."""

    def write(kind, rank=RANK, targets=ATTENTION, **settings):
        folder, transformer = tmp_path / kind, fresh()
        if kind == "peft":
            model = get_peft_model(transformer, LoraConfig(r=rank, target_modules=list(targets), **settings))
            randomize([parameter for parameter in model.parameters() if parameter.requires_grad])
            model.save_pretrained(folder)
            return folder
        randomize(inject(transformer, rank, settings.get("lora_alpha", rank), 0.0, targets, seed=0))
        tensors = {name: p.detach() for name, p in transformer.named_parameters() if p.requires_grad}
        state = get_peft_model_state_dict(transformer, tensors)
        if kind == "ours":
            export(folder, transformer, tensors, {"image_latents": "scaled"})
        elif kind == "no alpha":
            CogVideoXImageToVideoPipeline.save_lora_weights(folder, transformer_lora_layers=state)
        elif kind == "old":
            names = {"lora_A": "lora.down", "lora_B": "lora.up"}
            old = {
                key.replace(half, names[half]): value for key, value in state.items() for half in names if half in key
            }
            CogVideoXImageToVideoPipeline.save_lora_weights(folder, transformer_lora_layers=old)
        else:
            transformer.save_lora_adapter(folder, adapter_name="default")
        return folder

    return write


def as_its_loader_does(kind, folder, transformer, tiny_model):
    """The transformer's output after the loader of the format itself."""
    if kind == "peft":
        transformer = PeftModel.from_pretrained(transformer, folder)
    elif kind == "adapter":
        transformer.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    else:
        pipeline = CogVideoXImageToVideoPipeline.from_pretrained(tiny_model, transformer=transformer)
        pipeline.load_lora_weights(folder)
    return output(transformer)


@torch.no_grad()
def output(transformer):
    return transformer(**example_inputs())[0]


def started(transformer, path, rank=RANK, alpha=RANK, targets=ATTENTION):
    inject(transformer, rank, alpha, 0.0, targets, seed=1)
    load_initial_lora(transformer, read_lora(path))
    return transformer


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("ours", {"lora_alpha": 8}),
        ("no alpha", {"lora_alpha": 8}),
        ("old", {}),
        ("adapter", {"lora_alpha": 3}),
        ("peft", {"lora_alpha": 8}),
        ("peft", {"lora_alpha": 8, "use_rslora": True}),
        ("peft", {"lora_alpha": 8, "alpha_pattern": {"to_q": 1, r"transformer_blocks\.1\.attn1\.to_k": 16}}),
    ],
)
@pytest.mark.parametrize("alpha", [4, 8, 0.7])
def test_step_0_is_what_the_files_own_loader_makes_of_it(fresh, save, tiny_model, kind, settings, alpha):
    folder = save(kind, **settings)
    expected, base = as_its_loader_does(kind, folder, fresh(), tiny_model), output(fresh())
    assert (expected - base).abs().max() > 1e-2
    assert (output(started(fresh(), folder, alpha=alpha)) - expected).abs().max() < 1e-6


def test_a_round_trip_changes_no_bit(fresh, save, tmp_path):
    folder = save("ours", lora_alpha=8, targets=("all-linear",))
    transformer = started(fresh(), folder, alpha=8, targets=("all-linear",))
    tensors = {name: p.detach() for name, p in transformer.named_parameters() if p.requires_grad}
    before, after = load_file(folder / DIFFUSERS), load_file(export(tmp_path / "again", transformer, tensors, {}))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_goes_on_training(fresh, save):
    transformer = started(fresh(), save("ours"))
    output_of = transformer(**example_inputs())[0]
    output_of.square().mean().backward()
    trained = [p for p in transformer.parameters() if p.requires_grad]
    assert len(trained) == 16
    assert all(parameter.grad.abs().max() > 0 for parameter in trained)


def test_the_description_names_strength_and_source(save):
    told = describe_initial_lora(read_lora(save("ours", lora_alpha=8)), "pipeline")
    assert "8 layers, rank 4, strength 2 (alpha from the file)" in told[0]
    assert "conditioning.image_latents=scaled" in told[1]
    assert "pipeline" in told[1]
    told = describe_initial_lora(read_lora(save("no alpha")), "pipeline")
    assert "rank 4, strength 1 (" in told[0]
    assert "lora.init_alpha" in told[1]
    (told,) = describe_initial_lora(read_lora(save("no alpha"), 2), "pipeline")
    assert "strength 0.5 (alpha from the user)" in told


def rewrite(folder, change, name=DIFFUSERS):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def first(tensors, half="lora_A"):
    return next(name for name in tensors if half in name)


@pytest.mark.parametrize(
    "saved, run, message",
    [
        ({"rank": 8}, {}, r"lora\.init_from: .*rank 8 on 8 layers .*rank 4 on 8 layers .* lora\.rank=8\.$"),
        (
            {"targets": ("to_q", "to_out.0")},
            {},
            r"rank 4 on 4 layers \(to_out\.0, to_q\), .*rank 4 on 8 layers \(to_k, to_out\.0, to_q, to_v\)\. .*"
            r"'lora\.target_modules=\[to_out\.0,to_q\]'\.$",
        ),
        ({"targets": ("all-linear",)}, {"targets": ("to_q",)}, r" 'lora\.target_modules=\[all-linear\]'\.$"),
        (
            {"rank": 2, "targets": ("to_q",)},
            {"targets": ("to_k",)},
            r" lora\.rank=2 'lora\.target_modules=\[to_q\]'\.",
        ),
    ],
)
def test_another_rank_or_other_layers_are_named_and_so_is_what_to_set(tiny_model, save, saved, run, message):
    transformer = empty_transformer(find_model(str(tiny_model)))
    inject(transformer, RANK, RANK, 0.0, run.get("targets", ATTENTION), seed=0)
    with pytest.raises(UserError, match=message):
        check_initial_lora(transformer, read_lora(save("ours", **saved)))


def test_a_file_that_fits_is_known_before_any_weight_is_loaded(tiny_model, save):
    transformer = empty_transformer(find_model(str(tiny_model)))
    inject(transformer, RANK, RANK, 0.0, ATTENTION, seed=0)
    check_initial_lora(transformer, read_lora(save("ours")))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.update({first(t): torch.zeros(RANK, 33)}),
            "layer .* is 32x33 in the LoRA and is 32x32",
        ),
        (
            lambda t: t.update({first(t).replace(".0.", ".7."): t.pop(first(t)), "x": torch.zeros(1)}),
            "1 of its 17 tensors .*'x'",
        ),
        (
            lambda t: [t.update({name.replace("blocks.0", "blocks.7"): t.pop(name)}) for name in list(t)],
            r"layer transformer_blocks\.7.* is missing",
        ),
        (
            lambda t: t.update({first(t): torch.zeros(2, 32), first(t, "lora_B"): torch.zeros(32, 2)}),
            "lora.init_from: .* 2, 4",
        ),
        (lambda t: t[first(t, "lora_B")].fill_(torch.nan), "not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(fresh, save, change, message):
    folder = save("no alpha")
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        started(fresh(), folder)


@pytest.mark.parametrize(
    "targets", [ATTENTION, ("all-linear",), ("to_out.0",), ("0.attn1.to_q", "proj"), ("proj_out",)]
)
def test_targets_are_found_again_from_their_layers(fresh, targets):
    transformer = fresh()
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
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json: "):
        read_lora(folder)


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
def test_what_is_more_than_a_lora_is_refused(save, settings, message):
    folder = save("peft")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(UserError, match=message):
        read_lora(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update({"transformer.transformer_blocks.0.attn1.to_q.dora_scale": torch.ones(1)}), " DoRA"),
        (lambda t: t.update({"transformer.transformer_blocks.0.attn1.to_q.lora_B.bias": torch.ones(1)}), "has biases"),
        (
            lambda t: t.update({"text_encoder.x.lora_A.weight": torch.ones(1)}),
            "1 of its 17 tensors .*'text_encoder",
        ),
        (lambda t: t.pop(first(t)), r"layer .*A has shape none"),
        (lambda t: t.update({first(t): torch.zeros(0)}), r"layer .*A has shape \(0,\)"),
        (lambda t: [t.pop(name) for name in list(t)], "no tensors"),
        (
            lambda t: [t.update({name.replace("lora_", ""): t.pop(name)}) for name in list(t)],
            "16 of its 16 tensors",
        ),
    ],
)
def test_a_file_of_other_content_is_refused(save, change, message):
    folder = save("no alpha")
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        read_lora(folder)


def test_a_folder_of_two_loras_is_refused(save):
    folder = save("ours")
    (save("peft") / PEFT).rename(folder / PEFT)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors, pytorch_lora_weights\.safetensors"):
        read_lora(folder)
    assert read_lora(folder / DIFFUSERS).ranks == [RANK]

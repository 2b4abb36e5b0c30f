import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from cogds.errors import UserError
from cogds.model.load import find_model, load_transformer
from cogds.model.lora.adapter import export, inject, resolve_targets
from cogds.model.lora.file import read_metadata

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture
def transformer(tiny_model):
    return load_transformer(find_model(str(tiny_model)), torch.float32)


def example_inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 2, 16, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 32, 32, generator=generator),
        "timestep": torch.tensor([500]),
        "ofs": torch.tensor([2.0]),
        "image_rotary_emb": (torch.ones(16, 16), torch.zeros(16, 16)),
        "return_dict": False,
    }


def randomize(parameters, seed=0):
    """Random weights. Every layer has its own, or mistaking one for another would not be seen."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))


def test_targets_are_full_names_of_linear_layers(transformer):
    names = resolve_targets(transformer, ATTENTION)
    assert len(names) == 2 * 4
    assert "transformer_blocks.1.attn1.to_out.0" in names


def test_all_linear_is_every_linear_layer(transformer):
    linears = [n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    assert resolve_targets(transformer, ["all-linear"]) == linears
    assert "proj_out" in linears


def test_an_unknown_target_is_named_with_the_nearest(transformer):
    with pytest.raises(UserError, match=r"'to_quu'.*did you mean 'to_q'"):
        resolve_targets(transformer, ["to_quu"])


def test_only_the_adapter_is_trained_and_step_0_is_the_base_model(transformer):
    before = transformer(**example_inputs())[0]
    parameters = inject(transformer, 4, 8, 0.0, ATTENTION, seed=0)
    assert sum(p.numel() for p in parameters) == 8 * 4 * (32 + 32)
    assert [n for n, p in transformer.named_parameters() if p.requires_grad and "lora" not in n] == []
    assert torch.equal(transformer(**example_inputs())[0], before)


def test_the_seed_decides_the_adapter_and_leaves_the_global_generator_alone(tiny_model):
    states = []
    for seed in (0, 0, 1):
        model = load_transformer(find_model(str(tiny_model)), torch.float32)
        torch.manual_seed(123)
        states.append(inject(model, 4, 4, 0.0, ATTENTION, seed=seed)[0].detach().clone())
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(123)))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("rank, alpha, targets", [(4, 8.0, ATTENTION), (4, 1.0, ("all-linear",)), (3, 4.5, ("to_q",))])
def test_the_file_loads_in_diffusers_at_the_strength_it_was_trained_with(
    transformer, tiny_model, tmp_path, rank, alpha, targets
):
    """In a fresh process, through the pipeline's own loader, with alpha != rank."""
    parameters = inject(transformer, rank, alpha, 0.0, targets, seed=0)
    randomize(parameters)
    expected = transformer(**example_inputs())[0]
    tensors = {name: p.detach() for name, p in transformer.named_parameters() if p.requires_grad}
    file = export(tmp_path / "lora", transformer, tensors, {"image_latents": "pipeline"})
    torch.save({"inputs": example_inputs(), "expected": expected}, tmp_path / "example.pt")
    script = """
import sys, torch
from diffusers import CogVideoXImageToVideoPipeline
model, folder = sys.argv[1:]
pipe = CogVideoXImageToVideoPipeline.from_pretrained(model)
example = torch.load(folder + "/example.pt")
with torch.no_grad():
    base = pipe.transformer(**example["inputs"])[0]
    pipe.load_lora_weights(folder + "/lora")
    tuned = pipe.transformer(**example["inputs"])[0]
assert not torch.allclose(base, tuned, atol=1e-3)
print((tuned - example["expected"]).abs().max().item())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_model), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-5
    with safe_open(file, "pt") as tensors:
        adapter = json.loads(tensors.metadata()["lora_adapter_metadata"])
    assert adapter["transformer.r"] == rank
    assert adapter["transformer.lora_alpha"] == alpha
    assert read_metadata(tmp_path / "lora") == {"image_latents": "pipeline"}


def test_an_empty_tensor_is_never_exported(transformer, tmp_path):
    """What ZeRO-3 leaves in the module where nothing gathers it."""
    inject(transformer, 4, 4, 0.0, ATTENTION, seed=0)
    tensors = {n: torch.empty(0) for n, p in transformer.named_parameters() if p.requires_grad}
    with pytest.raises(RuntimeError, match="16 of 16 tensors are empty"):
        export(tmp_path / "lora", transformer, tensors, {})


def test_no_lora_there_is_said(tmp_path):
    with pytest.raises(UserError, match="no LoRA at"):
        read_metadata(tmp_path)
    (tmp_path / "x.safetensors").write_text("no")
    with pytest.raises(UserError, match="not a safetensors file"):
        read_metadata(tmp_path / "x.safetensors")

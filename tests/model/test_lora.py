import subprocess
import sys

import pytest
import torch

from cogds.errors import UserError
from cogds.model.load import find_model, load_transformer
from cogds.model.lora import export, inject, resolve_targets
from tests.versions import load_lora

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


def test_the_files_load_in_diffusers_as_they_were_trained(tmp_path):
    """In a fresh process, through the pipeline's own loader: the layers, their strengths and the output."""
    load_lora.write(tmp_path)
    command = [sys.executable, load_lora.__file__, "check", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == len(load_lora.TRAINED) + 3


def test_an_empty_tensor_is_never_exported(transformer, tmp_path):
    """What ZeRO-3 leaves in the module where nothing gathers it."""
    inject(transformer, 4, 4, 0.0, ATTENTION, seed=0)
    tensors = {n: torch.empty(0) for n, p in transformer.named_parameters() if p.requires_grad}
    with pytest.raises(RuntimeError, match="16 of 16 tensors are empty"):
        export(tmp_path / "lora", transformer, tensors, {})

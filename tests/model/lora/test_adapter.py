import subprocess
import sys

import pytest
import torch

from cogds.errors import UserError
from cogds.model.lora.adapter import export, inject, resolve_targets
from tests.model.lora.adapters import ATTENTION, load, output, trainable
from tests.versions import load_lora


@pytest.fixture
def transformer(tiny_model):
    return load(tiny_model)


def test_targets_are_full_names_of_linear_layers(transformer):
    names = resolve_targets(transformer, ATTENTION)
    assert len(names) == 2 * 4
    assert "transformer_blocks.1.attn1.to_out.0" in names


def test_all_linear_is_every_linear_layer(transformer):
    linears = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert resolve_targets(transformer, ["all-linear"]) == linears
    assert "proj_out" in linears


def test_an_unknown_target_is_refused_with_a_suggestion(transformer):
    with pytest.raises(UserError, match=r"'to_quu'.*did you mean 'to_q'"):
        resolve_targets(transformer, ["to_quu"])


def test_only_the_lora_is_trained_and_step_0_equals_the_base_model(transformer):
    before = output(transformer)
    parameters = inject(transformer, 4, 8, 0.0, ATTENTION, seed=0)
    assert sum(parameter.numel() for parameter in parameters) == 8 * 4 * (32 + 32)
    assert [name for name in trainable(transformer) if "lora" not in name] == []
    assert torch.equal(output(transformer), before)


def test_the_seed_determines_the_lora_and_the_global_generator_is_unchanged(tiny_model):
    weights = []
    for seed in (0, 0, 1):
        transformer = load(tiny_model)
        torch.manual_seed(123)
        weights.append(inject(transformer, 4, 4, 0.0, ATTENTION, seed=seed)[0].detach().clone())
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(123)))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.slow  # tests/dist/test_export.py has a quick check in a fresh process
def test_exported_files_load_in_diffusers_as_trained(tmp_path):
    """A fresh process checks the layers, their strengths and the output."""
    load_lora.write(tmp_path)
    command = [sys.executable, load_lora.__file__, "check", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == len(load_lora.TRAINED) + 3


def test_an_empty_tensor_is_never_exported(transformer, tmp_path):
    """ZeRO-3 leaves empty tensors in the module unless they are gathered."""
    inject(transformer, 4, 4, 0.0, ATTENTION, seed=0)
    with pytest.raises(RuntimeError, match="16 of 16 tensors are empty"):
        export(tmp_path / "lora", transformer, dict.fromkeys(trainable(transformer), torch.empty(0)), {})

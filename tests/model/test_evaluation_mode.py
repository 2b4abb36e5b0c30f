"""Evaluation of the transformer has no effect on training."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from cogds.config.schema import CHECKPOINTING_MODES
from cogds.model.evaluation_mode import call_module, evaluation_mode
from tests.model.lora.adapters import load


def test_modes_are_restored_even_after_an_error(tiny_model):
    transformer = load(tiny_model).train()
    transformer.proj_out.eval()
    for number, block in enumerate(transformer.transformer_blocks):
        block.checkpointing = CHECKPOINTING_MODES[1 + number % 2]
    modes = [block.checkpointing for block in transformer.transformer_blocks]
    training, random_state = [module.training for module in transformer.modules()], torch.get_rng_state()
    with contextlib.suppress(ZeroDivisionError), evaluation_mode(transformer, torch.device("cpu")):
        assert not any(module.training for module in transformer.modules())
        assert {block.checkpointing for block in transformer.transformer_blocks} == {"none"}
        assert not torch.is_grad_enabled()
        torch.rand(1)
        raise ZeroDivisionError
    assert len(set(modes)) > 1
    assert [block.checkpointing for block in transformer.transformer_blocks] == modes
    assert [module.training for module in transformer.modules()] == training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("enabled, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_autocast_follows_the_engine(enabled, dtype):
    engine = SimpleNamespace(
        module=torch.nn.Linear(2, 2),
        torch_autocast_dtype=lambda: torch.bfloat16,
        torch_autocast_enabled=lambda: enabled,
    )
    assert call_module(engine, torch.device("cpu"), {"input": torch.zeros(1, 2)}).dtype == dtype

"""Patterns for the weights that a full fine-tune trains."""

import pytest

from cogds.errors import UserError
from cogds.model.load import empty_transformer, find_model
from cogds.model.trained_weights import match_weights, train_weights


@pytest.fixture
def transformer(tiny_model):
    return empty_transformer(find_model(str(tiny_model)))


@pytest.mark.parametrize(
    "patterns, some, num",
    [
        ([], "proj_out.weight", 68),
        (["attn1"], "transformer_blocks.1.attn1.to_q.weight", 24),
        (["transformer_blocks.?.attn1.to_*"], "transformer_blocks.0.attn1.to_out.0.bias", 16),
        (["transformer_blocks.1"], "transformer_blocks.1.norm1.norm.bias", 24),
        (["to_q.weight", "proj_out"], "proj_out.bias", 4),
        (["attn1", "to_q"], "transformer_blocks.0.attn1.norm_q.weight", 24),
    ],
)
def test_patterns_choose_whole_modules(transformer, patterns, some, num):
    names = [name for name, _ in transformer.named_parameters()]
    chosen = match_weights(names, patterns)
    assert some in chosen
    assert len(chosen) == num
    assert chosen == [name for name in names if name in chosen]  # in their order
    train_weights(transformer, chosen)
    assert [name for name, weight in transformer.named_parameters() if weight.requires_grad] == chosen


def test_a_pattern_without_a_match_is_named(transformer):
    names = [name for name, _ in transformer.named_parameters()]
    with pytest.raises(UserError, match=r"^full\.modules: .*'attn'.*attn1"):
        match_weights(names, ["attn1", "attn"])

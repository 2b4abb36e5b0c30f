"""What needs no process group; loading and training under each stage stand in tests/dist."""

from types import SimpleNamespace

from cogds.runtime.engine import set_learning_rate, set_optimizer, zero_stage


def test_a_resumed_optimizer_gets_the_runs_settings_and_keeps_the_rest():
    group = {"lr": 1.0, "betas": (0.5, 0.5), "eps": 1.0, "weight_decay": 0.0, "params": ["weights"]}
    engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[group]))
    params = {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}
    set_optimizer(engine, {"optimizer": {"type": "AdamW", "params": params}})
    assert group == {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1.0, "weight_decay": 0.1, "params": ["weights"]}
    set_learning_rate(engine, 2e-4)
    assert group["lr"] == 2e-4


def test_stage_of_a_config():
    assert zero_stage({"zero_optimization": {"stage": 3}}) == 3
    assert zero_stage({}) == 0

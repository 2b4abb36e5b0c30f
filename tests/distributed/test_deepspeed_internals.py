"""Parts of DeepSpeed's engine that are not public. Real engines run in tests/dist."""

from types import SimpleNamespace

import torch

from cogds.distributed.deepspeed_internals import detach_monitor, without_zero3_backward_hooks


def test_backward_hooks_are_off_inside_at_stage_3_only():
    module, calls = torch.nn.Linear(2, 2), []
    module.register_full_backward_hook(lambda *_: calls.append(1))

    def num_calls_after_backward(stage):
        with without_zero3_backward_hooks(module, stage):
            x = torch.ones(1, 2, requires_grad=True)
            torch.autograd.grad(module(x).sum(), [module.weight, x])
        return len(calls)

    assert [num_calls_after_backward(stage) for stage in (2, 3, 2)] == [1, 1, 2]


def test_a_detached_monitor_is_disabled_for_the_engine():
    monitor = SimpleNamespace(enabled=True)
    engine = SimpleNamespace(monitor=monitor)
    assert detach_monitor(engine) is monitor
    assert not monitor.enabled
    assert detach_monitor(engine) is None

"""What cogds does to DeepSpeed's engine beside its public functions. Real engines run in tests/dist."""

from types import SimpleNamespace

import torch

from cogds.distributed.deepspeed_internals import detach_monitor, without_zero3_backward_hooks


def test_backward_hooks_are_off_inside_at_stage_3_only():
    module, calls = torch.nn.Linear(2, 2), []
    module.register_full_backward_hook(lambda *_: calls.append(1))

    def backward(number):
        with without_zero3_backward_hooks(module, number):
            x = torch.ones(1, 2, requires_grad=True)
            torch.autograd.grad(module(x).sum(), [module.weight, x])
        return len(calls)

    assert [backward(number) for number in (2, 3, 2)] == [1, 1, 2]


def test_a_detached_monitor_is_no_longer_written_by_the_engine():
    monitor = SimpleNamespace(enabled=True)
    engine = SimpleNamespace(monitor=monitor)
    assert detach_monitor(engine) is monitor
    assert not monitor.enabled
    assert detach_monitor(engine) is None

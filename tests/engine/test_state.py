"""Saving and restoring the training state, with engines of a single flat partition and without DeepSpeed.

Real engines of every stage, on several ranks, are saved and resumed in tests/dist.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from cogds.distributed.world import World
from cogds.engine import state as state_module
from cogds.engine.state import TrainState, gather_state, restore_state, state_bytes
from cogds.errors import UserError

WORLD = World(0, 1, 0, 1)
SHAPES = {"a": (3, 2), "b": (2, 3), "c": (4,)}


class Engine:
    """Parameters in a single float32 partition, as in ZeRO, with torch's optimizer."""

    def __init__(self, dtype=torch.float32, shapes=SHAPES, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.module = torch.nn.Module()
        self.partition = torch.randn(sum(map(math.prod, shapes.values())), generator=draw)
        self.slices, start = {}, 0
        for name, shape in shapes.items():
            end = start + math.prod(shape)
            parameter = torch.nn.Parameter(self.partition[start:end].view(shape).to(dtype, copy=True))
            self.module.register_parameter(name, parameter)
            self.slices[parameter], start = slice(start, end), end
        self.module.register_parameter("frozen", torch.nn.Parameter(torch.zeros(9), requires_grad=False))
        self.basic_optimizer = torch.optim.AdamW([self.partition], lr=0.1)
        self.optimizer = SimpleNamespace(
            single_partition_of_fp32_groups=[self.partition], _optimizer_step=lambda _: self.basic_optimizer.step()
        )
        self.global_steps = self.skipped_steps = 0

    def zero_optimization_stage(self):
        return 2

    def part(self, parameter, kind=None):
        """The parameter's part of the partition, or of the optimizer state of that kind."""
        whole = self.partition if kind is None else self.basic_optimizer.state[self.partition][kind]
        return whole[self.slices[parameter]].view(parameter.shape)

    def train(self, num_steps):
        draw = torch.Generator().manual_seed(7)
        for _ in range(num_steps):
            self.partition.grad = torch.randn(self.partition.shape, generator=draw)
            self.basic_optimizer.step()
            self.global_steps += 1
        self.partition.grad = None
        for parameter in self.slices:
            parameter.data.copy_(self.part(parameter))


@pytest.fixture
def make_engine(monkeypatch):
    """Create engines whose parts DeepSpeed's `safe_*` functions return."""
    engines = []

    def make(*args, **options):
        engines.append(Engine(*args, **options))
        return engines[-1]

    def part(parameter, kind=None):
        return next(engine for engine in engines if parameter in engine.slices).part(parameter, kind)

    def put(parameter, value, kind=None):
        part(parameter, kind).copy_(value)

    monkeypatch.setattr(state_module, "safe_get_full_fp32_param", part)
    monkeypatch.setattr(state_module, "safe_get_full_optimizer_state", part)
    monkeypatch.setattr(state_module, "safe_set_full_fp32_param", put)
    monkeypatch.setattr(state_module, "safe_set_full_optimizer_state", put)
    return make


def assert_equal(state, expected):
    torch.testing.assert_close(state.tensors, expected.tensors, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_new_engine_continues_where_another_stopped(make_engine, dtype, num_steps):
    engine = make_engine(dtype)
    engine.train(num_steps)
    saved = gather_state(engine, WORLD)
    assert saved.num_updates == num_steps
    assert saved.kinds == ["weight", *(["exp_avg", "exp_avg_sq"] if num_steps else [])]
    fresh = make_engine(dtype, seed=1)
    restore_state(fresh, saved, WORLD)
    assert_equal(gather_state(fresh, WORLD), saved)
    assert fresh.basic_optimizer.param_groups[0]["lr"] == 0.1
    engine.train(2)
    fresh.train(2)
    assert_equal(gather_state(fresh, WORLD), gather_state(engine, WORLD))


def test_a_native_step_counter_counts_from_the_first_step(make_engine):
    """DeepSpeed's CPU Adam has such a counter. If it skipped steps, it would round powers of the betas differently."""
    engine = make_engine()
    engine.train(3)
    fresh, updates = make_engine(seed=1), []
    native = SimpleNamespace(adam_update=lambda _, step, lr, *_rest: updates.append((step, lr)))
    fresh.basic_optimizer.ds_opt_adam, fresh.basic_optimizer.opt_id = native, 0
    fresh.basic_optimizer.param_groups[0]["bias_correction"] = True
    restore_state(fresh, gather_state(engine, WORLD), WORLD)
    assert updates == [(1, 0.0), (2, 0.0), (3, 0.0)]


def test_a_master_weight_of_another_parameter_is_never_saved(make_engine):
    engine = make_engine(torch.bfloat16)
    gather_state(engine, WORLD)  # rounding to bf16 is not an error
    a, b, _ = engine.slices
    engine.slices[a], engine.slices[b] = engine.slices[b], engine.slices[a]  # as if their order had changed
    with pytest.raises(RuntimeError, match="'a'"):
        gather_state(engine, WORLD)


def test_a_single_wrong_number_prevents_a_save(make_engine):
    engine = make_engine()
    engine.train(1)
    engine.partition[-1] += 1e-3
    with pytest.raises(RuntimeError, match="'c'"):
        gather_state(engine, WORLD)


def test_an_optimizer_without_states_after_steps_is_not_saved(make_engine):
    engine = make_engine()
    engine.global_steps = engine.skipped_steps = 2  # all steps were skipped, so there is no state
    assert gather_state(engine, WORLD).kinds == ["weight"]
    engine.global_steps = 3
    with pytest.raises(RuntimeError, match="AdamW"):
        gather_state(engine, WORLD)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: without(t, "weight/b", "exp_avg/b", "exp_avg_sq/b"), "'exp_avg/b'"),
        (lambda t: without(t, "exp_avg_sq/c"), "'exp_avg_sq/c'"),
        (lambda t: t | {"weight/d": torch.ones(2)}, "'weight/d'"),
        (lambda t: t | {"weight/a": t["weight/a"][:, :1]}, r"'a' .*\(3, 1\) .*\(3, 2\)"),
        # The same number of elements, and for `b` a shape that would be broadcast.
        (lambda t: t | {"weight/a": t["weight/a"].T}, r"'a' .*\(2, 3\) .*\(3, 2\)"),
        (lambda t: t | {"weight/b": t["weight/b"][:1]}, r"'b' .*\(1, 3\) .*\(2, 3\)"),
    ],
)
def test_the_state_of_another_lora_is_refused_and_changes_nothing(make_engine, change, message):
    engine = make_engine()
    engine.train(2)
    saved = gather_state(engine, WORLD)
    fresh = make_engine(seed=1)
    before = gather_state(fresh, WORLD)
    with pytest.raises(UserError, match=rf"^checkpoint\.resume: .*{message}"):
        restore_state(fresh, TrainState(change(saved.tensors), 2), WORLD)
    assert_equal(gather_state(fresh, WORLD), before)


def test_the_size_of_a_state_is_known_before_it_is_gathered(make_engine):
    engine = make_engine(torch.bfloat16)
    expected = state_bytes(engine)
    engine.train(1)
    assert expected == sum(tensor.nbytes for tensor in gather_state(engine, WORLD).tensors.values())
    for parameter in engine.slices:  # at stage 3, a parameter is empty, and `ds_shape` has its shape
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert state_bytes(engine) == expected

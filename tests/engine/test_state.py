"""What is saved of training is the model's own, and goes into no other: engines with one flat partition, no DeepSpeed.

Real engines, of every stage and on several ranks, are saved and resumed in tests/dist.
"""

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
    """Parameters in one float32 partition, as ZeRO keeps them, with torch's own optimizer."""

    def __init__(self, dtype=torch.float32, shapes=SHAPES, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.module = torch.nn.Module()
        self.partition = torch.randn(sum(torch.Size(one).numel() for one in shapes.values()), generator=draw)
        self.slices, start = {}, 0
        for name, shape in shapes.items():
            end = start + torch.Size(shape).numel()
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
        """Of the partition, or of what the optimizer keeps of it, what is this parameter's."""
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
def made(monkeypatch):
    """`made(...)` is an Engine that the module under test finds the parts of."""
    engines = []

    def make(*args, **options):
        engines.append(Engine(*args, **options))
        return engines[-1]

    def part(parameter, kind=None):
        return next(one for one in engines if parameter in one.slices).part(parameter, kind)

    def put(parameter, value, kind=None):
        part(parameter, kind).copy_(value)

    monkeypatch.setattr(state_module, "safe_get_full_fp32_param", part)
    monkeypatch.setattr(state_module, "safe_get_full_optimizer_state", part)
    monkeypatch.setattr(state_module, "safe_set_full_fp32_param", put)
    monkeypatch.setattr(state_module, "safe_set_full_optimizer_state", put)
    return make


def same(one, other):
    """Whether two states are the same, bit for bit."""
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_new_engine_continues_where_another_stopped(made, dtype, num_steps):
    engine = made(dtype)
    engine.train(num_steps)
    saved = gather_state(engine, WORLD)
    assert saved.num_updates == num_steps
    assert saved.kinds == ["weight", *(["exp_avg", "exp_avg_sq"] if num_steps else [])]
    fresh = made(dtype, seed=1)
    restore_state(fresh, saved, WORLD)
    assert same(gather_state(fresh, WORLD), saved)
    assert fresh.basic_optimizer.param_groups[0]["lr"] == 0.1
    engine.train(2)
    fresh.train(2)
    assert same(gather_state(fresh, WORLD), gather_state(engine, WORLD))


def test_a_native_step_counter_counts_from_the_first_step(made):
    """DeepSpeed's CPU Adam has one; given a later step at once, it would round powers of the betas differently."""
    engine = made()
    engine.train(3)
    fresh, told = made(seed=1), []
    native = SimpleNamespace(adam_update=lambda _, step, rate, *_more: told.append((step, rate)))
    fresh.basic_optimizer.ds_opt_adam, fresh.basic_optimizer.opt_id = native, 0
    fresh.basic_optimizer.param_groups[0]["bias_correction"] = True
    restore_state(fresh, gather_state(engine, WORLD), WORLD)
    assert told == [(1, 0.0), (2, 0.0), (3, 0.0)]


def test_a_master_weight_of_another_parameter_is_never_saved(made):
    engine = made(torch.bfloat16)
    gather_state(engine, WORLD)  # a rounded weight is its own
    a, b, _ = engine.slices
    engine.slices[a], engine.slices[b] = engine.slices[b], engine.slices[a]  # as another order of them would have it
    with pytest.raises(RuntimeError, match="'a'"):
        gather_state(engine, WORLD)


def test_one_wrong_number_is_enough_to_refuse_a_save(made):
    engine = made()
    engine.train(1)
    engine.partition[-1] += 1e-3
    with pytest.raises(RuntimeError, match="'c'"):
        gather_state(engine, WORLD)


def test_an_optimizer_without_states_after_steps_is_not_saved(made):
    engine = made()
    engine.global_steps = engine.skipped_steps = 2  # no gradient was finite: nothing is missing
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
        # As many numbers, and for `b` a shape that would be broadcast.
        (lambda t: t | {"weight/a": t["weight/a"].T}, r"'a' .*\(2, 3\) .*\(3, 2\)"),
        (lambda t: t | {"weight/b": t["weight/b"][:1]}, r"'b' .*\(1, 3\) .*\(2, 3\)"),
    ],
)
def test_the_state_of_another_lora_is_refused_and_changes_nothing(made, change, message):
    engine = made()
    engine.train(2)
    saved = gather_state(engine, WORLD)
    fresh = made(seed=1)
    before = gather_state(fresh, WORLD)
    with pytest.raises(UserError, match=rf"^checkpoint\.resume: .*{message}"):
        restore_state(fresh, TrainState(change(saved.tensors), 2), WORLD)
    assert same(gather_state(fresh, WORLD), before)


def test_the_size_of_a_state_is_known_before_it_is_gathered(made):
    engine = made(torch.bfloat16)
    expected = state_bytes(engine)
    engine.train(1)
    assert expected == sum(tensor.nbytes for tensor in gather_state(engine, WORLD).tensors.values())
    for parameter in engine.slices:  # at stage 3 a parameter is empty, and knows what it would be
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert state_bytes(engine) == expected

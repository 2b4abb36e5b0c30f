"""Run by test_sequence.py on 4 ranks: clips shared by 2 and by 4 under each ZeRO stage, against one process."""

import json
import sys
from pathlib import Path

ROOT, model_path, folder = map(Path, sys.argv[-3:])
sys.path.insert(0, str(ROOT))

import dataclasses  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.sequence.layer import DistributedAttention  # noqa: E402
from deepspeed.utils import safe_get_full_grad  # noqa: E402

from cogds.config.loading import load_config  # noqa: E402
from cogds.config.deepspeed import load_ds_config, resolve  # noqa: E402
from cogds.distributed.collectives import disagreeing_data_ranks  # noqa: E402
from cogds.distributed.process_group import connect, disconnect  # noqa: E402
from cogds.distributed.world import read_world  # noqa: E402
from cogds.engine.sequence_groups import share_clips  # noqa: E402
from cogds.engine.start import load_for_stage, set_learning_rate, start_engine  # noqa: E402
from cogds.engine.state import TrainState, restore_state, trainable  # noqa: E402
from cogds.model.load import find_model, load_transformer  # noqa: E402
from cogds.model.lora.adapter import inject  # noqa: E402
from cogds.model.transformer.attention import attend  # noqa: E402
from cogds.model.transformer.sequence_parallel import ulysses_attention  # noqa: E402

# Latents F, H, W: 15 video tokens; a portrait bucket, 10; each with its activation checkpointing mode. 5 text tokens.
SHAPES = {"odd": ((2, 6, 10), "selective"), "portrait": ((4, 10, 2), "full")}
LORA = (4, 8, 0.0, ("all-linear",), 0)


def batch_of(shape, data_rank):
    """The inputs and the target of 2 clips of a data-parallel rank."""
    (frames, height, width), _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(sum(map(ord, shape)) + data_rank)
    tokens = frames // 2 * (height // 2) * (width // 2)
    angles = torch.randn(tokens, 8, generator=generator).repeat_interleave(2, 1)
    inputs = {
        "hidden_states": torch.randn(2, frames, 16, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
        "timestep": torch.tensor([3, 500]),
        "ofs": torch.tensor([2.0]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "return_dict": False,
    }
    return inputs, torch.randn(2, frames, 8, height, width, generator=generator)


def loss_of(module, shape, data_rank):
    inputs, target = batch_of(shape, data_rank)
    return (module(**inputs)[0] - target).square().mean()


def weights_of(shapes):
    generator = torch.Generator().manual_seed(1)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def alone(model, data_size):
    """The mean loss and gradients over data-parallel ranks for each shape, from one process without DeepSpeed."""
    transformer = load_transformer(model, torch.float32)
    inject(transformer, *LORA)
    ours = {name: one for name, one in transformer.named_parameters() if one.requires_grad}
    for name, value in weights_of({name: one.shape for name, one in ours.items()}).items():
        ours[name].data.copy_(value)
    found = {}
    for shape in SHAPES:
        transformer.zero_grad()
        loss = sum(loss_of(transformer, shape, rank) for rank in range(data_size)) / data_size
        loss.backward()
        found[shape] = loss.item(), {name: one.grad.clone() for name, one in ours.items()}
    return found


def shared(model, world, stage):
    """The same from the ranks of the world, and the gradient norm that DeepSpeed reports."""
    path = str(ROOT / f"ds_configs/zero{stage}.json")
    settings = ["model.path=unused", "data.path=unused", "train.precision=fp32", "train.batch_size=2"]
    cfg, explicit = load_config(None, [*settings, f"parallel.sequence_size={world.sequence_size}"])
    ds_config, _ = resolve(load_ds_config(path), cfg, explicit, world.size, 64, path)
    transformer = load_for_stage(model, torch.float32, ds_config, world)
    parameters = inject(transformer, *LORA)
    share_clips(transformer, world, 60)
    engine = start_engine(transformer.train(), parameters, ds_config)
    ours = trainable(engine)
    weights = weights_of({name: getattr(one, "ds_shape", one.shape) for name, one in ours.items()})
    restore_state(engine, TrainState({f"weight/{name}": value for name, value in weights.items()}), world)
    set_learning_rate(engine, 0.0)  # so that every shape has the same weights
    found = {}
    for shape, (_, level) in SHAPES.items():
        transformer.set_checkpointing(level)
        loss = loss_of(engine, shape, world.data_rank)
        engine.backward(loss)
        gradients = {name: safe_get_full_grad(one).clone() for name, one in ours.items()}
        engine.step()
        every = [torch.zeros(()) for _ in range(world.size)]
        dist.all_gather(every, loss.detach())
        found[shape] = [one.item() for one in every], gradients, float(engine.get_global_grad_norm())
    return found


def check_against_deepspeed(world):
    """For parts of equal size, DeepSpeed's own layer gives the same result."""
    generator = torch.Generator().manual_seed(world.rank)
    query, key, value = (torch.randn(2, 3, 8, 4, generator=generator) for _ in range(3))
    own = ulysses_attention(query, key, value, "torch", (3,) * world.size, dist.group.WORLD.group_name)
    theirs = DistributedAttention(attend, dist.group.WORLD, scatter_idx=2, gather_idx=1)(query, key, value, 0)
    torch.testing.assert_close(own, theirs)


whole = read_world()
connect(whole, 120)
check_against_deepspeed(whole)
model, report = find_model(str(model_path)), []
for sequence in (2, 4):
    world = dataclasses.replace(whole, sequence_size=sequence)
    assert disagreeing_data_ranks(world, world.data_rank) == []
    assert disagreeing_data_ranks(world, int(world.rank == 0)) == [0]
    reference = alone(model, world.data_size)
    for stage in (1, 2, 3):
        for shape, (losses, gradients, norm) in shared(model, world, stage).items():
            loss, expected = reference[shape]
            off = {name: ((gradients[name] - one).norm() / one.norm()).item() for name, one in expected.items()}
            groups = [losses[first : first + sequence] for first in range(0, world.size, sequence)]
            report.append({
                "case": f"shared by {sequence}, stage {stage}, {shape}",
                "loss": abs(sum(losses) / world.size / loss - 1),
                "spread": max(max(group) - min(group) for group in groups),
                "norm": abs(norm / torch.stack([one.norm() for one in expected.values()]).norm().item() - 1),
                "gradient": max(off.values()),
                "of": max(off, key=off.get),
                "num_tensors": len(off),
            })  # fmt: skip
if whole.rank == 0:
    (folder / "report.json").write_text(json.dumps(report))
disconnect()

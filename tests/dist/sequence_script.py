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

from cogds.config.deepspeed import load_ds_config, resolve  # noqa: E402
from cogds.config.loading import load_config  # noqa: E402
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

# Latents F, H, W with 15 and 10 video tokens, each with an activation checkpointing mode. There are 5 text tokens.
SHAPES = {"odd": ((2, 6, 10), "selective"), "portrait": ((4, 10, 2), "full")}
LORA = (4, 8, 0.0, ("all-linear",), 0)


def batch_of(shape, data_rank):
    """Return the inputs and the target of 2 clips of a data-parallel rank."""
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


def random_weights(shapes):
    generator = torch.Generator().manual_seed(1)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def alone(model, data_size):
    """Return mean loss and gradients over data-parallel ranks for each shape, from one process without DeepSpeed."""
    transformer = load_transformer(model, torch.float32)
    inject(transformer, *LORA)
    parameters = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    for name, value in random_weights({name: parameter.shape for name, parameter in parameters.items()}).items():
        parameters[name].data.copy_(value)
    results = {}
    for shape in SHAPES:
        transformer.zero_grad()
        loss = sum(loss_of(transformer, shape, rank) for rank in range(data_size)) / data_size
        loss.backward()
        results[shape] = loss.item(), {name: parameter.grad.clone() for name, parameter in parameters.items()}
    return results


def shared(model, world, stage):
    """Return the same from the ranks of the world, and the gradient norm that DeepSpeed reports."""
    path = str(ROOT / f"ds_configs/zero{stage}.json")
    settings = ["model.path=unused", "data.path=unused", "train.precision=fp32", "train.batch_size=2"]
    cfg, explicit = load_config(None, [*settings, f"parallel.sequence_size={world.sequence_size}"])
    ds_config, _ = resolve(load_ds_config(path), cfg, explicit, world.size, 64, path)
    transformer = load_for_stage(model, torch.float32, ds_config, world)
    parameters = inject(transformer, *LORA)
    share_clips(transformer, world, 60)
    engine = start_engine(transformer.train(), parameters, ds_config)
    parameters = trainable(engine)
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in parameters.items()}
    weights = random_weights(shapes)
    restore_state(engine, TrainState({f"weight/{name}": value for name, value in weights.items()}), world)
    set_learning_rate(engine, 0.0)  # so that every shape has the same weights
    results = {}
    for shape, (_, checkpointing) in SHAPES.items():
        transformer.set_checkpointing(checkpointing)
        loss = loss_of(engine, shape, world.data_rank)
        engine.backward(loss)
        gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in parameters.items()}
        engine.step()
        losses = [torch.zeros(()) for _ in range(world.size)]
        dist.all_gather(losses, loss.detach())
        results[shape] = [loss.item() for loss in losses], gradients, float(engine.get_global_grad_norm())
    return results


def check_against_deepspeed(world):
    """Check that DeepSpeed's own layer gives the same result for parts of equal size."""
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
            distances = {
                name: ((gradients[name] - grad).norm() / grad.norm()).item() for name, grad in expected.items()
            }
            expected_norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
            groups = [losses[first : first + sequence] for first in range(0, world.size, sequence)]
            report.append({
                "case": f"shared by {sequence}, stage {stage}, {shape}",
                "loss": abs(sum(losses) / world.size / loss - 1),
                "spread": max(max(group) - min(group) for group in groups),
                "norm": abs(norm / expected_norm - 1),
                "gradient": max(distances.values()),
                "parameter": max(distances, key=distances.get),
                "num_tensors": len(distances),
            })  # fmt: skip
if whole.rank == 0:
    (folder / "report.json").write_text(json.dumps(report))
disconnect()

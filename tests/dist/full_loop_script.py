"""Run by test_full.py on 2 ranks: train the transformer with DeepSpeed, and diffusers' own in a plain loop.

    python full_loop_script.py MODEL RESULTS.json [DS,PRECISION ...]

Writes for each DeepSpeed config and precision the losses of both, and the distance between the final float32 weights
relative to the length of the way that they went.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402
from diffusers import CogVideoXTransformer3DModel  # noqa: E402

from cogds.distributed.collectives import all_gather  # noqa: E402
from cogds.distributed.process_group import connect, disconnect  # noqa: E402
from cogds.distributed.world import read_world  # noqa: E402
from cogds.engine.start import load_for_stage, start_engine  # noqa: E402
from cogds.engine.state import trainable  # noqa: E402
from cogds.train.trained_part import add_trained_part, loaded_as_trained  # noqa: E402
from tests.jobs import make_job  # noqa: E402
from tests.model.lora.adapters import example_inputs  # noqa: E402

NUM_STEPS, MODES = 5, ("none", "selective", "full", "full+offload", "none")


def sample(step, rank, dtype):
    """The inputs and the target of a rank's clip."""
    numbers = torch.Generator().manual_seed(100 * step + rank)
    inputs = {
        name: torch.randn(value.shape, generator=numbers).to(dtype)
        if torch.is_tensor(value) and value.is_floating_point() and name != "ofs"
        else value.to(dtype)
        if name == "ofs"
        else value
        for name, value in example_inputs().items()
    }
    return inputs, torch.randn(inputs["hidden_states"][:, :, :8].shape, generator=numbers)


def distributed(job, world):
    """Return the losses, averaged over the ranks, and the final float32 weights, with DeepSpeed."""
    transformer = load_for_stage(job.model, job.dtype, job.ds_config, world, trained=loaded_as_trained(job))
    engine = start_engine(transformer.train(), add_trained_part(transformer, job), job.ds_config)
    losses = []
    for step in range(NUM_STEPS):
        inputs, target = sample(step, world.rank, job.dtype)
        engine.module.set_checkpointing(MODES[step])
        loss = (engine(**inputs)[0].float() - target).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(sum(all_gather(world, loss.item())) / world.size)
    weights = {name: safe_get_full_fp32_param(weight).clone() for name, weight in trainable(engine).items()}
    return losses, weights


def plain(job, num_ranks):
    """Return the same with diffusers' transformer, float32 masters and torch's AdamW, and the weights before."""
    cfg, dtype = job.cfg, job.dtype
    transformer = CogVideoXTransformer3DModel.from_pretrained(job.model.path, subfolder="transformer").to(dtype)
    weights = {name: weight for name, weight in transformer.named_parameters() if name in job.targets}
    masters = {name: weight.detach().float().clone() for name, weight in weights.items()}
    before = {name: master.clone() for name, master in masters.items()}
    opt = cfg.optimizer
    settings = {"lr": opt.lr, "betas": opt.betas, "eps": opt.eps, "weight_decay": opt.weight_decay}
    optimizer, losses = torch.optim.AdamW(masters.values(), **settings), []
    for step in range(NUM_STEPS):
        total = 0.0
        for rank in range(num_ranks):
            inputs, target = sample(step, rank, dtype)
            loss = (transformer(**inputs)[0].float() - target).square().mean() / num_ranks
            loss.backward()
            total += loss.item()
        for name, master in masters.items():
            master.grad = weights[name].grad.float()
        torch.nn.utils.clip_grad_norm_(masters.values(), opt.max_grad_norm)
        optimizer.step()
        transformer.zero_grad()
        for name, weight in weights.items():
            weight.data.copy_(masters[name])
        losses.append(total)
    return losses, masters, before


def distance(weights, others):
    return sum((weights[name] - others[name]).square().sum() for name in others).sqrt()


if __name__ == "__main__":
    model, file, *cases = sys.argv[1:]
    world, results = read_world(), {}
    connect(world, 120)
    for case in cases:
        ds, precision, *modules = case.split(",")
        job = make_job(
            f"model.path={model}", "data.path=unused", "train.method=full", "optimizer.lr=1e-3",
            f"train.precision={precision}", f"full.modules=[{','.join(modules)}]", deepspeed=ds, world=world,
        )  # fmt: skip
        losses, weights = distributed(job, world)
        expected, masters, before = plain(job, world.size)
        assert weights.keys() == masters.keys()
        error, way = distance(weights, masters), distance(masters, before)
        results[case] = {"losses": losses, "expected": expected, "error": (error / way).item(), "weights": len(weights)}
    if world.rank == 0:
        Path(file).write_text(json.dumps(results))
    disconnect()

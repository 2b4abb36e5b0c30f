"""Run by test_memory_check.py on 2 ranks: a few steps at stages 2 and 3, with and without the memory check."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT, model_path, out = map(Path, sys.argv[-3:])
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from cogds.core.diffusion import v_loss  # noqa: E402
from cogds.core.geometry import ClipShape  # noqa: E402
from cogds.distributed.process_group import connect, disconnect  # noqa: E402
from cogds.distributed.world import read_world  # noqa: E402
from cogds.engine.start import load_for_stage, set_learning_rate, start_engine  # noqa: E402
from cogds.engine.state import gather_state  # noqa: E402
from cogds.model.load import find_model  # noqa: E402
from cogds.model.lora.adapter import inject  # noqa: E402
from cogds.train.memory_check import check_memory  # noqa: E402
from cogds.train.run import Run  # noqa: E402
from cogds.train.step import Draws, load_step_builder, random_batch  # noqa: E402
from cogds.train.tuning import choose_execution, prepare_blocks  # noqa: E402
from tests.jobs import make_job  # noqa: E402

BUCKETS, BATCH_SIZES = (ClipShape(9, 64, 96), ClipShape(17, 96, 128)), (2, 1)
NUM_STEPS, ACCUMULATION = 3, 2


def train(model, world, stage, memory_check):
    """Return losses and state after a few steps, whether the random state is unchanged, and the memory check's text."""
    job = make_job(
        f"model.path={model.path}", "data.path=unused", "train.precision=fp32", f"train.memory_check={memory_check}",
        f"train.gradient_accumulation_steps={ACCUMULATION}", "train.activation_checkpointing=selective",
        "train.activation_checkpointing_by_bucket={17x96x128: full}", "data.buckets=[9x64x96, 17x96x128]",
        deepspeed=f"zero{stage}", world=world,
    )  # fmt: skip
    cfg, ds_config = job.cfg, job.ds_config
    transformer = load_for_stage(model, torch.float32, ds_config, world)
    parameters = inject(transformer, 4, 8, 0.0, ("to_q", "to_k", "to_v", "to_out.0"), seed=0)
    transformer.train()
    execution = choose_execution(job, BATCH_SIZES)
    prepare_blocks(transformer, execution)
    engine = start_engine(transformer, parameters, ds_config)
    no_caption = torch.zeros(model.geometry.text_tokens, model.transformer_config["text_embed_dim"])
    builder = load_step_builder(model, cfg.conditioning, no_caption, torch.float32, world.device)
    data = SimpleNamespace(index=SimpleNamespace(sizes=((3,), (1,))))
    run = Run(job, data, SimpleNamespace(local_batch_sizes=BATCH_SIZES), execution, first_step=0)
    torch.manual_seed(world.rank)
    before = torch.get_rng_state()
    result = check_memory(run, engine, builder)
    same_random = bool((torch.get_rng_state() == before).all())
    batch = random_batch(BUCKETS[0], 2, model.geometry, no_caption.shape[1], "fp32")
    losses, kept = [], torch.zeros(2, dtype=torch.bool)
    engine.module.set_checkpointing(execution.buckets[0].checkpointing)
    for step in range(NUM_STEPS):
        set_learning_rate(engine, 1e-2)
        for micro_step in range(ACCUMULATION):
            slots = [4 * micro_step + 2 * world.rank + number for number in range(2)]
            inputs, target = builder.build(
                batch, BUCKETS[0], Draws(torch.tensor([300, 700]), kept, kept, 0, step, slots)
            )
            loss = v_loss(engine(**inputs)[0], target).mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    state = gather_state(engine, world)
    engine.destroy()
    return losses, state.tensors if world.rank == 0 else {}, same_random, str(result)


world = read_world()
connect(world, 120)
model, report = find_model(str(model_path)), {}
for stage in (2, 3):
    plain, checked = (train(model, world, stage, memory_check) for memory_check in ("off", "on"))
    report[stage] = {
        "losses": [plain[0], checked[0]],
        "different": [name for name, tensor in plain[1].items() if not torch.equal(tensor, checked[1][name])],
        "num_tensors": len(plain[1]),
        "random state kept": checked[2],
        "texts": [plain[3], checked[3]],
        "norms": {name: tensor.double().norm().item() for name, tensor in plain[1].items()},
    }
if world.rank == 0:
    out.write_text(json.dumps(report))
disconnect()

"""Run by test_export.py on 2 ranks: fill the LoRA with random numbers, save the engine's output and the LoRA file."""

import json
import sys
from pathlib import Path

ROOT, model_path, ds_path, folder = map(Path, sys.argv[-4:])
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from cogds.distributed.process_group import connect, disconnect  # noqa: E402
from cogds.distributed.world import read_world  # noqa: E402
from cogds.engine.start import load_for_stage, start_engine  # noqa: E402
from cogds.engine.state import TrainState, gather_state, restore_state, trainable  # noqa: E402
from cogds.model.load import find_model  # noqa: E402
from cogds.model.lora.adapter import export, inject  # noqa: E402

world = read_world()
connect(world, 120)
ds_config = json.loads(ds_path.read_text())
model = find_model(str(model_path))
transformer = load_for_stage(model, torch.float32, ds_config, world)
parameters = inject(transformer, 4, 12, 0.0, ("to_q", "to_v", "to_out.0"), seed=0)  # alpha is three times the rank
engine = start_engine(transformer, parameters, ds_config)
generator = torch.Generator().manual_seed(1)
shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in trainable(engine).items()}
weights = {f"weight/{name}": 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
restore_state(engine, TrainState(weights), world)
example = torch.load(folder / "inputs.pt")
with torch.no_grad():
    output = engine(**example)[0]
state = gather_state(engine, world)
if world.rank == 0:
    export(folder / "lora", engine.module, state.weights(dict.fromkeys(shapes, torch.float32)), {})
    torch.save(output, folder / "output.pt")
disconnect()

"""A loss with the noise taken out: fixed timesteps and noise, nothing dropped. Two weights can be compared by it."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from cogds.cli import parse_args
from cogds.config import load_config, replace
from cogds.core.diffusion import v_loss
from cogds.data.cache import Cache, DamagedEntry
from cogds.data.dataset import Item, collate, read_encoded
from cogds.encode import DTYPES, EncodedData, prepare
from cogds.errors import UserError
from cogds.model.load import find_model, load_transformer
from cogds.model.lora import load_into
from cogds.model.lora_file import read_metadata
from cogds.runtime.world import World
from cogds.step import Draws, StepBuilder, load_step_builder
from cogds.survey import make_buckets

NUM_TIMESTEPS = 9


def main(default_config: Path, argv: list[str] | None = None) -> None:
    """Print the evaluation loss of the run's model, with a LoRA or without, as one line of JSON."""
    args = parse_args(
        sys.argv[1:] if argv is None else argv,
        "Evaluate a model on its dataset with fixed timesteps and fixed noise.",
        lambda parser: parser.add_argument(
            "--lora", metavar="LORA", help="a LoRA file or folder; none: the base model"
        ),
    )
    cfg, _ = load_config(args.config or str(default_config), args.overrides)
    convention = read_metadata(args.lora).get("image_latents") if args.lora else None
    cfg = replace(
        cfg,
        {
            "data.encode": "cached",
            "conditioning.image_noise": False,
            "conditioning.image_latents": convention or cfg.conditioning.image_latents,  # as it was trained
        },
    )
    model = find_model(cfg.model.path, cfg.model.revision)
    world = World(0, 1, 0, 1)
    data = prepare(cfg, model, make_buckets(cfg, model), world)
    dtype = DTYPES[cfg.train.precision]
    transformer = load_transformer(model, dtype, world.device)
    if args.lora:
        load_into(transformer, args.lora)
    builder = load_step_builder(model, cfg.conditioning, data.no_caption_states, dtype, world.device)
    print(json.dumps(evaluation_loss(transformer.eval(), builder, data, cfg.data.cache_dir, cfg.seed)))


@torch.no_grad()
def evaluation_loss(
    transformer: Any, builder: StepBuilder, data: EncodedData, cache_dir: str, seed: int
) -> dict[str, float]:
    """`eval/loss`, and `eval/loss/bucket=...`: means over clips and over the middles of equal slices of [0, T)."""
    num_timesteps = len(builder.alphas_cumprod)
    timesteps = [num_timesteps * (2 * i + 1) // (2 * NUM_TIMESTEPS) for i in range(NUM_TIMESTEPS)]
    kept, cache = torch.zeros(1, dtype=torch.bool), Cache(cache_dir)
    by_bucket: dict[str, list[float]] = {}
    for row in range(len(data.index)):
        clip = data.index[row]
        try:
            batch = collate([Item(read_encoded(cache, clip))])
        except DamagedEntry as error:
            raise UserError(str(error)) from None
        for number, timestep in enumerate(timesteps):
            draws = Draws(torch.tensor([timestep]), kept, kept, seed, row, [number])
            inputs, target = builder.build(batch.tensors, clip.shape, draws)
            loss = v_loss(transformer(**inputs)[0], target).item()
            by_bucket.setdefault(f"eval/loss/bucket={clip.shape}", []).append(loss)
    every = [loss for losses in by_bucket.values() for loss in losses]
    return {"eval/loss": sum(every) / len(every)} | {name: sum(ls) / len(ls) for name, ls in by_bucket.items()}

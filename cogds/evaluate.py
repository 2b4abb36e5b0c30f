"""The evaluate verb: the evaluation losses of a model, with or without a LoRA."""

import argparse
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch

from cogds.config.schema import RunConfig
from cogds.distributed.process_group import connect, disconnect
from cogds.distributed.world import read_world
from cogds.encode.encoder import encode_dataset
from cogds.encode.tiling import choose_tiling
from cogds.errors import UserError, refuse_to_run
from cogds.job import load_job
from cogds.model.load import DTYPES, ModelFolder, load_transformer
from cogds.model.lora.adapter import add_lora
from cogds.model.lora.convert import check_all_fit, load_adapter
from cogds.model.lora.file import LoraFile, describe_lora, read_loras
from cogds.model.transformer.attention import require_kernel
from cogds.model.transformer.quantize import check_quantization
from cogds.train.evaluation import make_evaluation
from cogds.train.step import load_step_builder

logger = logging.getLogger(__name__)

ALL_CLIPS = 2**31 - 1


def main(args: argparse.Namespace) -> None:
    """Print the losses as one line of JSON, with the tags that a run uses.

    Several ranks share the work. Each holds the whole model, because ZeRO is not used.
    """
    changes: dict[str, Any] = {"eval.every": 1}
    if args.all:
        changes["eval.num_clips"] = ALL_CLIPS
    loras = read_loras([args.lora] if args.lora else [], args.lora_alpha, "--lora-alpha")
    if loras and (convention := loras[0].metadata.get("image_latents")):
        changes["conditioning.image_latents"] = convention  # as the LoRA was trained
    job = load_job(args, read_world(), changes=changes, evaluated_only=True)
    cfg, model, world = job.cfg, job.model, job.world
    check_all_fit(loras, model)
    for lora in loras:
        logger.info("\n".join(describe_lora(lora, "--lora-alpha")))
    check_quantization(cfg.model.quantization, cfg.model.fp8_matmul, cfg.train.precision, 0, world.device)
    if world.size > 1:
        connect(world, cfg.train.timeout_s, cfg.network)
    job = choose_tiling(job)
    data = encode_dataset(job)
    transformer = load_eval_transformer(cfg, model, world.device, loras)
    builder = load_step_builder(model, cfg.conditioning, data.empty_caption_states, job.dtype, world.device)
    evaluation = make_evaluation(job, data, builder, job.batch_sizes)
    if evaluation is None:
        raise UserError(
            f"data.path: no clip to evaluate in {cfg.data.path} can be read. Repair the files, or choose other data."
        )
    scalars = evaluation.scalars(lambda inputs: transformer(**inputs)[0])
    if world.rank == 0:
        print(json.dumps(scalars))
    if world.size > 1:
        disconnect()


def load_eval_transformer(
    cfg: RunConfig, model: ModelFolder, device: torch.device, loras: Sequence[LoraFile] = ()
) -> Any:
    """Load the whole transformer in evaluation mode, with the config's precision and kernel, and add the LoRAs."""
    transformer = load_transformer(
        model, DTYPES[cfg.train.precision], device, cfg.model.quantization, cfg.model.fp8_matmul
    )
    for lora in loras:
        add_lora(transformer, load_adapter(lora))
    if cfg.model.attention != "auto":
        require_kernel(cfg.model.attention, device)
        transformer.set_kernel(cfg.model.attention)
    return transformer.eval()


if __name__ == "__main__":
    refuse_to_run("cogds.evaluate", "evaluate")

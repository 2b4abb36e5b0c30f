"""The evaluate verb: the evaluation losses of a model, with or without a LoRA."""

import argparse
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch

from cogds.config.schema import RunConfig
from cogds.core.condition_modes import MIN_CONTEXT
from cogds.distributed.process_group import connect, disconnect
from cogds.distributed.world import read_world
from cogds.encode.encoder import encode_dataset
from cogds.encode.tiling import choose_tiling
from cogds.errors import UserError, refuse_to_run
from cogds.job import load_job
from cogds.model.control import add_control
from cogds.model.load import DTYPES, ModelFolder, load_transformer
from cogds.model.lora.adapter import add_lora
from cogds.model.lora.convert import check_all_fit, load_adapter
from cogds.model.lora.file import describe_lora, read_loras
from cogds.model.transformer.attention import require_kernel
from cogds.model.transformer.quantize import check_quantization
from cogds.process.progress import progress_bar
from cogds.train.evaluation import Evaluation, make_evaluation
from cogds.train.step import load_step_builder

logger = logging.getLogger(__name__)

ALL_CLIPS = 2**31 - 1
# Parts of tags, as in `train.evaluation.mean_losses` -> names in the table.
GROUP_NAMES = {"loss": "held-out clips", "train_loss": "trained clips"}
DETAIL_NAMES = {"t": "timestep", "bucket": "bucket", "mode": "mode"}


def main(args: argparse.Namespace) -> None:
    """Print the losses of the base model and, beside them, with the LoRA: as a table, or as one line of JSON.

    Several ranks share the work. Each holds the whole model, because ZeRO is not used.
    """
    changes: dict[str, Any] = {"eval.every": 1}
    if args.all:
        changes["eval.num_clips"] = ALL_CLIPS
    loras = read_loras([args.lora] if args.lora else [], args.lora_alpha, "--lora-alpha")
    if loras and (convention := loras[0].metadata.get("image_latents")):
        changes["conditioning.image_latents"] = convention  # as the LoRA was trained
    if loras and (modes := loras[0].metadata.get("modes")):
        context = loras[0].metadata.get("context_latents", MIN_CONTEXT)
        times = tuple(loras[0].metadata.get("keyframe_times", ()))
        changes |= {
            "conditioning.modes": modes,
            "conditioning.context_latents": context,
            "conditioning.context_s": None,
            "conditioning.keyframe_times": times,
        }
    if loras and loras[0].control:
        changes["conditioning.control"] = True  # as the LoRA was trained
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
    transformer = load_eval_transformer(cfg, model, world.device)
    builder = load_step_builder(
        model, cfg.conditioning, data.empty_caption_states, job.dtype, world.device, job.condition_settings
    )
    evaluation = make_evaluation(job, data, builder, job.batch_sizes)
    if evaluation is None:
        raise UserError(
            f"data.path: no clip to evaluate in {cfg.data.path} can be read. Repair the files, or choose other data."
        )
    logger.info("evaluating %s", evaluation)
    # Both with the inputs that the LoRA was trained with, so that the base is the LoRA before training.
    if cfg.conditioning.control:
        add_control(transformer, model.geometry.latent_channels)  # zero, until a LoRA is added
    losses = {"base": evaluate(evaluation, transformer, "base")}
    for lora in loras:
        add_lora(transformer, load_adapter(lora))
        losses["LoRA"] = evaluate(evaluation, transformer.eval(), "LoRA")
    if world.rank == 0:
        print(json.dumps(losses) if args.json else "\n".join(loss_table(losses)))
    if world.size > 1:
        disconnect()


def evaluate(evaluation: Evaluation, transformer: Any, name: str) -> dict[str, float]:
    """Return the losses by tag, and show the progress. Collective."""
    bar = progress_bar(f"evaluating the {name}", "pass", len(evaluation.rounds), evaluation.world.rank == 0)

    def forward(inputs: Mapping[str, Any]) -> torch.Tensor:
        output = transformer(**inputs)[0]
        bar.update()
        return output

    try:
        return evaluation.scalars(forward)
    finally:
        bar.close()


def loss_table(losses: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a table with a row for each tag and a column for each model, and the change from the first to the last.

    losses: losses by tag, as in `train.evaluation.mean_losses`, by name of the model.
    """
    columns = list(losses.values())
    rows = [["loss", *losses, *(["change"] if len(columns) > 1 else [])]]
    for tag in columns[0]:
        _, group, *detail = tag.replace("=", "/").split("/")
        name = f"  {DETAIL_NAMES[detail[0]]} {detail[1]}" if detail else GROUP_NAMES[group]
        values = [column[tag] for column in columns]
        change = [f"{100 * (values[-1] / values[0] - 1):+.1f}%"] if len(values) > 1 else []
        rows.append([name, *(f"{value:.4f}" for value in values), *change])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        f"{row[0]:{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
        for row in rows
    ]


def load_eval_transformer(cfg: RunConfig, model: ModelFolder, device: torch.device) -> Any:
    """Load the whole transformer in evaluation mode, with the config's precision and kernel."""
    transformer = load_transformer(
        model, DTYPES[cfg.train.precision], device, cfg.model.quantization, cfg.model.fp8_matmul
    )
    if cfg.model.attention != "auto":
        require_kernel(cfg.model.attention, device)
        transformer.set_kernel(cfg.model.attention)
    return transformer.eval()


if __name__ == "__main__":
    refuse_to_run("cogds.evaluate", "evaluate")

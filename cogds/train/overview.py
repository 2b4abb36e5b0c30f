"""What TensorBoard shows of a run besides curves: its settings, its buckets, and the first clips that rank 0 trains.

No random numbers are drawn for it, so it does not change the run. An image that cannot be made causes only a warning.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from cogds.config.deepspeed import zero_stage
from cogds.config.loading import to_yaml
from cogds.core.flops import step_flops
from cogds.core.geometry import num_tokens
from cogds.core.plan import MicroBatch
from cogds.data.loading.dataset import Batch
from cogds.errors import brief
from cogds.metrics.figures import CELL, contact_sheet, share_chart
from cogds.metrics.monitor import Monitor
from cogds.process.logs import log_failure
from cogds.train.run import Run
from cogds.train.step import StepBuilder

logger = logging.getLogger(__name__)

# Metrics that TensorBoard's HParams tab compares runs by.
HPARAM_METRICS = ("train/loss", "eval/loss", "eval/train_loss")
FIRST_FRAMES = "data/first_frames"
MAX_DECODED = 4  # clips per micro-batch
SHEET_CLIPS = 8  # clips per contact sheet
# Each clip is shown once. So that a few clips that other ranks train do not delay the sheet, rank 0 waits for this many
# samples per clip.
SAMPLES_PER_CLIP = 4


def log_overview(run: Run, monitor: Monitor) -> None:
    """Write the resolved configs, the hyperparameters and a chart of the buckets, on rank 0."""
    if run.world.rank != 0:
        return
    monitor.add_text("config/run", to_yaml(run.cfg))
    monitor.add_text("config/deepspeed", json.dumps(run.ds_config, indent=2))
    monitor.add_hparams(hparams(run), HPARAM_METRICS)
    try:
        monitor.add_image(run.first_step, "data/buckets", draw_bucket_shares(run))
    except Exception as error:
        log_failure(logger, f"TensorBoard image data/buckets could not be made: {brief(error)}", error)


def hparams(run: Run) -> dict[str, str | float | bool]:
    """Return the settings to compare runs by: values of the config, and values that follow from them.

    TensorBoard sorts them by name and first shows five. So these are important ones, and names that would come before
    them are not those of the config.
    """
    cfg, plan = run.cfg, run.plan
    tokens = [num_tokens(shape, run.model.geometry) for shape in run.buckets]
    return {
        "clips": len(run.data.index),
        **({"lora.alpha": cfg.lora.alpha, "lora.rank": cfg.lora.rank} if cfg.trains_lora else {}),
        "optimizer.lr": cfg.optimizer.lr,
        "optimizer.schedule": cfg.optimizer.schedule,
        "optimizer.weight_decay": cfg.optimizer.weight_decay,
        "target modules": ", ".join(cfg.lora.target_modules if cfg.trains_lora else cfg.full.modules or ("all",)),
        "train.num_steps": cfg.train.num_steps,
        "train.precision": cfg.train.precision,
        "train.gradient_accumulation_steps": plan.accumulation,
        "tokens per rank and micro-step": max(num * size for num, size in zip(tokens, plan.local_batch_sizes)),
        "train.activation_checkpointing": "; ".join(
            sorted({str(part.checkpointing) for part in run.execution.buckets})
        ),
        "ranks": run.world.size,
        "zero stage": zero_stage(run.ds_config),
        "quantization": cfg.model.quantization,
        "scale of image latents": cfg.conditioning.image_latents if run.model.family.takes_image else "none",
        "weights": cfg.model.path,
        "seed": cfg.seed,
    }


def draw_bucket_shares(run: Run) -> np.ndarray:
    """Draw each bucket's share of the clips, the tokens and the cost of an epoch."""
    num_clips = [sum(sets) for sets in run.data.index.sizes]
    num_trained = run.data.mixture.virtual_sizes
    tokens = [num_tokens(shape, run.model.geometry) for shape in run.buckets]
    costs = [step_flops(num, run.model.num_layers, run.model.hidden_size).model_flops for num in tokens]
    series: dict[str, Sequence[float]] = {
        "clips": num_clips,
        "tokens": [num * size for num, size in zip(num_trained, tokens)],
        "cost": [num * cost for num, cost in zip(num_trained, costs)],
    }
    shares = [(name, [value / (sum(values) or 1) for value in values]) for name, values in series.items()]
    return share_chart("Shares of an epoch", [str(shape) for shape in run.buckets], shares)


class FirstBatchLogger:
    """Writes the first frames and decoded videos of the first clips that this rank trains."""

    def __init__(self, run: Run, builder: StepBuilder, monitor: Monitor) -> None:
        self._run, self._builder, self._monitor = run, builder, monitor
        self._frames: list[np.ndarray] = []
        self._captions: list[str] = []
        self._rows: set[int] = set()
        self._num_samples = 0
        self._is_done = False

    def log(self, step: int, micro_batch: MicroBatch, batch: Batch) -> None:
        """Log a batch before it is trained (`batches.OnBatch`). Does nothing after the first batches. Never raises."""
        cfg, num_passed = self._run.cfg.metrics, step - self._run.first_step
        if cfg.show_clips and not self._is_done:
            try:
                self._collect(step, batch)
            except Exception as error:
                self._finish()
                log_failure(logger, f"TensorBoard image {FIRST_FRAMES} could not be made: {brief(error)}", error)
        if num_passed < cfg.show_batches:
            try:
                self._decode(step, micro_batch, batch)
            except Exception as error:  # out of memory, most likely
                log_failure(logger, f"the batch of step {step + 1} could not be decoded: {brief(error)}", error)

    def _collect(self, step: int, batch: Batch) -> None:
        index, num_steps = self._run.data.index, self._run.cfg.train.num_steps
        num = min(self._run.cfg.metrics.show_clips, len(index))
        for choice, frame in zip(batch.choices, batch.tensors["first_frame"]):
            self._num_samples += 1
            if choice.row in self._rows or len(self._rows) == num:
                continue
            self._rows.add(choice.row)
            clip = index[choice.row]
            self._frames.append(_shrink(frame))
            self._captions.append(f"{clip.shape}  {clip.captions[choice.caption].text}")
        is_late = self._num_samples >= SAMPLES_PER_CLIP * num or step + 1 == num_steps
        if self._frames and (len(self._rows) == num or is_late):
            for number, start in enumerate(range(0, len(self._frames), SHEET_CLIPS), 1):
                part = slice(start, start + SHEET_CLIPS)
                name = FIRST_FRAMES if number == 1 else f"{FIRST_FRAMES}/{number}"
                self._monitor.add_image(step + 1, name, contact_sheet(self._frames[part], self._captions[part]))
            self._monitor.add_text(FIRST_FRAMES, "\n".join(self._captions))
            self._finish()

    def _finish(self) -> None:
        self._is_done, self._frames, self._captions = True, [], []

    @torch.no_grad()
    def _decode(self, step: int, micro_batch: MicroBatch, batch: Batch) -> None:
        vae: Any = self._builder.vae
        was_tiled = vae.use_tiling
        vae.enable_tiling()
        try:
            for number, moments in enumerate(batch.tensors["moments"][:MAX_DECODED]):
                mean = moments[None, : len(moments) // 2].to(self._builder.device, vae.dtype)
                video = vae.decode(mean).sample[0].float()  # [3, F, H, W]
                frames = ((video / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).cpu().numpy()
                tag = f"data/decoded/{micro_batch.slots_of(self._run.world.data_rank)[number]}"
                if len(frames) == 1:
                    self._monitor.add_image(step + 1, tag, frames[0])
                else:
                    self._monitor.add_video(step + 1, tag, frames, self._run.cfg.data.fps)
        finally:
            vae.use_tiling = was_tiled


def _shrink(frame: torch.Tensor) -> np.ndarray:
    """Resize a first frame, uint8 [3, H, W], to the width of a contact sheet's cell, uint8 [h, w, 3].

    Returns a copy, because a view would keep the pinned memory of the whole batch.
    """
    image = Image.fromarray(frame.permute(1, 2, 0).cpu().numpy())
    return np.array(image.resize((CELL, max(1, round(CELL * image.height / image.width))), Image.Resampling.LANCZOS))

"""What TensorBoard shows of a run before its curves: settings, the buckets, and the first clips as the model sees them.

Rank 0 shows its own clips. Nothing is drawn at random for it, so the run stays bit for bit what it would have been.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cogds.config import to_yaml
from cogds.core.cost import step_flops
from cogds.core.geometry import num_tokens
from cogds.core.plan import MicroBatch
from cogds.data.dataset import Batch
from cogds.data.sampler import draws_of
from cogds.run import Run
from cogds.runtime.ds_config import zero_stage
from cogds.runtime.monitor import Monitor
from cogds.show.figures import bar_chart, contact_sheet
from cogds.step import StepBuilder

# What runs are compared by in TensorBoard's HParams tab.
COMPARED = ("train/loss", "eval/loss", "eval/train_loss")
MAX_DECODED = 4  # clips of a step that are decoded back


def show_settings(run: Run, monitor: Monitor) -> None:
    """The resolved configs as texts, the settings that runs are compared by, and the buckets as bars."""
    monitor.text("config/run", to_yaml(run.cfg))
    monitor.text("config/deepspeed", json.dumps(run.ds_config, indent=2))
    monitor.hparams(settings(run), COMPARED)
    monitor.picture(run.first_step, "data/buckets", bucket_bars(run))


def settings(run: Run) -> dict[str, str | float | bool]:
    """What one run differs from another by: plain values under the names of the config, and what follows from them."""
    cfg, plan = run.cfg, run.plan
    tokens = [num_tokens(shape, run.model.geometry) for shape in run.buckets]
    return {
        "optimizer.lr": cfg.optimizer.lr,
        "optimizer.schedule": cfg.optimizer.schedule,
        "optimizer.weight_decay": cfg.optimizer.weight_decay,
        "lora.rank": cfg.lora.rank,
        "lora.alpha": cfg.lora.alpha,
        "lora.target_modules": ", ".join(cfg.lora.target_modules),
        "train.num_steps": cfg.train.num_steps,
        "train.precision": cfg.train.precision,
        "train.gradient_accumulation_steps": plan.accumulation,
        "tokens a rank and micro-step": max(num * size for num, size in zip(tokens, plan.local_batch_sizes)),
        "recompute": ", ".join(sorted(set(run.execution.levels))),
        "ranks": run.world.size,
        "zero stage": zero_stage(run.ds_config),
        "model.base": cfg.model.base,
        "model.path": cfg.model.path,
        "conditioning.image_latents": cfg.conditioning.image_latents,
        "clips": len(run.data.index),
        "seed": cfg.seed,
    }


def bucket_bars(run: Run) -> np.ndarray:
    """Each bucket's share of the clips, of the tokens and of the cost of an epoch."""
    num_clips = [sum(sets) for sets in run.data.index.sizes]
    num_trained = run.data.mixture.virtual_sizes
    tokens = [num_tokens(shape, run.model.geometry) for shape in run.buckets]
    costs = [step_flops(one, run.model.num_layers, run.model.hidden_size).counted for one in tokens]

    def shares(values: list[float]) -> list[float]:
        return [value / (sum(values) or 1.0) for value in values]

    series = [
        ("clips", shares([float(num) for num in num_clips])),
        ("tokens", shares([float(num * one) for num, one in zip(num_trained, tokens)])),
        ("cost", shares([num * one for num, one in zip(num_trained, costs)])),
    ]
    return bar_chart("What an epoch consists of", [str(shape) for shape in run.buckets], series)


class FirstBatches:
    """Collects the first clips that this rank trains, and shows them."""

    def __init__(self, run: Run, builder: StepBuilder, monitor: Monitor, warn: Callable[[str], None]) -> None:
        self._run, self._builder, self._monitor, self._warn = run, builder, monitor, warn
        self._frames: list[np.ndarray] = []
        self._captions: list[str] = []
        self._shown = False

    def look(self, step: int, micro_batch: MicroBatch, batch: Batch) -> None:
        """To be given every batch: optimizer step from 0, micro-step, tensors. Costs nothing once all are shown."""
        cfg, passed = self._run.cfg.monitor, step - self._run.first_step
        if cfg.show_clips and not self._shown:
            self._collect(micro_batch, batch)
            last = step + 1 == self._run.cfg.train.num_steps
            if self._frames and (len(self._frames) >= cfg.show_clips or last):
                self._shown = True
                frames, captions = self._frames[: cfg.show_clips], self._captions[: cfg.show_clips]
                self._monitor.picture(step + 1, "data/first_frames", contact_sheet(frames, captions))
        if passed < cfg.show_batches:
            self._decode(step, micro_batch, batch)

    def _collect(self, micro_batch: MicroBatch, batch: Batch) -> None:
        if batch.bad:
            return  # of a stand-in, which caption is not known here
        order = self._run.order
        clips = [order.index[next(order.rows(draw))] for draw in draws_of(micro_batch, self._run.world.data_rank)]
        for clip, frame in zip(clips, batch.tensors["first_frame"]):
            self._frames.append(frame.permute(1, 2, 0).cpu().numpy())
            self._captions.append(f"{clip.shape}  {clip.caption}")

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
                where = f"data/decoded/{micro_batch.slots_of(self._run.world.data_rank)[number]}"
                if len(frames) == 1:
                    self._monitor.picture(step + 1, where, frames[0])
                else:
                    self._monitor.animation(step + 1, where, frames, self._run.cfg.data.fps)
        except RuntimeError as error:  # out of memory, most likely
            self._warn(f"the batch of step {step + 1} could not be decoded ({str(error).splitlines()[0]})")
        finally:
            vae.use_tiling = was_tiled

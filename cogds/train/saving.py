"""The callback that saves: a checkpoint to resume from, and the LoRA with its model card."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import cogds
from cogds.card import pipeline_factor, write_card
from cogds.distributed.collectives import on_rank0
from cogds.encode.scan_data import caption_prefixes
from cogds.engine import checkpoint as checkpoints
from cogds.engine.state import gather_state, state_bytes, trainable
from cogds.metrics.monitor import Monitor
from cogds.model.lora.adapter import export
from cogds.train.run import Run


class CheckpointCallback:
    """Saves in a background thread (`callbacks.Callback`). Each save first waits for the previous one."""

    name = "saving"
    at_start = False
    on_stop = True

    def __init__(self, run: Run, engine: Any, monitor: Monitor, header: Mapping[str, Any]):
        """header: JSON-serializable values to store in each checkpoint's state.json."""
        self.every = run.cfg.checkpoint.every
        self._run, self._engine, self._monitor, self._header = run, engine, monitor, header
        self._saver = checkpoints.Saver()
        self._output_dir = Path(run.cfg.output_dir)

    def run(self, step: int) -> None:
        """Start saving the state after `step` optimizer steps. Collective.

        Raises UserError if the previous save failed, or the disk is full.
        """
        began = time.perf_counter()
        self.finish(step)
        on_rank0(self._run.world, lambda: check_space(self._output_dir, self._engine))
        state = gather_state(self._engine, self._run.world)
        # Read now, because sampling the base model may disable the LoRA while the thread writes.
        dtypes = {name: parameter.dtype for name, parameter in trainable(self._engine).items()}
        if self._run.world.rank == 0:
            self._saver.start(lambda: self._write(step, state, dtypes))
        self._monitor.add_scalars(step, {"checkpoint/pause_s": time.perf_counter() - began})

    def _write(self, step: int, state: Any, dtypes: Mapping[str, torch.dtype]) -> None:
        settings = self._run.cfg.checkpoint
        folder = self._output_dir / "lora" / checkpoints.step_name(step)
        export_lora(self._engine.module, state.weights(dtypes), self._run, folder)
        checkpoints.write(
            self._output_dir / "checkpoints", step, state, self._header, settings.keep_last, settings.keep_every
        )

    @property
    def is_written(self) -> bool:
        """Whether a save has ended, successfully or not, and `finish` has not been called since. Rank 0 only."""
        return self._saver.is_done

    def finish(self, step: int) -> None:
        """Wait for the save in progress, if any, and record its duration. Raises its error. Collective."""
        seconds = self._saver.finish(self._run.world)
        if seconds is not None:
            self._monitor.add_scalars(step, {"checkpoint/write_s": seconds})


def check_space(output_dir: Path, engine: Any) -> None:
    """Raise UserError if the disk has no room for one save: the state, and a LoRA of at most a third of its size."""
    checkpoints.check_space(output_dir, 4 / 3 * state_bytes(engine))


def export_lora(transformer: Any, weights: Mapping[str, torch.Tensor], run: Run, folder: Path) -> None:
    """Write the LoRA and its model card into `folder`, complete or not at all.

    weights: whole tensors by parameter name.
    """
    partial, metadata = folder.with_name(folder.name + ".tmp"), lora_metadata(run, checkpoints.step_of(folder))
    checkpoints.remove_partial(folder.parent)
    export(partial, transformer, weights, metadata)
    write_card(partial, folder, metadata)
    checkpoints.replace_folder(partial, folder)


def lora_metadata(run: Run, step: int) -> dict[str, Any]:
    """Collect the metadata that is recorded in the LoRA's header."""
    cfg, plan = run.cfg, run.plan
    batches = sorted({size * run.world.data_size * plan.accumulation for size in plan.local_batch_sizes})
    image_settings: dict[str, Any] = {}
    if run.model.family.takes_image:
        convention = cfg.conditioning.image_latents
        image_settings["image_latents"] = convention
        image_settings["image_latent_factor"] = pipeline_factor(run.model.vae_config, convention)
    metadata = {
        "cogds_version": cogds.__version__,
        "step": step,
        "base_model": cfg.model.path,
        "task": run.model.family.task,
        "quantization": cfg.model.quantization,
        "rank": cfg.lora.rank,
        "alpha": cfg.lora.alpha,
        "targets": list(cfg.lora.target_modules),
        "init_from": cfg.lora.init_from,
        **image_settings,
        "buckets": [str(shape) for shape in run.buckets],
        "fps": cfg.data.fps,
        "num_clips": len(run.data.index),
        "batch_size": batches[0] if len(batches) == 1 else f"{batches[0]} to {batches[-1]}",
        "learning_rate": cfg.optimizer.lr,
        "precision": cfg.train.precision,
        "seed": cfg.seed,
    }
    if trigger_words := list(dict.fromkeys(filter(None, map(str.strip, caption_prefixes(cfg))))):
        metadata["trigger_words"] = trigger_words
    if cfg.data.default_caption:
        metadata["instance_prompt"] = cfg.data.default_caption
    if cfg.sample.prompts:
        metadata["example_prompt"] = cfg.sample.prompts[0].prompt
    return metadata

"""The callback that saves: a checkpoint to resume from, and the LoRA or the model with its card."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cogds.card import write_card
from cogds.config.schema import RunConfig
from cogds.distributed.collectives import on_rank0
from cogds.engine import checkpoint as checkpoints
from cogds.engine.state import gather_state, state_bytes, trainable
from cogds.model.lora.adapter import export
from cogds.train.callbacks import TrainContext
from cogds.train.full_saving import FULL_EXPORTS, FullSaver, full_save_bytes
from cogds.train.metadata import export_metadata
from cogds.train.run import Run


class CheckpointCallback:
    """Saves in background threads (`callbacks.Callback`). Each save first waits for the previous one."""

    name = "saving"
    at_start = False
    on_stop = True

    def __init__(self, context: TrainContext, header: Mapping[str, Any]):
        """header: JSON-serializable values to store in each checkpoint's state.json."""
        run = context.run
        self.every = run.cfg.checkpoint.every
        self._run, self._engine, self._monitor, self._header = run, context.engine, context.monitor, header
        self._saver = checkpoints.Saver()
        self._output_dir = Path(run.cfg.output_dir)
        self._full = None if run.cfg.trains_lora else FullSaver(context)

    def run(self, step: int) -> None:
        """Start saving the state after `step` optimizer steps. Collective.

        Raises UserError if the previous save failed, or the disk is full.
        """
        began = time.perf_counter()
        self.finish(step)
        on_rank0(self._run.world, lambda: check_space(self._run, self._engine))
        if self._full is None:
            self._start_lora(step)
        else:
            self._saver.start(*self._full.begin(step, self._header))
            if not self._full.in_background:
                self.finish(step)
        self._monitor.add_scalars(step, {"checkpoint/pause_s": time.perf_counter() - began})

    def _start_lora(self, step: int) -> None:
        state = gather_state(self._engine, self._run.world)
        # Read now, because sampling the base model may disable the LoRA while the thread writes.
        dtypes = {name: parameter.dtype for name, parameter in trainable(self._engine).items()}
        self._saver.start(lambda _: self._write(step, state, dtypes) if self._run.world.rank == 0 else None)

    def _write(self, step: int, state: Any, dtypes: Mapping[str, torch.dtype]) -> None:
        settings = self._run.cfg.checkpoint
        folder = self._output_dir / "lora" / checkpoints.step_name(step)
        export_lora(self._engine.module, state.weights(dtypes), self._run, folder)
        checkpoints.write(
            self._output_dir / "checkpoints", step, state, self._header, settings.keep_last, settings.keep_every
        )

    @property
    def is_busy(self) -> bool:
        """Whether this rank is writing."""
        return self._saver.is_busy

    def advance(self, step: int) -> None:
        """Go on with a save that no rank is writing: begin its next part, or record its duration. Collective.

        Raises UserError if a rank failed.
        """
        self._record(step, self._saver.advance(self._run.world))

    def finish(self, step: int) -> None:
        """Wait for the save in progress, if any, and record its duration. Raises its error. Collective."""
        self._record(step, self._saver.finish(self._run.world))

    def _record(self, step: int, seconds: float | None) -> None:
        if seconds is not None:
            self._monitor.add_scalars(step, {"checkpoint/write_s": seconds})


def export_folder(cfg: RunConfig) -> str:
    """Return the folder, in the output folder, of what a run trains: LoRAs, or whole models."""
    return "lora" if cfg.trains_lora else FULL_EXPORTS


def check_space(run: Run, engine: Any) -> None:
    """Raise UserError if the disk has no room for a save: the state, and a LoRA (at most a third of it) or a model."""
    needed = 4 / 3 * state_bytes(engine) if run.cfg.trains_lora else full_save_bytes(run, state_bytes(engine))
    checkpoints.check_space(Path(run.cfg.output_dir), needed)


def export_lora(transformer: Any, weights: Mapping[str, torch.Tensor], run: Run, folder: Path) -> None:
    """Write the LoRA and its model card into `folder`, complete or not at all.

    weights: whole tensors by parameter name.
    """
    partial, metadata = folder.with_name(folder.name + ".tmp"), export_metadata(run, checkpoints.step_of(folder))
    checkpoints.remove_partial(folder.parent)
    export(partial, transformer, weights, metadata)
    write_card(partial, folder, metadata)
    checkpoints.replace_folder(partial, folder)

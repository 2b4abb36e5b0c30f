"""A save of a full fine-tune: every rank writes its part of the checkpoint and some files of the exported model.

The export is made from the files of the checkpoint, so no weights are gathered over the ranks. A background thread of
each rank writes from a copy of the state in (on GPUs, pinned) host memory. Where that does not fit, training waits.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogds.card import FULL, write_card
from cogds.config.schema import RunConfig
from cogds.distributed.collectives import all_gather, on_rank0
from cogds.engine import checkpoint as checkpoints
from cogds.engine.shards import EMA, Shard, ShardReader, local_shard, shard_header, shard_name
from cogds.engine.state import WEIGHT
from cogds.errors import UserError
from cogds.formatting import gigabytes
from cogds.model.full_export import FullExport, ReadWeight
from cogds.process.host_memory import HostBuffer, available_memory_bytes
from cogds.train.callbacks import TrainContext
from cogds.train.metadata import export_metadata
from cogds.train.run import Run

logger = logging.getLogger(__name__)

# Share of the available host memory that copies of the state may take.
COPY_SHARE = 0.5
# Folders of exported models in the output folder, and the kind of tensors that they are made from.
FULL_EXPORTS, EMA_EXPORTS = "model", "model_ema"


def full_export(run: Run, step: int) -> FullExport:
    """Return what is exported after `step` optimizer steps."""
    metadata = export_metadata(run, step)
    factor = metadata.pop("image_latent_factor", 1.0)
    if convention := metadata.get("image_latents"):
        metadata |= {"image_latents": "pipeline", "trained_image_latents": convention}
    return FullExport(run.model, run.job.dtype, frozenset(run.job.targets), factor, metadata)


def exports(cfg: RunConfig) -> dict[str, str]:
    """Return the folders of exported models, and the kind of tensors that each is made from."""
    return {FULL_EXPORTS: WEIGHT} | ({EMA_EXPORTS: EMA} if cfg.full.ema_decay is not None else {})


def full_save_bytes(run: Run, state_bytes: int) -> int:
    """Return the disk space of a save. state_bytes: of the weights and two moments."""
    folders = exports(run.cfg)
    return (
        state_bytes + (state_bytes // 3 if EMA_EXPORTS in folders else 0) + len(folders) * full_export(run, 0).num_bytes
    )


class FullSaver:
    """Begins the saves of a run.

    in_background: whether the state is copied to host memory and written while training continues. Decided by the
    memory that all nodes have left.
    """

    def __init__(self, context: TrainContext):
        self._run, self._engine, self._ema = context.run, context.engine, context.ema
        self.in_background = False
        self._buffer: HostBuffer | None = None
        self._kinds: list[str] = []  # that the buffer is for: before the first step, the optimizer has no states

    def begin(self, step: int, header: Mapping[str, Any]) -> tuple[checkpoints.Phase, ...]:
        """Create the folders of a save and return its phases (`checkpoint.Saver`). Collective.

        header: values to store in the checkpoint's state.json.
        """
        run, shard = self._run, local_shard(self._engine, self._ema)
        state: dict[str, Any] = {"step": step, "num_updates": shard.num_updates, "num_shards": run.world.size}
        state |= shard_header(self._engine, self._ema)
        if state["kinds"] != self._kinds:
            self._kinds = state["kinds"]
            self._allocate(shard.num_bytes)
        output = Path(run.cfg.output_dir)

        def make_folders() -> Path:
            for folder in exports(run.cfg):
                (checkpoints.begin_folder(output / folder, step) / "transformer").mkdir()
            return checkpoints.begin_folder(output / "checkpoints", step)

        checkpoint = on_rank0(run.world, make_folders)
        if self.in_background and self._buffer is not None:
            shard = shard.copy(self._buffer)
        save = _FullSave(run, shard, checkpoint, full_export(run, step), {**state, **header})
        return save.write_shard, save.write_models, save.commit

    def _allocate(self, num_bytes: int) -> None:
        """Allocate host memory for a copy of the state, if all nodes have enough. Collective."""
        world, self._buffer = self._run.world, None
        needed, available = world.local_size * num_bytes, available_memory_bytes()
        problem = ""
        if needed > COPY_SHARE * available:
            problem = f"a copy of it needs {gigabytes(needed)} of the {gigabytes(available)} of host memory"
        else:
            try:
                self._buffer = HostBuffer(max(num_bytes, 1))
                if world.device.type == "cuda":
                    self._buffer.pin()
            except (OSError, torch.cuda.CudaError) as error:
                problem = f"host memory cannot be pinned ({error})"
        problems = [text for text in all_gather(world, problem) if text]
        self.in_background = not problems
        if problems:
            self._buffer = None
            logger.info("training waits while the state is saved: %s", problems[0])


@dataclass(frozen=True)
class _FullSave:
    """One save. shard: of this rank. checkpoint: the temporary folder."""

    run: Run
    shard: Shard
    checkpoint: Path
    export: FullExport
    header: Mapping[str, Any]

    def write_shard(self, _: list[Any]) -> dict[str, Any]:
        """Write this rank's part of the state. Returns its digest."""
        world = self.run.world
        return self.shard.write(self.checkpoint / shard_name(world.rank, world.size))

    @property
    def models(self) -> dict[Path, str]:
        """The temporary folders of the exported models, and the kind of tensors that each is made from."""
        output, name = self.checkpoint.parent.parent, self.checkpoint.name
        return {output / folder / name: kind for folder, kind in exports(self.run.cfg).items()}

    def write_models(self, digests: list[Any]) -> list[Any]:
        """Write this rank's files of the exported models. Returns the digests."""
        world = self.run.world
        for rank in range(world.size):
            if not (self.checkpoint / shard_name(rank, world.size)).exists():
                raise UserError(
                    f"output_dir: rank {world.rank} does not see what rank {rank} wrote to {self.checkpoint}. With "
                    "train.method=full, use a folder that all nodes share."
                )
        with ShardReader(self.checkpoint, world.size) as reader:
            for model, kind in self.models.items():
                self.export.write_files(model / "transformer", _reading(reader, kind), world.rank, world.size)
        return digests

    def commit(self, digests: list[list[Any]]) -> None:
        """Complete the models and the checkpoint, and remove old ones. On rank 0."""
        world, settings = self.run.world, self.run.cfg.checkpoint
        if world.rank:
            return
        for model in self.models:
            self.export.complete(model)
            final = model.with_suffix("")
            write_card(model, final, self.export.metadata, FULL)
            checkpoints.replace_folder(model, final)
        files = {shard_name(rank, world.size): digest for rank, digest in enumerate(digests[0])}
        checkpoints.commit(self.checkpoint, {"files": files, **self.header}, settings.keep_last, settings.keep_every)
        kept = {checkpoint.name for checkpoint in checkpoints.complete_checkpoints(self.checkpoint.parent)}
        for model in self.models:
            for folder in checkpoints.step_folders(model.parent):
                if folder.name not in kept:
                    checkpoints.remove_folder(folder)


def _reading(reader: ShardReader, kind: str) -> ReadWeight:
    return lambda name, size: reader.read(kind, name, 0, size)

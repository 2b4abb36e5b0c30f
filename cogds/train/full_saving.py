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

from cogds.card import pipeline_factor, write_card
from cogds.distributed.collectives import all_gather, on_rank0
from cogds.engine import checkpoint as checkpoints
from cogds.engine.shards import Shard, ShardReader, local_shard, shard_header, shard_name
from cogds.engine.state import WEIGHT
from cogds.errors import UserError
from cogds.formatting import gigabytes
from cogds.model.full_export import FullExport
from cogds.process.host_memory import HostBuffer, available_memory_bytes
from cogds.train.metadata import export_metadata
from cogds.train.run import Run

logger = logging.getLogger(__name__)

# Share of the available host memory that copies of the state may take.
COPY_SHARE = 0.5
FULL_EXPORTS = "model"  # folder of exported models in the output folder


def full_export(run: Run, step: int) -> FullExport:
    """Return what is exported after `step` optimizer steps."""
    metadata = export_metadata(run, step)
    convention = metadata.pop("image_latents")
    return FullExport(
        run.model, run.job.dtype, frozenset(run.job.targets), metadata.pop("image_latent_factor"),
        metadata | {"image_latents": "pipeline", "trained_image_latents": convention},
    )  # fmt: skip


class FullSaver:
    """Begins the saves of a run.

    in_background: whether the state is copied to host memory and written while training continues. Decided by the
    memory that all nodes have left.
    """

    def __init__(self, run: Run, engine: Any):
        self._run, self._engine = run, engine
        self.in_background = False
        self._buffer: HostBuffer | None = None
        self._kinds: list[str] = []  # that the buffer is for: before the first step, the optimizer has no states

    def begin(self, step: int, header: Mapping[str, Any]) -> tuple[checkpoints.Phase, ...]:
        """Create the folders of a save and return its phases (`checkpoint.Saver`). Collective.

        header: values to store in the checkpoint's state.json.
        """
        run, shard = self._run, local_shard(self._engine)
        state = {"step": step, "num_updates": shard.num_updates, "num_shards": run.world.size}
        state |= shard_header(self._engine)
        if state["kinds"] != self._kinds:
            self._kinds = state["kinds"]
            self._allocate(shard.num_bytes)
        output = Path(run.cfg.output_dir)
        folders = output / "checkpoints", output / FULL_EXPORTS
        checkpoint, model = on_rank0(run.world, lambda: [checkpoints.begin_folder(folder, step) for folder in folders])
        on_rank0(run.world, (model / "transformer").mkdir)
        if self.in_background and self._buffer is not None:
            shard = shard.copy(self._buffer)
        save = _FullSave(run, shard, checkpoint, model, full_export(run, step), {**state, **header})
        return save.write_shard, save.write_model, save.commit

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
    """One save. shard: of this rank. checkpoint, model: the temporary folders."""

    run: Run
    shard: Shard
    checkpoint: Path
    model: Path
    export: FullExport
    header: Mapping[str, Any]

    def write_shard(self, _: list[Any]) -> dict[str, Any]:
        """Write this rank's part of the state. Returns its digest."""
        world = self.run.world
        return self.shard.write(self.checkpoint / shard_name(world.rank, world.size))

    def write_model(self, digests: list[Any]) -> list[Any]:
        """Write this rank's files of the exported model. Returns the digests."""
        world = self.run.world
        for rank in range(world.size):
            if not (self.checkpoint / shard_name(rank, world.size)).exists():
                raise UserError(
                    f"output_dir: rank {world.rank} does not see what rank {rank} wrote to {self.checkpoint}. With "
                    "train.method=full, use a folder that all nodes share."
                )
        with ShardReader(self.checkpoint, world.size) as reader:
            self.export.write_files(
                self.model / "transformer", lambda name, size: reader.read(WEIGHT, name, 0, size), world.rank, world.size
            )
        return digests

    def commit(self, digests: list[list[Any]]) -> None:
        """Complete the model and the checkpoint, and remove old ones. On rank 0."""
        world, settings = self.run.world, self.run.cfg.checkpoint
        if world.rank:
            return
        self.export.complete(self.model)
        final = self.model.with_suffix("")
        write_card(self.model, final, self.export.metadata, "full")
        checkpoints.replace_folder(self.model, final)
        files = {shard_name(rank, world.size): digest for rank, digest in enumerate(digests[0])}
        checkpoints.commit(self.checkpoint, {"files": files, **self.header}, settings.keep_last, settings.keep_every)
        kept = {checkpoint.name for checkpoint in checkpoints.complete_checkpoints(self.checkpoint.parent)}
        for folder in checkpoints.step_folders(final.parent):
            if folder.name not in kept:
                checkpoints.remove_folder(folder)

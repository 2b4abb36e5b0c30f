"""A save of a full fine-tune: every rank writes its part of the checkpoint and some files of the exported model.

The export is made from the files of the checkpoint, so no weights are gathered over the ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogds.card import pipeline_factor, write_card
from cogds.distributed.collectives import on_rank0
from cogds.engine import checkpoint as checkpoints
from cogds.engine.shards import Shard, ShardReader, local_shard, shard_header, shard_name
from cogds.engine.state import WEIGHT
from cogds.errors import UserError
from cogds.model.full_export import FullExport
from cogds.train.metadata import export_metadata
from cogds.train.run import Run

FULL_EXPORTS = "model"  # folder of exported models in the output folder


def full_export(run: Run, step: int) -> FullExport:
    """Return what is exported after `step` optimizer steps."""
    metadata = export_metadata(run, step)
    convention = metadata.pop("image_latents")
    return FullExport(
        run.model, run.job.dtype, frozenset(run.job.targets), metadata.pop("image_latent_factor"),
        metadata | {"image_latents": "pipeline", "trained_image_latents": convention},
    )  # fmt: skip


def start_full_save(
    run: Run, engine: Any, step: int, header: Mapping[str, Any]
) -> tuple[checkpoints.Phase, checkpoints.Phase, checkpoints.Phase]:
    """Create the folders of a save and return its phases (`checkpoint.Saver`). Collective.

    header: values to store in the checkpoint's state.json.
    """
    output, shard = Path(run.cfg.output_dir), local_shard(engine)
    folders = output / "checkpoints", output / FULL_EXPORTS
    checkpoint, model = on_rank0(run.world, lambda: [checkpoints.begin_folder(folder, step) for folder in folders])
    on_rank0(run.world, (model / "transformer").mkdir)
    state = {"step": step, "num_updates": shard.num_updates, "num_shards": run.world.size, **shard_header(engine)}
    save = _FullSave(run, shard, checkpoint, model, full_export(run, step), {**state, **header})
    return save.write_shard, save.write_model, save.commit


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

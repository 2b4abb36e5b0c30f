"""The scan of a run's datasets, shared by all ranks."""

from functools import partial
from pathlib import Path

from cogds.config.schema import DataConfig, RunConfig, SetConfig
from cogds.data.manifest.scan import choose_files, finish_scan, list_share, scan_share, start_scan
from cogds.data.manifest.table import DataSet, manifest_file
from cogds.distributed.collectives import on_all_ranks, on_rank0
from cogds.distributed.world import World
from cogds.errors import UserError


def data_sets(cfg: RunConfig) -> list[DataSet]:
    """The run's datasets, in the order of their numbers."""
    return [data_set(own) for own in cfg.data.sets or (cfg.data,)]


def data_set(data: DataConfig | SetConfig) -> DataSet:
    """The dataset that a section of the config describes."""
    columns = {str(name): column for name, column in data.columns.items()}
    return DataSet(data.path, columns, data.root, data.path_template, data.where)


def caption_prefixes(cfg: RunConfig) -> list[str]:
    """The caption prefix of each dataset, "" for none."""
    data = cfg.data
    own = [data_set.caption_prefix for data_set in data.sets] or [None]
    return [data.caption_prefix if prefix is None else prefix for prefix in own]


def scan_data(cfg: RunConfig, world: World, retry_failed: bool = False) -> Path:
    """Bring the manifest up to date and return its path. Collective.

    retry_failed: open files again that could not be used.
    """
    sets, data = data_sets(cfg), cfg.data
    file = manifest_file(sets, cfg.metadata_dir, data.manifest)
    scan = on_rank0(world, partial(start_scan, sets, file, data.default_caption))
    listings = on_all_ranks(world, partial(list_share, scan, (world.rank, world.size)))
    choose = partial(choose_files, scan, listings, retry_failed, with_controls=cfg.conditioning.control)
    scan = on_rank0(world, choose)
    share, memory_bytes = (world.rank, world.size), int(data.decode_memory_gb * 1e9)
    on_all_ranks(world, partial(scan_share, scan, share, data.num_workers, data.decode_timeout_s, memory_bytes))
    on_rank0(world, partial(finish_scan, scan))
    return file


def evaluation_config(cfg: RunConfig) -> RunConfig:
    """The config of a run that would train the dataset in eval.path."""
    own = {"path": cfg.eval.path, "sets": (), "repeats": 1.0, "manifest": None, "where": None}
    data = cfg.data.model_copy(update=own)
    evaluation = cfg.eval.model_copy(update={"path": None, "held_out": 0.0})
    return cfg.model_copy(update={"data": data, "eval": evaluation})


def scan_evaluation_data(cfg: RunConfig, world: World, retry_failed: bool = False) -> Path | None:
    """`scan_data` for the dataset in eval.path; None if there is none. Collective."""
    if cfg.eval.path is None:
        return None
    try:
        return scan_data(evaluation_config(cfg), world, retry_failed)
    except UserError as error:
        raise UserError(str(error).replace("data.path", "eval.path"), shared=error.shared) from None

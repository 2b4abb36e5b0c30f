"""Jobs for tests, resolved as in the commands."""

from argparse import Namespace

from cogds.distributed.world import World
from cogds.job import load_job
from tests.conftest import ROOT

ALONE = World(0, 1, 0, 1)


def make_job(*overrides, config=None, deepspeed="zero2", world=ALONE, num_ranks=None):
    """Return the job of `key=value` overrides and a DeepSpeed config of ds_configs/."""
    args = Namespace(
        config=config and str(config), deepspeed=str(ROOT / f"ds_configs/{deepspeed}.json"), overrides=list(overrides),
    )  # fmt: skip
    return load_job(args, world, num_ranks)

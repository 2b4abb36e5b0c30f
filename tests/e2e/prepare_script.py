"""`cogds prepare` that notes each file which it cuts in the file PREPARED."""

import os
import sys

from cogds.cli import call, run
from cogds.prepare import cutting

find_scenes = cutting.find_scenes


def noted(source, options):
    with open(os.environ["PREPARED"], "a") as file:
        file.write(f"{os.path.basename(source.path)}\n")
    return find_scenes(source, options)


cutting.find_scenes = noted
sys.exit(run(lambda: call("prepare", sys.argv[1:], starts_ranks=False)))

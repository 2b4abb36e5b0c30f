"""Run by test_compiled.py: `launch/train.py` with blocks compiled except for code generation, which takes minutes.

Writes the sizes of the graphs.
"""

import os
import sys
from functools import partialmethod
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from torch._dynamo.backends.debugging import aot_eager  # noqa: E402
from torch.fx import GraphModule  # noqa: E402

from cogds.cli import call, run  # noqa: E402
from cogds.model.transformer.forward import Transformer  # noqa: E402

graphs = []


def count(graph, example):
    # Each checkpoint is a graph within the graph.
    nested = [one for one in graph.modules() if isinstance(one, GraphModule)]
    graphs.append(sum(node.op == "call_function" for one in nested for node in one.graph.nodes))
    return aot_eager(graph, example)


def train():
    call("train", sys.argv[1:], starts_ranks=False)
    Path(f"{os.environ['GRAPHS']}-{os.environ['RANK']}").write_text(" ".join(map(str, graphs)))


Transformer.compile_blocks = partialmethod(Transformer.compile_blocks, count)
sys.exit(run(train))

"""Run by test_compiled.py: `launch/train.py` with compiled blocks, but without code generation, which takes minutes.

Writes the sizes of the graphs to the file named by GRAPHS.
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
    nested = [module for module in graph.modules() if isinstance(module, GraphModule)]
    graphs.append(sum(node.op == "call_function" for module in nested for node in module.graph.nodes))
    return aot_eager(graph, example)


def train():
    call("train", sys.argv[1:], starts_ranks=False)
    Path(f"{os.environ['GRAPHS']}-{os.environ['RANK']}").write_text(" ".join(map(str, graphs)))


Transformer.compile_blocks = partialmethod(Transformer.compile_blocks, count)
sys.exit(run(train))

"""The parts of the main command that need no process group; whole runs stand in tests/dist and tests/e2e."""

import shutil

from cogds.config import load_config
from cogds.core.geometry import ClipShape
from cogds.model.load import find_model
from cogds.order import batch_sizes
from cogds.train import weights_digest


def config(*overrides):
    return load_config(None, ["model.path=m", "data.path=d", *overrides])[0]


def test_batch_sizes_are_one_number_or_follow_from_the_token_budget(tiny_model):
    model = find_model(str(tiny_model))
    buckets = (ClipShape(17, 64, 96), ClipShape(9, 64, 64))  # 3 x 4 x 6 + 32 = 104 and 2 x 4 x 4 + 32 = 64 tokens
    assert batch_sizes(config("train.batch_size=3"), buckets, model) == (3, 3)
    assert batch_sizes(config("train.tokens_per_batch=208"), buckets, model) == (2, 3)
    assert batch_sizes(config("train.tokens_per_batch=1"), buckets, model) == (1, 1)


def test_the_weights_digest_follows_the_weights(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "same")
    shutil.copytree(tiny_model, tmp_path / "other")
    file = tmp_path / "other/transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    cfg = config(f"data.cache_dir={tmp_path}")
    models = (tiny_model, tmp_path / "same", tmp_path / "other")
    one, same, other = (weights_digest(cfg, find_model(str(path))) for path in models)
    assert one == same != other

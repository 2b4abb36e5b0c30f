"""The parts of the main command that need no process group; whole runs stand in tests/dist and tests/e2e."""

import shutil
from types import SimpleNamespace

import torch

from cogds.config.loading import load_config
from cogds.core.geometry import ClipShape
from cogds.distributed.world import World
from cogds.encode.order import batch_sizes
from cogds.model.load import find_model, load_transformer
from cogds.model.lora.adapter import inject
from cogds.model.lora.file import read_lora
from cogds.train.main import export_adapter, made_again, weights_digest


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


def test_what_is_due_where_a_run_goes_on_is_noted_again_and_nothing_else():
    cfg = config("eval.every=4", "sample.every=6", "train.num_steps=24")
    found = {step: made_again(cfg, step) for step in (3, 4, 6, 12, 24)}
    both = ("eval/", "callbacks/")
    assert found == {3: (), 4: both, 6: ("callbacks/",), 12: both, 24: ()}  # after the last nothing is done
    assert made_again(config("eval.every=null"), 4) == ()


def test_a_lora_is_exported_whole_while_it_is_switched_off(tiny_model, tmp_path):
    """A thread writes it, while videos of the base model are made."""
    model = find_model(str(tiny_model))
    transformer = load_transformer(model, torch.float32)
    inject(transformer, 4, 8, 0.0, ["to_q", "to_v"], seed=0)
    weights = {name: one.detach().clone() for name, one in transformer.named_parameters() if one.requires_grad}
    run = SimpleNamespace(
        cfg=config("lora.rank=4"), model=model, buckets=(ClipShape(9, 64, 64),), world=World(0, 1, 0, 1),
        data=SimpleNamespace(index=range(3)), plan=SimpleNamespace(local_batch_sizes=(1,), accumulation=1),
    )  # fmt: skip
    transformer.disable_adapters()
    export_adapter(transformer, weights, run, tmp_path / "lora/step-000002")
    assert 2 * len(read_lora(tmp_path / "lora/step-000002").pairs) == len(weights) > 0

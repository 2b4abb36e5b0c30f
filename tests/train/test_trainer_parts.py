"""Parts of a run that need no process group. tests/dist and tests/e2e have whole runs."""

import shutil
from types import SimpleNamespace

import torch

from cogds.config.loading import load_config
from cogds.core.geometry import ClipShape
from cogds.distributed.world import World
from cogds.model.load import find_model, load_transformer
from cogds.model.lora.adapter import inject
from cogds.model.lora.file import read_lora
from cogds.process.signals import StopRequest
from cogds.train import trainer
from cogds.train.saving import export_lora
from cogds.train.trainer import Trainer, tags_written_again
from tests.jobs import make_job


def config(*overrides):
    return load_config(None, ["model.path=m", "data.path=d", *overrides])[0]


def test_batch_sizes_are_a_constant_or_follow_from_the_token_budget(tiny_model):
    # 3 x 4 x 6 + 32 = 104 and 2 x 4 x 4 + 32 = 64 tokens
    words = [f"model.path={tiny_model}", "data.path=d", "data.buckets=[17x64x96, 9x64x64]"]
    assert make_job(*words, "train.batch_size=3").batch_sizes == (3, 3)
    assert make_job(*words, "train.tokens_per_batch=208").batch_sizes == (2, 3)
    assert make_job(*words, "train.tokens_per_batch=1").batch_sizes == (1, 1)


def test_the_weights_digest_follows_the_weights(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "same")
    shutil.copytree(tiny_model, tmp_path / "other")
    file = tmp_path / "other/transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    models = (tiny_model, tmp_path / "same", tmp_path / "other")
    words = ["data.path=d", f"data.cache_dir={tmp_path}", "data.buckets=[9x64x64]"]
    first, same, other = (make_job(f"model.path={path}", *words).weights_digest() for path in models)
    assert first == same != other


def test_callbacks_that_run_again_on_resuming_write_their_tags_again():
    def tags(step, *words):
        return tags_written_again(SimpleNamespace(cfg=config(*words), first_step=step))

    both = ("eval/", "callbacks/")
    words = ("eval.every=4", "sample.every=6", "train.num_steps=24")
    expected = {3: (), 4: both, 6: ("callbacks/",), 12: both, 24: ()}  # nothing runs after the last step
    assert {step: tags(step, *words) for step in expected} == expected
    assert tags(4, "eval.every=null") == ()


def test_the_models_of_on_the_fly_encoding_are_loaded_before_the_memory_check(tiny_model, monkeypatch):
    events = []
    for name in ("load_step_builder", "load_on_the_fly_models", "check_memory"):
        monkeypatch.setattr(trainer, name, lambda *_, name=name: events.append(name))
    monkeypatch.setattr(trainer, "find_initial_state", lambda _: None)
    job = make_job(f"model.path={tiny_model}", "data.path=d", "data.buckets=[9x64x64]")
    run = SimpleNamespace(
        cfg=job.cfg, model=job.model, world=job.world, first_step=0, data=SimpleNamespace(empty_caption_states=None)
    )
    monkeypatch.setattr(Trainer, "prepare", lambda *_: (run, None, {}))
    for name in ("announce", "build"):
        monkeypatch.setattr(Trainer, name, lambda *_: None)
    Trainer(job, StopRequest(), dry_run=True).run()
    assert events == ["load_step_builder", "load_on_the_fly_models", "check_memory"]


def test_a_lora_is_exported_completely_while_it_is_disabled(tiny_model, tmp_path):
    """It is written by a thread, while the main thread may be making videos of the base model."""
    model = find_model(str(tiny_model))
    transformer = load_transformer(model, torch.float32)
    inject(transformer, 4, 8, 0.0, ["to_q", "to_v"], seed=0)
    parameters = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    weights = {name: weight.detach().clone() for name, weight in parameters.items()}
    run = SimpleNamespace(
        cfg=config("lora.rank=4"), model=model, buckets=(ClipShape(9, 64, 64),), world=World(0, 1, 0, 1),
        data=SimpleNamespace(index=range(3)), plan=SimpleNamespace(local_batch_sizes=(1,), accumulation=1),
    )  # fmt: skip
    transformer.disable_adapters()
    export_lora(transformer, weights, run, tmp_path / "lora/step-000002")
    assert 2 * len(read_lora(tmp_path / "lora/step-000002").pairs) == len(weights) > 0

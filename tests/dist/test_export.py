"""The exported file gives the output of the engine, also with the partitioned parameters of ZeRO stage 3."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from cogds.config.deepspeed import load_ds_config, resolve
from cogds.config.loading import load_config
from tests.conftest import ROOT, run_command
from tests.model.lora.adapters import example_inputs

pytestmark = pytest.mark.dist

FRESH = """
import sys, torch
from diffusers import CogVideoXImageToVideoPipeline
model, folder = sys.argv[1:]
pipe = CogVideoXImageToVideoPipeline.from_pretrained(model)
inputs, expected = torch.load(folder + "/inputs.pt"), torch.load(folder + "/output.pt")
with torch.no_grad():
    base = pipe.transformer(**inputs)[0]
    pipe.load_lora_weights(folder + "/lora")
    tuned = pipe.transformer(**inputs)[0]
print((base - expected).abs().max().item(), (tuned - expected).abs().max().item())
"""


@pytest.mark.parametrize("ds", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_a_fresh_pipeline_gives_the_engines_output(tiny_model, tmp_path, ds, warm):
    cfg, explicit = load_config(None, [f"model.path={tiny_model}", "data.path=unused", "train.precision=fp32"])
    path = f"ds_configs/{ds}.json"
    resolved, _ = resolve(load_ds_config(str(ROOT / path)), cfg, explicit, 2, 32, path)
    (tmp_path / "ds.json").write_text(json.dumps(resolved))
    torch.save(example_inputs(), tmp_path / "inputs.pt")
    done = warm(ROOT / "tests/dist/export_script.py", [ROOT, tiny_model, tmp_path / "ds.json", tmp_path], ranks=2)
    assert done.returncode == 0, done.stdout[-4000:]
    tensors = load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
    assert len(tensors) == 2 * 3 * 2
    assert all(tensor.numel() == 4 * 32 for tensor in tensors.values())
    done = run_command([sys.executable, "-c", FRESH, tiny_model, tmp_path], 120)
    assert done.returncode == 0, done.stdout[-4000:]
    base, tuned = map(float, done.stdout.split()[-2:])
    assert base > 1e-2
    assert tuned < 1e-5

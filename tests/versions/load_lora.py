"""Load LoRA files of cogds with other versions of diffusers and PEFT, and compare with the transformer in cogds.

    python tests/versions/load_lora.py write DIR           where cogds is installed, or in a checkout
    OTHER/bin/python tests/versions/load_lora.py check DIR  anywhere with torch, safetensors, diffusers (0.34 or newer)
                                                            and PEFT

`write` fills LoRAs of the tiny model with random weights and writes them as training and `launch/export.py` do, and the
strength of every layer and the output of the transformer. `check` loads each file with `load_lora_weights` and prints a
line with the differences. Its exit code is 1 if a strength differs or an output differs by more than 1e-5.
"""

import json
import math
import sys
from pathlib import Path

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Name -> rank, alpha, layers.
TRAINED = {
    "alpha is twice the rank": (4, 8.0, ATTENTION),
    "alpha is a fraction": (3, 4.5, ("to_q", "ff.net.2")),
    "every linear layer": (4, 1.0, ("all-linear",)),
}
MAX_DIFFERENCE = 1e-5


def write(folder):
    """Write the tiny model, LoRAs, and the expected strengths and outputs into a folder."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from cogds.model.load import find_model, load_transformer
    from cogds.model.lora.adapter import add_lora, export, inject, linear_layers
    from cogds.model.lora.convert import Adapter, Layer, load_adapter, save_comfyui_wrapper, save_diffusers
    from cogds.model.lora.file import read_lora
    from tests.tiny import create_tiny_model

    torch.manual_seed(0)
    create_tiny_model(folder / "model")
    inputs = {
        "hidden_states": torch.randn(1, 2, 16, 8, 8), "encoder_hidden_states": torch.randn(1, 32, 32),
        "timestep": torch.tensor([500]), "ofs": torch.tensor([2.0]),
        "rotary_cos": torch.ones(16, 16), "rotary_sin": torch.zeros(16, 16),
    }  # fmt: skip
    save_file(inputs, folder / "inputs.safetensors")
    outputs, scales = {}, {}

    def load():
        return load_transformer(find_model(str(folder / "model")), torch.float32)

    outputs["base"], scales["base"] = output(load(), folder), {}
    for name, (rank, alpha, targets) in TRAINED.items():
        transformer = load()
        for parameter in inject(transformer, rank, alpha, 0.5, targets, seed=0):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape))
        tensors = {key: value.detach() for key, value in transformer.named_parameters() if value.requires_grad}
        file = export(folder / name, transformer, tensors, {"image_latents": "pipeline"})
        outputs[name] = output(transformer.eval(), folder)
        scales[name] = dict.fromkeys(read_lora(file).pairs, alpha / rank)
    (folder / "for the wrapper").mkdir()
    adapter = load_adapter(read_lora(folder / "alpha is twice the rank"))
    save_comfyui_wrapper(adapter, folder / "for the wrapper/pytorch_lora_weights.safetensors")
    outputs["for the wrapper"] = outputs["alpha is twice the rank"].clone()
    scales["for the wrapper"] = dict.fromkeys(adapter.layers, 1.0)
    layers = {
        layer: Layer(0.1 * torch.randn(rank, num_in), 0.1 * torch.randn(num_out, rank), scale)
        for number, (layer, (num_out, num_in)) in enumerate(linear_layers(load()).items())
        for rank, scale in [((2, 4, 8)[number % 3], (0.25, 1.5)[number % 2])]
    }
    name, transformer = "mixed ranks and strengths", load()
    (folder / name).mkdir()
    save_diffusers(Adapter(layers, {}), folder / name)
    add_lora(transformer, Adapter(layers, {}))
    outputs[name] = output(transformer, folder)
    scales[name] = {layer_name: layer.scale for layer_name, layer in layers.items()}
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "scales.json").write_text(json.dumps(scales))


@torch.no_grad()
def output(transformer, folder):
    """Return the transformer's output for the inputs in the folder."""
    inputs = load_file(folder / "inputs.safetensors")
    rotary = inputs.pop("rotary_cos"), inputs.pop("rotary_sin")
    return transformer(**inputs, image_rotary_emb=rotary, return_dict=False)[0]


def check(folder):
    """Load each LoRA of the folder, print the differences, and return the exit code."""
    outputs, scales = load_file(folder / "outputs.safetensors"), json.loads((folder / "scales.json").read_text())
    num_failed = 0
    for name in sorted(outputs):
        transformer = CogVideoXTransformer3DModel.from_pretrained(folder / "model", subfolder="transformer")
        pipeline = CogVideoXImageToVideoPipeline(None, None, None, transformer, CogVideoXDDIMScheduler())
        loaded, expected = {}, scales[name]
        if name != "base":
            assert (outputs[name] - outputs["base"]).abs().max() > 1e-2  # the LoRA has an effect
            (file,) = (folder / name).glob("*.safetensors")  # offline, older diffusers requires the name
            pipeline.load_lora_weights(folder / name, weight_name=file.name, adapter_name="lora")
            loaded = {
                key: module.scaling["lora"]
                for key, module in transformer.named_modules()
                if "lora" in getattr(module, "scaling", {})
            }
        output_difference = (output(transformer, folder) - outputs[name]).abs().max().item()
        difference = max((abs(loaded.get(key, math.inf) - scale) for key, scale in expected.items()), default=0.0)
        is_equal = loaded.keys() == expected.keys() and difference < 1e-9 and output_difference < MAX_DIFFERENCE
        num_failed += not is_equal
        print(
            f"{'ok  ' if is_equal else 'FAIL'} {name}: {len(loaded)} of {len(expected)} layers, strength differs by "
            f"{difference:.1e}, output by {output_difference:.1e}"
        )
    return 1 if num_failed else 0


if __name__ == "__main__":
    command, directory = sys.argv[1:]
    sys.exit({"write": write, "check": check}[command](Path(directory)))

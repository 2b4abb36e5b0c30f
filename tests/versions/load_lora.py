"""Load this project's LoRA files with another diffusers and PEFT, and compare with the transformer that was trained.

    python tests/versions/load_lora.py write DIR           where cogds is installed, or in a checkout
    OTHER/bin/python tests/versions/load_lora.py check DIR  anywhere with torch, safetensors, diffusers (0.34 or newer)
                                                            and PEFT

`write` trains nothing: it fills LoRAs of the tiny model with random weights, writes them as training and
`launch/export.py` do, and beside them every layer's strength and the output of the transformer that holds them. `check`
loads each file with `load_lora_weights` and prints the differences, one line a file; its exit code is 1 if one is not
0 (strength) or above 1e-5 (output).
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# name: rank, alpha, layers.
TRAINED = {
    "alpha is twice the rank": (4, 8.0, ATTENTION),
    "alpha is a fraction": (3, 4.5, ("to_q", "ff.net.2")),
    "every linear layer": (4, 1.0, ("all-linear",)),
}
MAX_DIFFERENCE = 1e-5


def write(folder):
    """Write the tiny model's transformer, LoRAs and what they should give into a new folder."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from cogds.model.load import find_model, load_transformer
    from cogds.model.lora.adapter import add_lora, export, inject, linear_layers
    from cogds.model.lora.convert import Adapter, Layer, load_adapter, save_comfyui_wrapper, save_diffusers
    from cogds.model.lora.file import read_lora
    from cogds.model.tiny import create_tiny_model

    torch.manual_seed(0)
    create_tiny_model(folder / "model")
    inputs = {
        "hidden_states": torch.randn(1, 2, 16, 8, 8), "encoder_hidden_states": torch.randn(1, 32, 32),
        "timestep": torch.tensor([500]), "ofs": torch.tensor([2.0]),
        "rotary_cos": torch.ones(16, 16), "rotary_sin": torch.zeros(16, 16),
    }  # fmt: skip
    save_file(inputs, folder / "inputs.safetensors")
    outputs, scales = {}, {}

    def note(name, transformer, adapter_scales):
        outputs[name], scales[name] = output(transformer, folder), adapter_scales

    def fresh():
        return load_transformer(find_model(str(folder / "model")), torch.float32)

    note("base", fresh(), {})
    for name, (rank, alpha, targets) in TRAINED.items():
        transformer = fresh()
        with torch.no_grad():
            for parameter in inject(transformer, rank, alpha, 0.5, targets, seed=0):
                parameter.copy_(0.1 * torch.randn(parameter.shape))
        tensors = {key: one.detach() for key, one in transformer.named_parameters() if one.requires_grad}
        file = export(folder / name, transformer, tensors, {"image_latents": "pipeline"})
        note(name, transformer.eval(), dict.fromkeys(read_lora(file).pairs, alpha / rank))
    (folder / "for the wrapper").mkdir()
    adapter = load_adapter(read_lora(folder / "alpha is twice the rank"))
    save_comfyui_wrapper(adapter, folder / "for the wrapper/pytorch_lora_weights.safetensors")
    outputs["for the wrapper"] = outputs["alpha is twice the rank"].clone()
    scales["for the wrapper"] = dict.fromkeys(adapter.layers, 1.0)
    layers = {
        layer: Layer(0.1 * torch.randn(rank, num_in), 0.1 * torch.randn(num_out, rank), scale)
        for number, (layer, (num_out, num_in)) in enumerate(linear_layers(fresh()).items())
        for rank, scale in [((2, 4, 8)[number % 3], (0.25, 1.5)[number % 2])]
    }
    (folder / "ranks and strengths mixed").mkdir()
    save_diffusers(Adapter(layers, {}), folder / "ranks and strengths mixed")
    add_lora(transformer := fresh(), Adapter(layers, {}))
    note("ranks and strengths mixed", transformer, {name: layer.scale for name, layer in layers.items()})
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "scales.json").write_text(json.dumps(scales))


@torch.no_grad()
def output(transformer, folder):
    """The transformer's output for the inputs in the folder."""
    inputs = load_file(folder / "inputs.safetensors")
    rotary = inputs.pop("rotary_cos"), inputs.pop("rotary_sin")
    return transformer(**inputs, image_rotary_emb=rotary, return_dict=False)[0]


def check(folder):
    """Load each LoRA of the folder, print how far it is from what was trained; the exit code."""
    outputs, scales = load_file(folder / "outputs.safetensors"), json.loads((folder / "scales.json").read_text())
    failed = 0
    for name in sorted(outputs):
        transformer = CogVideoXTransformer3DModel.from_pretrained(folder / "model", subfolder="transformer")
        pipeline = CogVideoXImageToVideoPipeline(None, None, None, transformer, CogVideoXDDIMScheduler())
        found = {}
        if name != "base":
            assert (outputs[name] - outputs["base"]).abs().max() > 1e-2  # it does something
            (file,) = (folder / name).glob("*.safetensors")  # offline, older diffusers need its name
            pipeline.load_lora_weights(folder / name, weight_name=file.name, adapter_name="it")
            found = {
                key: module.scaling["it"]
                for key, module in transformer.named_modules()
                if "it" in getattr(module, "scaling", {})
            }
        by_output = (output(transformer, folder) - outputs[name]).abs().max().item()
        of_layers = [abs(found.get(key, float("inf")) - scale) for key, scale in scales[name].items()]
        fine = found.keys() == scales[name].keys() and max(of_layers, default=0.0) < 1e-9 and by_output < MAX_DIFFERENCE
        failed += not fine
        print(
            f"{'ok  ' if fine else 'FAIL'} {name}: {len(found)} of {len(scales[name])} layers, strength differs by "
            f"{max(of_layers, default=0.0):.1e}, output by {by_output:.1e}"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    command, directory = sys.argv[1:]
    sys.exit({"write": write, "check": check}[command](Path(directory)))

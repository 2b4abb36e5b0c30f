"""LoRAs with random weights, and the output of the tiny model with them, in cogds and in diffusers."""

import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel

from cogds.model.load import find_model, load_transformer
from cogds.model.lora.adapter import export, inject

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def example_inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 2, 16, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 32, 32, generator=generator),
        "timestep": torch.tensor([500]),
        "ofs": torch.tensor([2.0]),
        "image_rotary_emb": (torch.ones(16, 16), torch.zeros(16, 16)),
        "return_dict": False,
    }


@torch.no_grad()
def output(transformer):
    return transformer(**example_inputs())[0]


@torch.no_grad()
def randomize(parameters, seed=0):
    """Give every layer its own random weights, so that a mix-up of layers changes the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def load(model_path):
    return load_transformer(find_model(str(model_path)), torch.float32)


def trainable(transformer):
    return {name: parameter.detach() for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def write_lora(model_path, folder, rank=4, alpha=8.0, targets=ATTENTION, metadata=None):
    """Write a LoRA in diffusers' format and return its folder."""
    transformer = load(model_path)
    randomize(inject(transformer, rank, alpha, 0.0, targets, seed=0), seed=rank)
    return export(folder, transformer, trainable(transformer), metadata or {"image_latents": "pipeline"}).parent


def base_transformer(model_path):
    """diffusers' own transformer class with the model's weights."""
    return CogVideoXTransformer3DModel.from_pretrained(model_path, subfolder="transformer", use_safetensors=True)


def output_in_diffusers(model_path, *loras):
    """The output with pairs of a LoRA's path and weight, loaded by diffusers' pipeline."""
    transformer = base_transformer(model_path)
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(model_path, transformer=transformer, use_safetensors=True)
    for number, (path, _) in enumerate(loras):
        pipeline.load_lora_weights(path, adapter_name=f"lora{number}", use_safetensors=True)
    pipeline.set_adapters([f"lora{number}" for number in range(len(loras))], [weight for _, weight in loras])
    return output(transformer)

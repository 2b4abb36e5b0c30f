"""LoRAs for tests: random weights in a file, and the tiny model's output with it, as diffusers has it."""

import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel

from cogds.model.load import find_model, load_transformer
from cogds.model.lora.adapter import export, inject
from tests.model.lora.test_adapter import ATTENTION, example_inputs, randomize


def write_lora(model_path, folder, rank=4, alpha=8.0, targets=ATTENTION, metadata=None):
    """A LoRA with random weights in diffusers' format; returns its folder."""
    transformer = load_transformer(find_model(str(model_path)), torch.float32)
    randomize(inject(transformer, rank, alpha, 0.0, targets, seed=0), seed=rank)
    tensors = {name: p.detach() for name, p in transformer.named_parameters() if p.requires_grad}
    return export(folder, transformer, tensors, metadata or {"image_latents": "pipeline"}).parent


def base_transformer(model_path):
    """diffusers' own class with the model's weights."""
    return CogVideoXTransformer3DModel.from_pretrained(model_path, subfolder="transformer", use_safetensors=True)


@torch.no_grad()
def output(transformer):
    return transformer(**example_inputs())[0]


def output_in_diffusers(model_path, *loras):
    """The transformer's output with these (file or folder, weight), through the pipeline's own loader."""
    transformer = base_transformer(model_path)
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(model_path, transformer=transformer, use_safetensors=True)
    for number, (path, _) in enumerate(loras):
        pipeline.load_lora_weights(path, adapter_name=f"lora{number}", use_safetensors=True)
    pipeline.set_adapters([f"lora{number}" for number in range(len(loras))], [weight for _, weight in loras])
    return output(transformer)

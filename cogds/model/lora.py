"""The adapter: injected into the transformer, filled from a LoRA or added as one, exported to a file.

What is exported is what was trained: rank and alpha travel in the file as diffusers' own metadata (without it a LoRA
of alpha 2r loads at half its strength), and beside it what only this project records: the image-latent convention.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXImageToVideoPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from cogds.errors import UserError, did_you_mean
from cogds.model.convert import Adapter, check_fits, diffusers_header, load_adapter, peft_config
from cogds.model.lora_file import LoraFile, describe_lora, join_values

ALL_LINEAR = "all-linear"
ADAPTER = "default"  # the name that diffusers' add_adapter gives
INIT_ALPHA = "lora.init_alpha"


def linear_layers(transformer: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the transformer's own Linear layers by full name, whether a LoRA was injected or not."""
    return {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and not re.search(r"\.lora_[AB]\.", name)
    }


def resolve_targets(transformer: torch.nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Full names of the Linear layers that `target_modules` (names, dotted endings, or `all-linear`) stand for.

    Raises UserError for a name that no Linear layer ends with.
    """
    linears = linear_layers(transformer)
    if not target_modules:
        raise UserError(f"lora.target_modules is empty: name Linear layers, such as to_q, or [{ALL_LINEAR}]")
    if list(target_modules) == [ALL_LINEAR]:
        return list(linears)
    chosen = []
    for target in target_modules:
        matches = [name for name in linears if name == target or name.endswith("." + target)]
        if not matches:
            endings = {".".join(name.split(".")[-n:]) for name in linears for n in (1, 2)} | {ALL_LINEAR}
            raise UserError(
                f"lora.target_modules: no Linear layer of the transformer is called '{target}'"
                f"{did_you_mean(target, endings)}; all of them are trained with [{ALL_LINEAR}]"
            )
        chosen += [name for name in matches if name not in chosen]
    return chosen


def inject(
    transformer: Any, rank: int, alpha: float, dropout: float, target_modules: Sequence[str], seed: int
) -> list[torch.nn.Parameter]:
    """Add a LoRA to a frozen diffusers transformer; returns its trainable parameters.

    A is drawn from the seed and B is zero, so that step 0 is the base model and every rank starts the same.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # peft divides it: a fraction is as good as an integer
        lora_dropout=dropout,
        target_modules=resolve_targets(transformer, target_modules),
        init_lora_weights=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def export(folder: Path, transformer: Any, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write `pytorch_lora_weights.safetensors` in diffusers' format into `folder`; returns its path.

    tensors: the trainable parameters by name, whole (under ZeRO-3 the module's own are empty shards).
    metadata: what to record under this project's key, JSON-able.
    """
    state = {name: tensor.cpu() for name, tensor in get_peft_model_state_dict(transformer, dict(tensors)).items()}
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty or not state:
        raise RuntimeError(f"LoRA export: {len(empty)} of {len(state)} tensors are empty, the first is {empty[:1]}")
    header = diffusers_header(transformer.peft_config[ADAPTER], metadata)
    CogVideoXImageToVideoPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=state,
        save_function=lambda weights, filename: save_file(weights, filename, metadata=header),
    )
    return folder / LORA_WEIGHT_NAME_SAFE


@torch.no_grad()
def add_lora(transformer: Any, adapter: Adapter, name: str = ADAPTER) -> None:
    """Add a LoRA to a transformer that it fits, as its adapter `name`, in the transformer's dtype, on its device."""
    transformer.add_adapter(peft_config(adapter), name)
    injected = {layer: module for layer, module in _injected(transformer).items() if name in module.lora_A}
    if injected.keys() != adapter.layers.keys():
        raise RuntimeError(f"PEFT chose other layers: {sorted(injected.keys() ^ adapter.layers.keys())[:4]}, ...")
    for layer, module in injected.items():
        module.lora_A[name].weight.copy_(adapter.layers[layer].a)
        module.lora_B[name].weight.copy_(adapter.layers[layer].b)


def _injected(transformer: torch.nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def check_start(transformer: torch.nn.Module, file: LoraFile) -> None:
    """Whether `start_from` would do, having read nothing but the file's header.

    transformer: after `inject`; without memory for its weights will do. Raises UserError naming what the file has, what
    the run has and what to set, or the layer that the transformer does not have.
    """
    layers, linears = _injected(transformer), linear_layers(transformer)
    check_fits(file, {f"{name}.weight": shape for name, shape in linears.items()}, "this run's model")
    if len(file.ranks) > 1:
        raise UserError(
            f"lora.init_from: {file.path} has layers of ranks {join_values(file.ranks)}, but a run has one rank. "
            "Pass a LoRA of one rank."
        )
    rank, wanted = file.ranks[0], next(iter(layers.values())).r[ADAPTER]
    theirs, own = targets_of(file.pairs, list(linears)), targets_of(layers, list(linears))
    settings = [f"lora.rank={rank}"] if rank != wanted else []
    settings += [f"'lora.target_modules=[{','.join(theirs)}]'"] if set(file.pairs) != set(layers) else []
    if settings:
        raise UserError(
            f"lora.init_from: {file.path} has rank {rank} on {len(file.pairs)} layers ({join_values(theirs, 8)}), this "
            f"run rank {wanted} on {len(layers)} ({join_values(own, 8)}). Set {' '.join(settings)}"
        )


def targets_of(layers: Iterable[str], linears: Sequence[str]) -> list[str]:
    """The shortest endings of names that stand for these of the Linear layers and for no others."""
    layers, chosen = set(layers), set()
    if layers == set(linears):
        return [ALL_LINEAR]
    for layer in layers:
        parts = layer.split(".")
        for n in range(1, len(parts) + 1):
            ending = ".".join(parts[-n:])
            matches = {name for name in linears if name == ending or name.endswith("." + ending)}
            if matches <= layers and not parts[-n].isdigit():
                break
        chosen.add(ending)
    return sorted(chosen)


@torch.no_grad()
def start_from(transformer: torch.nn.Module, file: LoraFile) -> None:
    """Fill the adapter that `inject` made with a LoRA's weights. The caller's parameters are whole.

    The file's strength is kept: B is scaled by alpha/rank there over alpha/rank here, so that the transformer gives
    what the file gave, whatever lora.alpha is. Raises UserError as `check_start` does, and for values that are not
    finite.
    """
    check_start(transformer, file)
    adapter = load_adapter(file, dtype=torch.float32)
    for name, module in _injected(transformer).items():
        layer = adapter.layers[name]
        module.lora_A[ADAPTER].weight.copy_(layer.a)
        module.lora_B[ADAPTER].weight.copy_(layer.b * (layer.scale / module.scaling[ADAPTER]))


def describe_start(file: LoraFile, image_latents: str) -> list[str]:
    """For people: what a run starts from, and what they may not expect of it.

    image_latents: `conditioning.image_latents` of the run.
    """
    first, *lines = describe_lora(file, INIT_ALPHA)
    lines.insert(0, f"starting from {first}")
    theirs = file.metadata.get("image_latents", image_latents)
    if theirs != image_latents:
        lines.append(f"  it was trained with conditioning.image_latents={theirs}, this run has {image_latents}")
    return lines

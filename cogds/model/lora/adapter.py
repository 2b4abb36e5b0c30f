"""The adapter: injected into the transformer, filled from a file, exported to one.

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
from cogds.model.lora.convert import diffusers_header
from cogds.model.lora.file import LoraFile, lora_file, opened, read_lora

ALL_LINEAR = "all-linear"
ADAPTER = "default"  # the name that diffusers' add_adapter gives


def linear_layers(transformer: torch.nn.Module) -> list[str]:
    """Full names of the transformer's own Linear layers, whether a LoRA has been injected or not."""
    return [
        name.removesuffix(".base_layer")
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and not re.search(r"\.lora_[AB]\.", name)
    ]


def resolve_targets(transformer: torch.nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Full names of the Linear layers that `target_modules` (names, dotted endings, or `all-linear`) stand for.

    Raises UserError for a name that no Linear layer ends with.
    """
    linears = linear_layers(transformer)
    if not target_modules:
        raise UserError(f"lora.target_modules is empty: name Linear layers, such as to_q, or [{ALL_LINEAR}]")
    if list(target_modules) == [ALL_LINEAR]:
        return linears
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


def load_into(transformer: Any, path: str | Path) -> None:
    """Add a LoRA file to a transformer, as `pipe.load_lora_weights` does. Raises UserError where there is none."""
    file = lora_file(path)
    with opened(file):  # what this refuses, diffusers would try as a pickle
        state, metadata = CogVideoXImageToVideoPipeline.lora_state_dict(
            file, use_safetensors=True, return_lora_metadata=True
        )
    CogVideoXImageToVideoPipeline.load_lora_into_transformer(state, transformer, metadata=metadata)


def _injected(transformer: torch.nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def check_start(transformer: torch.nn.Module, path: str | Path) -> LoraFile:
    """Whether `start_from` would do, having read nothing but the file's header. Returns what that says.

    transformer: after `inject`; without memory for its weights will do. Raises UserError naming what the file has, what
    the run has and what to set, or saying why the file cannot be used.
    """
    file, layers = read_lora(path), _injected(transformer)
    linears = linear_layers(transformer)
    if strange := [name for name in file.pairs if name not in linears]:
        raise UserError(
            f"lora.init_from: {file.path} has a layer {strange[0]}, which this transformer has not: it was made for "
            "another model, or by a tool that names layers in a way of its own; convert it to diffusers' format"
        )
    if len(file.ranks) > 1:
        raise UserError(
            f"lora.init_from: {file.path} has layers of ranks {', '.join(map(str, file.ranks))}; here all have one "
            "rank: give a LoRA of one rank"
        )
    rank, wanted = file.ranks[0], next(iter(layers.values())).r[ADAPTER]
    theirs, own = targets_of(file.pairs, linears), targets_of(layers, linears)
    settings = [f"lora.rank={rank}"] if rank != wanted else []
    settings += [f"'lora.target_modules=[{','.join(theirs)}]'"] if set(file.pairs) != set(layers) else []
    if settings:
        raise UserError(
            f"lora.init_from: {file.path} has rank {rank} on {len(file.pairs)} layers ({_listed(theirs)}), this run "
            f"rank {wanted} on {len(layers)} ({_listed(own)}): set {' '.join(settings)}"
        )
    for name, module in layers.items():
        pair, (num_out, num_in) = file.pairs[name], (module.out_features, module.in_features)
        if (pair.num_out, pair.num_in) != (num_out, num_in):
            raise UserError(
                f"lora.init_from: {file.path} was made for another model: layer {name} is {pair.num_out}x{pair.num_in} "
                f"there and {num_out}x{num_in} here"
            )
    return file


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


def _listed(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


@torch.no_grad()
def start_from(transformer: torch.nn.Module, path: str | Path) -> LoraFile:
    """Fill the adapter that `inject` made with a LoRA file's weights. The caller's parameters are whole.

    The file's strength is kept: B is scaled by alpha/rank there over alpha/rank here, so that the transformer gives
    what the file gave, whatever lora.alpha is. Raises UserError as `check_start` does, and for values that are not
    finite.
    """
    file = check_start(transformer, path)
    with opened(file.path) as tensors:
        for name, module in _injected(transformer).items():
            pair = file.pairs[name]
            factor = pair.scale / module.scaling[ADAPTER]
            for half, key, scale in ((module.lora_A, pair.a, 1.0), (module.lora_B, pair.b, factor)):
                value = tensors.get_tensor(key).float() * scale
                if not torch.isfinite(value).all():
                    raise UserError(f"lora.init_from: {file.path} holds values in '{key}' that are not finite")
                half[ADAPTER].weight.copy_(value)
    return file


def describe_start(file: LoraFile, image_latents: str) -> list[str]:
    """For people: what a run starts from, and what they may not expect of it.

    image_latents: `conditioning.image_latents` of the run.
    """
    scales = sorted({pair.scale for pair in file.pairs.values()})
    strength = ", ".join(f"{scale:g}" for scale in scales[:4])
    source = "its alpha/rank" if file.has_alpha else "it names no alpha: alpha = rank, as diffusers takes it"
    lines = [f"starting from {file.path}, at strength {strength} ({source})"]
    theirs = file.metadata.get("image_latents", image_latents)
    if theirs != image_latents:
        lines.append(f"  it was trained with conditioning.image_latents={theirs}, this run has {image_latents}")
    return lines

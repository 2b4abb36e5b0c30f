"""A LoRA in memory, and written in the formats of other tools, each at the strength it was trained with.

    diffusers          its own names, alpha in the header
    comfyui            ComfyUI's names for its own CogVideoX class, alpha as a tensor of every layer
    comfyui-wrapper    diffusers' names, for the custom node ComfyUI-CogVideoXWrapper: it loads with whatever diffusers
                       is installed beside it, of which older ones pass over alpha, so alpha/rank is within the weights
                       and the header has no alpha

What this project records of a LoRA (the image-latent convention, sizes, ...) travels in the header of each.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from safetensors.torch import save_file

from cogds.errors import UserError
from cogds.model.load import ModelFolder, empty_transformer
from cogds.model.lora.file import ALPHA_IN_WEIGHTS, OWN_METADATA_KEY, LoraFile, opened
from cogds.model.lora.formats import COMFYUI_PREFIX, DIFFUSERS_PREFIX, comfyui_name

# What diffusers gives to `peft.LoraConfig`, all of it: a field that the installed PEFT does not know is a TypeError
# there, and every version since 0.15 at least knows these. They are all that a plain LoRA needs.
HEADER_FIELDS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Layer:
    """One layer's part: it adds scale x BA. a [rank, in], b [out, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def alpha(self) -> float:
        """What a loader divides by the rank."""
        return round(self.scale * self.rank, 9)


@dataclass(frozen=True)
class Adapter:
    """layers: by the full name of the transformer's layer. metadata: what this project recorded of it, or {}."""

    layers: Mapping[str, Layer]
    metadata: Mapping[str, Any]


def load_adapter(file: LoraFile, scale: float = 1.0, dtype: torch.dtype | None = None) -> Adapter:
    """The LoRA whose header `lora_file.read_lora` has read, at `scale` times its strength, in `dtype` or its own.

    The sign of a negative scale goes into B: no tool writes a negative alpha, and `read_lora` refuses it. Raises
    UserError for values that are not finite.
    """

    def tensor(tensors: Any, key: str) -> torch.Tensor:
        value = tensors.get_tensor(key)
        value = value.to(dtype or value.dtype)
        if not torch.isfinite(value.float()).all():
            raise UserError(
                f"{file.path}: '{key}' holds values that are not finite. Export the LoRA from another step."
            )
        return value.contiguous()

    with opened(file.path) as tensors:
        layers = {
            name: Layer(tensor(tensors, pair.a), tensor(tensors, pair.b), pair.scale * abs(scale))
            for name, pair in file.pairs.items()
        }
    if scale < 0:
        layers = {name: replace(layer, b=(-layer.b.float()).to(layer.b.dtype)) for name, layer in layers.items()}
    scaled = {"exported_scale": scale * file.metadata.get("exported_scale", 1.0)} if scale != 1.0 else {}
    return Adapter(layers, file.metadata | scaled)


def baked(adapter: Adapter) -> Adapter:
    """The same with scale 1 everywhere: what multiplied BA is within B."""
    layers = {
        name: replace(layer, b=(layer.b.float() * layer.scale).to(layer.b.dtype), scale=1.0)
        for name, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


def peft_config(adapter: Adapter) -> LoraConfig:
    """What a loader is told: one rank and one alpha, and the layers that have others."""
    ranks = {name: layer.rank for name, layer in adapter.layers.items()}
    alphas = {name: layer.alpha for name, layer in adapter.layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        target_modules=sorted(adapter.layers),
        # PEFT takes the keys as regular expressions.
        rank_pattern={re.escape(name): one for name, one in ranks.items() if one != rank},
        alpha_pattern={re.escape(name): one for name, one in alphas.items() if one != alpha},
    )


def own_header(metadata: Mapping[str, Any]) -> dict[str, str]:
    """A safetensors header with what this project records of a LoRA."""
    return {"format": "pt", OWN_METADATA_KEY: json.dumps(dict(metadata), sort_keys=True)}


def diffusers_header(config: LoraConfig, metadata: Mapping[str, Any]) -> dict[str, str]:
    """The safetensors header of a LoRA in diffusers' format, which any diffusers since 0.34 reads with any PEFT.

    Without the dropout it was trained with: diffusers would put it into the pipeline, and leave it switched on.
    """
    fields = config.to_dict()
    adapter = {f"{DIFFUSERS_PREFIX}{name}": fields[name] for name in HEADER_FIELDS}
    return own_header(metadata) | {LORA_ADAPTER_METADATA_KEY: json.dumps(adapter, default=sorted, sort_keys=True)}


def _diffusers_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {
        f"{DIFFUSERS_PREFIX}{name}.lora_{half}.weight": tensor
        for name, layer in adapter.layers.items()
        for half, tensor in (("A", layer.a), ("B", layer.b))
    }


def save_diffusers(adapter: Adapter, folder: Path) -> Path:
    """Write diffusers' file into the folder; returns its path."""
    file = folder / LORA_WEIGHT_NAME_SAFE
    save_file(_diffusers_tensors(adapter), file, diffusers_header(peft_config(adapter), adapter.metadata))
    return file


def save_comfyui(adapter: Adapter, file: Path) -> None:
    """Write the file that ComfyUI's own LoRA loader reads."""
    tensors = {}
    for name, layer in adapter.layers.items():
        prefix = COMFYUI_PREFIX + comfyui_name(name)
        # `down` and `up` rather than `A` and `B`: the wrapper refuses the former, and would pass over the latter.
        tensors[f"{prefix}.lora_down.weight"], tensors[f"{prefix}.lora_up.weight"] = layer.a, layer.b
        tensors[f"{prefix}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    save_file(tensors, file, own_header(adapter.metadata))


def save_comfyui_wrapper(adapter: Adapter, file: Path) -> None:
    """Write the file that ComfyUI-CogVideoXWrapper reads; diffusers reads it as well."""
    save_file(_diffusers_tensors(baked(adapter)), file, own_header({**adapter.metadata, ALPHA_IN_WEIGHTS: True}))


def check_all_fit(files: Iterable[LoraFile], model: ModelFolder) -> None:
    """Raise UserError, naming the layer, for a LoRA that was made for another model."""
    shapes = {name: tuple(weight.shape) for name, weight in empty_transformer(model).named_parameters()}
    for file in files:
        check_fits(file, shapes, model.path)


def check_fits(file: LoraFile, shapes: Mapping[str, tuple[int, ...]], model: Path | str) -> None:
    """Raise UserError, naming the layer, if a LoRA was made for another model.

    shapes: of the model's weights, by name.
    """
    for name, pair in file.pairs.items():
        shape, wanted = shapes.get(f"{name}.weight"), (pair.num_out, pair.num_in)
        if shape != wanted:
            problem = "is missing" if shape is None else f"is {'x'.join(map(str, shape))}"
            raise UserError(
                f"{file.path}: does not fit {model}: layer {name} is {wanted[0]}x{wanted[1]} in the LoRA and {problem} "
                "in the transformer. Pass the model that the LoRA was trained on."
            )


def check_scale(scale: float, setting: str) -> None:
    """Raise UserError for a strength that is not finite. setting: the option or file that it belongs to."""
    if not math.isfinite(scale):
        raise UserError(f"{setting}: the strength is {scale}, not a finite number. Pass a number such as 0.7.")

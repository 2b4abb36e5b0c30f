"""A LoRA in memory, and conversion to the formats of other tools at the strength it was trained with.

    diffusers          diffusers' names, with alpha in the header
    comfyui            names of ComfyUI's own CogVideoX class, with alpha as a tensor of every layer
    comfyui-wrapper    diffusers' names, for the custom node ComfyUI-CogVideoXWrapper. It loads LoRAs with the installed
                       diffusers, and older versions ignore alpha. So the weights include the factor alpha/rank, and the
                       header has no alpha.

The metadata of cogds (image-latent convention, sizes, ...) is in the header of each.
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
from cogds.files import apply_umask
from cogds.model.control import control_inputs
from cogds.model.load import ModelFolder, empty_transformer
from cogds.model.lora.file import ALPHA_IN_WEIGHTS, CONTROL_KEY, OWN_METADATA_KEY, LoraFile, open_safetensors
from cogds.model.lora.formats import COMFYUI_PREFIX, DIFFUSERS_PREFIX, comfyui_name

# diffusers passes all fields of the header to `peft.LoraConfig`, which raises TypeError for an unknown one. These are
# known to every PEFT since at least 0.15, and a plain LoRA needs no others.
HEADER_FIELDS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Layer:
    """The LoRA of one layer, which adds scale * B A. a: [rank, in]; b: [out, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def alpha(self) -> float:
        """The alpha that gives this scale when divided by the rank."""
        return round(self.scale * self.rank, 9)


@dataclass(frozen=True)
class Adapter:
    """A LoRA in memory.

    layers: by the full name of the layer; metadata: recorded by cogds, or {}; control: weight of the extra input
    channels for a control video (`model.control`), None without them.
    """

    layers: Mapping[str, Layer]
    metadata: Mapping[str, Any]
    control: torch.Tensor | None = None


def load_adapter(file: LoraFile, scale: float = 1.0, dtype: torch.dtype | None = None) -> Adapter:
    """Load the weights of a LoRA file at `scale` times its strength, in `dtype` or the dtype of the file.

    The sign of a negative scale is moved into B, because no tool writes a negative alpha and `read_lora` refuses it.
    Raises UserError if a value is not finite.
    """

    def tensor(tensors: Any, key: str) -> torch.Tensor:
        value = tensors.get_tensor(key)
        value = value.to(dtype or value.dtype)
        if not torch.isfinite(value.float()).all():
            raise UserError(f"{file.path}: '{key}' has values that are not finite. Export the LoRA of another step.")
        return value.contiguous()

    with open_safetensors(file.path) as tensors:
        layers = {
            name: Layer(tensor(tensors, pair.a), tensor(tensors, pair.b), pair.scale * abs(scale))
            for name, pair in file.pairs.items()
        }
        control = tensor(tensors, CONTROL_KEY) * scale if file.control else None
    if scale < 0:
        layers = {name: replace(layer, b=(-layer.b.float()).to(layer.b.dtype)) for name, layer in layers.items()}
    scaled = {"exported_scale": scale * file.metadata.get("exported_scale", 1.0)} if scale != 1.0 else {}
    return Adapter(layers, file.metadata | scaled, control)


def fold_scales(adapter: Adapter) -> Adapter:
    """Return the same LoRA with every scale multiplied into B, so that all scales are 1."""
    layers = {
        name: replace(layer, b=(layer.b.float() * layer.scale).to(layer.b.dtype), scale=1.0)
        for name, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


def peft_config(adapter: Adapter) -> LoraConfig:
    """Return the LoraConfig: the most common rank and alpha, with patterns for layers that differ."""
    ranks = {name: layer.rank for name, layer in adapter.layers.items()}
    alphas = {name: layer.alpha for name, layer in adapter.layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        target_modules=sorted(adapter.layers),
        # PEFT treats the keys as regular expressions.
        rank_pattern={re.escape(name): value for name, value in ranks.items() if value != rank},
        alpha_pattern={re.escape(name): value for name, value in alphas.items() if value != alpha},
    )


def own_header(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return a safetensors header with cogds' metadata."""
    return {"format": "pt", OWN_METADATA_KEY: json.dumps(dict(metadata), sort_keys=True)}


def diffusers_header(config: LoraConfig, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the safetensors header of a LoRA in diffusers' format, readable by diffusers since 0.34 with any PEFT.

    It omits the dropout used in training, which diffusers would add to the pipeline and leave enabled.
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
    """Write a LoRA file for diffusers into the folder, and return its path."""
    file = folder / LORA_WEIGHT_NAME_SAFE
    control = {} if adapter.control is None else {CONTROL_KEY: adapter.control}
    header = diffusers_header(peft_config(adapter), adapter.metadata)
    save_file(_diffusers_tensors(adapter) | control, file, header)
    apply_umask(file)
    return file


def save_comfyui(adapter: Adapter, file: Path) -> None:
    """Write a LoRA file for ComfyUI's own LoRA loader. Raises UserError for a LoRA with a control video."""
    refuse_control(adapter.control is not None, "comfyui")
    tensors = {}
    for name, layer in adapter.layers.items():
        prefix = COMFYUI_PREFIX + comfyui_name(name)
        # With `down` and `up`, the wrapper refuses this file. With `A` and `B`, it would silently ignore the layers.
        tensors[f"{prefix}.lora_down.weight"], tensors[f"{prefix}.lora_up.weight"] = layer.a, layer.b
        tensors[f"{prefix}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    save_file(tensors, file, own_header(adapter.metadata))
    apply_umask(file)


def save_comfyui_wrapper(adapter: Adapter, file: Path) -> None:
    """Write a LoRA file for ComfyUI-CogVideoXWrapper, which diffusers can load as well. Raises as `save_comfyui`."""
    refuse_control(adapter.control is not None, "comfyui-wrapper")
    tensors = _diffusers_tensors(fold_scales(adapter))
    save_file(tensors, file, own_header({**adapter.metadata, ALPHA_IN_WEIGHTS: True}))
    apply_umask(file)


def check_all_fit(files: Iterable[LoraFile], model: ModelFolder) -> None:
    """Raise UserError, naming the layer, if a LoRA was trained on a different model."""
    shapes = {name: tuple(weight.shape) for name, weight in empty_transformer(model).named_parameters()}
    for file in files:
        check_fits(file, shapes, model.path)
        check_control_fits(file, model)


def refuse_control(has_control: bool, kind: str) -> None:
    """Raise UserError if a LoRA with a control video is to be written in a format that has no place for its weight."""
    if has_control:
        raise UserError(
            f"--to {kind}: the LoRA was trained with control videos, and this format cannot hold their input channels. "
            "Use --to diffusers."
        )


def check_control_fits(file: LoraFile, model: ModelFolder) -> None:
    """Raise UserError if the extra input channels of a LoRA were trained on a model of another size."""
    geometry = model.geometry
    inputs = control_inputs(geometry.latent_channels, geometry.patch_size_t, geometry.patch_size)
    if file.control not in (None, (model.hidden_size, inputs)):
        raise UserError(
            f"{file.path}: does not fit {model.path}: its weight for a control video is {file.control[0]}x"
            f"{file.control[1]}, not {model.hidden_size}x{inputs}. Pass the model that the LoRA was trained on."
        )


def check_fits(file: LoraFile, shapes: Mapping[str, tuple[int, ...]], model: Path | str) -> None:
    """Raise UserError, naming the layer, if a LoRA was trained on a different model.

    shapes: of the model's weights, by name; model: its name in the message.
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
    """Raise UserError if a strength is not finite. setting: the option or file that it belongs to."""
    if not math.isfinite(scale):
        raise UserError(f"{setting}: the strength is {scale}, not a finite number. Pass a number such as 0.7.")

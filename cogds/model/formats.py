"""What LoRA files call the layers of CogVideoX's transformer: names only (`lora_file` reads, `convert` writes files).

One layer's A, or one of its tensors, in each format that is read:

    diffusers, finetrainers     transformer.transformer_blocks.0.attn1.to_q.lora_A.weight
    older diffusers             transformer.transformer_blocks.0.attn1.to_q.lora.down.weight
    save_lora_adapter, CogKit   transformer_blocks.0.attn1.to_q.lora_A.weight
    PEFT                        base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight
    a PEFT state dict           transformer_blocks.0.attn1.to_q.lora_A.default.weight
    diffusion-pipe              diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight
    ComfyUI                     diffusion_model.blocks.0.q.lora_down.weight, diffusion_model.blocks.0.q.alpha
    VideoX-Fun, kohya           lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight, ... .alpha
    SAT                         model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_A.0

ComfyUI has a class of its own for this model: the same layers, one linear map each, under other names. Its LoRA loader
takes `diffusion_model.NAME.lora_down.weight` and `.lora_up.weight`, and multiplies by `NAME.alpha` over the rank, or by
1 where there is no alpha.
"""

import re
from typing import NamedTuple

COMFYUI_PREFIX, PEFT_PREFIX, DIFFUSERS_PREFIX = "diffusion_model.", "base_model.model.", "transformer."
# Ours -> ComfyUI's.
_COMFYUI = (
    ("transformer_blocks", "blocks"),
    ("attn1.to_q", "q"),
    ("attn1.to_k", "k"),
    ("attn1.to_v", "v"),
    ("attn1.to_out.0", "attn_out"),
    ("ff.net.0.proj", "ff_proj"),
    ("ff.net.2", "ff_out"),
    ("time_embedding.linear_1", "time_embedding_linear_1"),
    ("time_embedding.linear_2", "time_embedding_linear_2"),
    ("ofs_embedding.linear_1", "ofs_embedding_linear_1"),
    ("ofs_embedding.linear_2", "ofs_embedding_linear_2"),
)
# Not linear layers: in full weights only.
_COMFYUI_NORMS = (("attn1.norm_q", "norm_q"), ("attn1.norm_k", "norm_k"))
# The linear layers with the same name in both.
_SAME = ("norm1.linear", "norm2.linear", "patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out")
_IN_BLOCK = ("attn1.", "ff.", "norm1.", "norm2.")
# Every name of a linear layer, without its block, dots as underscores -> ours.
_LAYERS = {name.replace(".", "_"): layer for layer, other in _COMFYUI[1:] for name in (layer, other)}
_LAYERS |= {layer.replace(".", "_"): layer for layer in _SAME}

_KEY = re.compile(
    r"(?:(?:base_model\.model|model|transformer|diffusion_model)\.)*(?:lora_(?:unet|transformer)_+)?"
    r"(?P<name>.+)\."
    # The name of PEFT's adapter may stand before `weight`.
    r"(?:lora_(?P<half>[AB])(?:\.[^.]+)?\.weight|lora[._](?P<way>down|up)\.weight|(?P<alpha>alpha))"
)
# `LoraMixin` of SwissArmyTransformer (sat/model/finetune/lora2.py), and the names that zai-org/CogVideo's
# tools/export_sat_lora_weight.py gives: query, key and value are one layer with three pairs.
_SAT_KEY = re.compile(r"(?:.+\.)?layers\.(\d+)\.attention\.(query_key_value|dense)\.matrix_([AB])\.([012])")
_SAT_LAYERS = {"query_key_value": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "dense": ("attn1.to_out.0",)}
SAT_ALPHA = 1.0  # that mixin's default, which the configs of zai-org/CogVideo keep


class Key(NamedTuple):
    """What a tensor's name in a LoRA file stands for. part: "A", "B" or "alpha", of `layer` of the transformer."""

    layer: str
    part: str
    is_sat: bool = False


def parse_key(key: str) -> Key | None:
    """What a tensor of a LoRA file is, in any of the formats above; None if it is nothing of this transformer."""
    if match := _SAT_KEY.fullmatch(key):
        layers, index = _SAT_LAYERS[match[2]], int(match[4])
        name = f"transformer_blocks.{match[1]}.{layers[index]}" if index < len(layers) else None
        return Key(name, match[3], is_sat=True) if name else None
    match = _KEY.fullmatch(key)
    layer = layer_named(match["name"]) if match else None
    if match is None or layer is None:
        return None
    return Key(layer, match["half"] or {"down": "A", "up": "B", None: "alpha"}[match["way"]])


def layer_named(name: str) -> str | None:
    """A linear layer's name in diffusers, given that or ComfyUI's, with dots or with underscores; None if unknown.

    `blocks.0.q`, `transformer_blocks_0_attn1_to_q` -> `transformer_blocks.0.attn1.to_q`.
    """
    match = re.fullmatch(r"(?:(?:transformer_)?blocks_(\d+)_)?(.+)", name.replace(".", "_"))
    layer = _LAYERS.get(match[2]) if match else None
    if match is None or layer is None or layer.startswith(_IN_BLOCK) != bool(match[1]):
        return None
    return f"transformer_blocks.{match[1]}.{layer}" if match[1] else layer


def comfyui_name(layer: str) -> str:
    """`transformer_blocks.0.attn1.to_q` -> `blocks.0.q`. What ComfyUI calls the same stays as it is."""
    table = dict(_COMFYUI + _COMFYUI_NORMS)
    known = "|".join(re.escape(part) for part in table)
    # Whole runs of dotted parts only.
    return re.sub(rf"(?<![^.])({known})(?![^.])", lambda match: table[match[1]], layer)

"""Names of CogVideoX's layers in LoRA files of different tools. `file` reads such files, `convert` writes them.

The A matrix of one layer in each supported format:

    diffusers, finetrainers     transformer.transformer_blocks.0.attn1.to_q.lora_A.weight
    older diffusers             transformer.transformer_blocks.0.attn1.to_q.lora.down.weight
    save_lora_adapter, CogKit   transformer_blocks.0.attn1.to_q.lora_A.weight
    PEFT                        base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight
    a PEFT state dict           transformer_blocks.0.attn1.to_q.lora_A.default.weight
    diffusion-pipe              diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight
    ComfyUI                     diffusion_model.blocks.0.q.lora_down.weight, diffusion_model.blocks.0.q.alpha
    VideoX-Fun, kohya           lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight, ... .alpha
    SAT                         model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_A.0

ComfyUI has its own class for this model, with the same linear layers under different names. Its LoRA loader reads
`diffusion_model.NAME.lora_down.weight` and `.lora_up.weight`, and multiplies by `NAME.alpha` divided by the rank, or by
1 if there is no alpha.
"""

import re
from typing import NamedTuple

COMFYUI_PREFIX, PEFT_PREFIX, DIFFUSERS_PREFIX = "diffusion_model.", "base_model.model.", "transformer."
# diffusers' names -> ComfyUI's.
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
# These are not linear layers, and occur only in full weights.
_COMFYUI_NORMS = (("attn1.norm_q", "norm_q"), ("attn1.norm_k", "norm_k"))
# Linear layers with the same name in both.
_SAME = ("norm1.linear", "norm2.linear", "patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out")
_IN_BLOCK = ("attn1.", "ff.", "norm1.", "norm2.")
# Names of linear layers in either, without the block and with underscores in place of dots -> diffusers' name.
_LAYERS = {name.replace(".", "_"): layer for layer, other in _COMFYUI[1:] for name in (layer, other)}
_LAYERS |= {layer.replace(".", "_"): layer for layer in _SAME}

_KEY = re.compile(
    r"(?:(?:base_model\.model|model|transformer|diffusion_model)\.)*(?:lora_(?:unet|transformer)_+)?"
    r"(?P<name>.+)\."
    # PEFT may insert the adapter's name before `weight`.
    r"(?:lora_(?P<half>[AB])(?:\.[^.]+)?\.weight|lora[._](?P<way>down|up)\.weight|(?P<alpha>alpha))"
)
# Names of SwissArmyTransformer's `LoraMixin` (sat/model/finetune/lora2.py) and of tools/export_sat_lora_weight.py in
# zai-org/CogVideo. Query, key and value are one layer with three pairs of matrices.
_SAT_KEY = re.compile(r"(?:.+\.)?layers\.(\d+)\.attention\.(query_key_value|dense)\.matrix_([AB])\.([012])")
_SAT_LAYERS = {"query_key_value": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "dense": ("attn1.to_out.0",)}
SAT_ALPHA = 1.0  # the default of `LoraMixin`, which the configs of zai-org/CogVideo do not change


class Key(NamedTuple):
    """A parsed tensor name of a LoRA file. layer: full name in the transformer; part: "A", "B" or "alpha"."""

    layer: str
    part: str
    is_sat: bool = False


def parse_key(key: str) -> Key | None:
    """Parse a tensor name in any of the formats above. None if it does not belong to this transformer."""
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
    """Return diffusers' name of a linear layer from its name in diffusers or ComfyUI, or None if it is unknown.

    Underscores are accepted in place of dots:

    `blocks.0.q`, `transformer_blocks_0_attn1_to_q` -> `transformer_blocks.0.attn1.to_q`.
    """
    match = re.fullmatch(r"(?:(?:transformer_)?blocks_(\d+)_)?(.+)", name.replace(".", "_"))
    layer = _LAYERS.get(match[2]) if match else None
    if match is None or layer is None or layer.startswith(_IN_BLOCK) != bool(match[1]):
        return None
    return f"transformer_blocks.{match[1]}.{layer}" if match[1] else layer


def comfyui_name(layer: str) -> str:
    """Return ComfyUI's name of a layer or weight: `transformer_blocks.0.attn1.to_q` -> `blocks.0.q`."""
    table = dict(_COMFYUI + _COMFYUI_NORMS)
    known = "|".join(re.escape(part) for part in table)
    # Match whole dotted parts only.
    return re.sub(rf"(?<![^.])({known})(?![^.])", lambda match: table[match[1]], layer)

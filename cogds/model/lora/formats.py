"""Layer names of CogVideoX's transformer in other tools (`lora_file` reads them, `convert` and `merge` write them).

ComfyUI has its own class for this model: the same layers with the same shapes under other names. Its LoRA loader takes
`diffusion_model.NAME.lora_down.weight` and `.lora_up.weight`, and multiplies by `NAME.alpha` over the rank, or by 1 if
there is no alpha.
"""

import re

COMFYUI_PREFIX = "diffusion_model."
# diffusers' names -> ComfyUI's (comfy/ldm/cogvideo/model.py). Others are the same: patch_embed.*, norm*.*, proj_out.
_COMFYUI = (
    ("transformer_blocks", "blocks"),
    ("attn1.to_q", "q"),
    ("attn1.to_k", "k"),
    ("attn1.to_v", "v"),
    ("attn1.to_out.0", "attn_out"),
    ("attn1.norm_q", "norm_q"),
    ("attn1.norm_k", "norm_k"),
    ("ff.net.0.proj", "ff_proj"),
    ("ff.net.2", "ff_out"),
    ("time_embedding.linear_1", "time_embedding_linear_1"),
    ("time_embedding.linear_2", "time_embedding_linear_2"),
    ("ofs_embedding.linear_1", "ofs_embedding_linear_1"),
    ("ofs_embedding.linear_2", "ofs_embedding_linear_2"),
)


def comfyui_name(layer: str) -> str:
    """`transformer_blocks.0.attn1.to_q` -> `blocks.0.q`."""
    return _renamed(layer, dict(_COMFYUI))


def layer_of_comfyui(name: str) -> str:
    """`blocks.0.q` -> `transformer_blocks.0.attn1.to_q`."""
    return _renamed(name, {theirs: ours for ours, theirs in _COMFYUI})


def _renamed(name: str, table: dict[str, str]) -> str:
    """The name with every whole run of its dotted parts that the table knows replaced."""
    known = "|".join(re.escape(part) for part in table)
    return re.sub(rf"(?<![^.])({known})(?![^.])", lambda match: table[match[1]], name)

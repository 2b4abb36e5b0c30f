"""Full weights with LoRAs merged in: a `transformer/` folder for diffusers, or a single file for ComfyUI's own class.

Weights are read, merged in float32 and written one shard (diffusers) or one tensor (ComfyUI) at a time, so the memory
needed does not depend on the size of the model.
"""

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from cogds.errors import UserError
from cogds.files import apply_umask
from cogds.model.load import PARTS, ModelFolder, transformer_weights
from cogds.model.lora.convert import own_header
from cogds.model.lora.file import WeightedLora, open_safetensors
from cogds.model.lora.formats import comfyui_name

SHARD_BYTES = 2 * 10**9
PATCH_EMBEDDING = "patch_embed.proj.weight"
# safetensors' names of dtypes.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# ComfyUI reads most sizes from the weights' shapes. These are fixed in its code: comfy/model_detection.py (heads,
# patches), comfy/supported_models.py (CogVideoX_I2V), comfy/ldm/cogvideo/model.py (output channels).
_COMFYUI_SIZES = {
    "attention_head_dim": 64,
    "in_channels": 32,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 2,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": False,
}


@dataclass(frozen=True)
class Weight:
    """Name and shape of a weight of the base model, and the dtype that it is stored in after the merge."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_weights(model: ModelFolder, dtype: torch.dtype | None = None) -> list[Weight]:
    """List all weights of the transformer, in the order of its files, to be stored in `dtype` or in their own dtype.

    Raises UserError if a weight is not stored in floating point.
    """
    weights = []
    for name, slice_ in transformer_weights(model):
        if (own_dtype := _DTYPES.get(slice_.get_dtype())) is None:
            raise UserError(
                f"{model.path}: weight '{name}' is stored as {slice_.get_dtype()}, but LoRAs can be merged only into "
                "bf16, fp16 or fp32. Use an unquantized model."
            )
        weights.append(Weight(name, tuple(slice_.get_shape()), dtype or own_dtype))
    return weights


def split_shards(weights: Sequence[Weight], shard_bytes: int) -> list[list[Weight]]:
    """Split the weights, in order, into files of at most `shard_bytes` (or of one larger weight)."""
    shards: list[list[Weight]] = []
    for weight in weights:
        if not shards or sum(other.num_bytes for other in shards[-1]) + weight.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(weight)
    return shards


@dataclass(frozen=True)
class Merge:
    """A model's transformer with LoRAs merged in.

    Attributes:
        loras: must fit the model (`convert.check_fits`).
        dtype: of the stored weights, None to keep the model's.
        image_factor: the factor that the pipeline's image latents would need for these LoRAs. It is folded into the
            patch embedding's weights of the image channels, so tools can feed image latents as the pipeline does.
    """

    model: ModelFolder
    loras: Sequence[WeightedLora]
    dtype: torch.dtype | None = None
    image_factor: float = 1.0

    def tensors(self) -> Iterator[tuple[Weight, torch.Tensor]]:
        """Yield every weight and its values after the merge, in the order of `read_weights`.

        Raises UserError if a LoRA makes a weight infinite or NaN.
        """
        weights = read_weights(self.model, self.dtype)
        with ExitStack() as stack:
            files = [stack.enter_context(open_safetensors(lora.file.path)) for lora in self.loras]
            for weight, (name, slice_) in zip(weights, transformer_weights(self.model), strict=True):
                value, layer = slice_[:], name.removesuffix(".weight")
                for lora, tensors in zip(self.loras, files):
                    if (pair := lora.file.pairs.get(layer)) is not None and name != layer:
                        a, b = (tensors.get_tensor(key).float() for key in (pair.a, pair.b))
                        value = torch.addmm(value.float(), b, a, alpha=lora.weight * pair.scale)
                        if not torch.isfinite(value).all():
                            raise UserError(
                                f"{lora.file.path}: layer {layer} is not finite after the merge. Use another LoRA."
                            )
                if name == PATCH_EMBEDDING and self.image_factor != 1.0:
                    num_channels = self.model.transformer_config["in_channels"]
                    value = scale_image_channels(value.float(), num_channels, self.image_factor)
                yield weight, value.to(weight.dtype).contiguous()


def save_merged(folder: Path, merge: Merge, metadata: Mapping[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
    """Write a `transformer/` folder for diffusers: merged weights, index and config."""
    folder.mkdir(parents=True)
    weights = read_weights(merge.model, merge.dtype)
    shards = split_shards(weights, shard_bytes)
    single = len(shards) == 1
    stem, _, end = SAFETENSORS_WEIGHTS_NAME.rpartition(".")
    files = [
        SAFETENSORS_WEIGHTS_NAME if single else f"{stem}-{number + 1:05d}-of-{len(shards):05d}.{end}"
        for number in range(len(shards))
    ]
    merged = merge.tensors()
    for file, shard in zip(files, shards):
        tensors = {weight.name: tensor for weight, tensor in itertools.islice(merged, len(shard))}
        save_file(tensors, folder / file, own_header(metadata))
        apply_umask(folder / file)
    if not single:
        index = {
            "metadata": {"total_size": sum(weight.num_bytes for weight in weights)},
            "weight_map": {weight.name: file for file, shard in zip(files, shards) for weight in shard},
        }
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    shutil.copyfile(merge.model.path / "transformer/config.json", folder / "config.json")


def check_comfyui_supports(model: ModelFolder) -> None:
    """Raise UserError if ComfyUI's CogVideoX class cannot hold this transformer, or that has not been tried."""
    for name, supported in _COMFYUI_SIZES.items():
        if (value := model.transformer_config.get(name, False)) != supported:
            raise UserError(
                f"{model.path}: {name} is {value}, but --to comfyui-merged supports only {supported}, as in "
                "CogVideoX1.5-5B-I2V. Use --to merged."
            )


def save_comfyui_merged(file: Path, merge: Merge, metadata: Mapping[str, Any]) -> None:
    """Write one .safetensors file that ComfyUI's *Load Diffusion Model* node loads.

    The weights keep their shapes. Only their names differ from diffusers'. safetensors can only write a file whose
    tensors are all in memory (11 GB for the 5B in bf16), so this writes the format itself, one tensor at a time:
    https://github.com/huggingface/safetensors#format
    """
    weights = read_weights(merge.model, merge.dtype)
    # Wider dtypes first, as safetensors writes them: every offset is then a multiple of its dtype's size.
    offsets, end = {}, 0
    for weight in sorted(weights, key=lambda weight: -weight.dtype.itemsize):
        offsets[weight.name] = end
        end += weight.num_bytes
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {
        comfyui_name(weight.name): {
            "dtype": names[weight.dtype],
            "shape": weight.shape,
            "data_offsets": [offsets[weight.name], offsets[weight.name] + weight.num_bytes],
        }
        for weight in weights
    }
    header["__metadata__"] = own_header(metadata)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as output:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        start = output.tell()
        for weight, tensor in merge.tensors():
            output.seek(start + offsets[weight.name])
            output.write(tensor.flatten().view(torch.uint8).numpy().data)


def scale_image_channels(weight: torch.Tensor, in_channels: int, factor: float) -> torch.Tensor:
    """Scale the patch embedding's weights of the image latents, which are the second half of the channels.

    weight: [dim, channels x patch values] (linear) or [dim, channels, ...] (convolution); channels come first in both.
    """
    by_channel = weight.reshape(weight.shape[0], in_channels, -1).clone()
    by_channel[:, in_channels // 2 :] *= factor
    return by_channel.reshape(weight.shape)


def save_other_parts(folder: Path, model: ModelFolder, copy: bool) -> None:
    """Add the model's other parts to `folder`, which holds the merged transformer, so that it is a whole pipeline.

    copy: copy the files. Otherwise link to the model's files, which must then stay in place.
    """
    shutil.copyfile(model.path / "model_index.json", folder / "model_index.json")
    for part in other_files(model):
        place = folder / part.relative_to(model.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if copy:
            shutil.copyfile(part, place)
        else:
            place.symlink_to(part.resolve())


def other_files(model: ModelFolder) -> list[Path]:
    """List all files of the model's parts except the transformer's."""
    model.fetch(*PARTS)
    return [
        path
        for part in PARTS
        if part != "transformer"
        for path in sorted((model.path / part).rglob("*"))
        if path.is_file()
    ]

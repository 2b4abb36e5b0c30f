"""Full weights with LoRAs merged in: a `transformer/` folder that diffusers loads like any other.

Read, merged and written shard by shard: memory holds one shard, whatever the model's size. Sums are taken in float32.
"""

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
from cogds.model.load import PARTS, ModelFolder, transformer_weights
from cogds.model.lora.file import OWN_METADATA_KEY, LoraFile, opened

SHARD_BYTES = 2 * 10**9
PATCH_EMBEDDING = "patch_embed.proj.weight"
# safetensors' names of dtypes.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Weight:
    """A weight of the base model as its file's header has it; dtype: what it is stored in when merged."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def weights_of(model: ModelFolder, dtype: torch.dtype | None = None) -> list[Weight]:
    """All weights of the transformer, in the order of its files, to be stored in `dtype` or their own."""
    found = []
    for name, slice_ in transformer_weights(model):
        if (own := _DTYPES.get(slice_.get_dtype())) is None:
            raise UserError(
                f"weight '{name}' in {model.path} is stored as {slice_.get_dtype()}, into which nothing can be merged: "
                "give the model in bf16, fp16 or fp32"
            )
        found.append(Weight(name, tuple(slice_.get_shape()), dtype or own))
    return found


def shards_of(weights: Sequence[Weight], shard_bytes: int) -> list[list[Weight]]:
    """The weights in files of at most so many bytes (one weight at least), their order kept."""
    shards: list[list[Weight]] = []
    for weight in weights:
        if not shards or sum(one.num_bytes for one in shards[-1]) + weight.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(weight)
    return shards


def save_merged(
    folder: Path,
    model: ModelFolder,
    weights: Sequence[Weight],
    loras: Sequence[tuple[LoraFile, float]],
    metadata: Mapping[str, Any],
    image_factor: float = 1.0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the transformer's folder: `weights` (of `weights_of`) with LoRAs of these strengths, and the config.

    The LoRAs fit the model (`convert.check_fits`). image_factor: what the pipeline's image latents would have to be
    multiplied by for these LoRAs. It goes into the patch embedding's weights of the image channels, which comes to the
    same, so that every tool feeds the merged model as it was trained.
    """
    folder.mkdir(parents=True)
    shards = shards_of(weights, shard_bytes)
    single = len(shards) == 1
    stem, _, end = SAFETENSORS_WEIGHTS_NAME.rpartition(".")
    files = [
        SAFETENSORS_WEIGHTS_NAME if single else f"{stem}-{number + 1:05d}-of-{len(shards):05d}.{end}"
        for number in range(len(shards))
    ]
    header = {"format": "pt", OWN_METADATA_KEY: json.dumps(dict(metadata), sort_keys=True)}
    merged = _merged(model, loras, image_factor)
    for file, shard in zip(files, shards):
        tensors = {}
        for weight in shard:
            name, value = next(merged)
            assert name == weight.name
            tensors[name] = value.to(weight.dtype).contiguous()
        save_file(tensors, folder / file, header)
    if not single:
        index = {
            "metadata": {"total_size": sum(weight.num_bytes for weight in weights)},
            "weight_map": {weight.name: file for file, shard in zip(files, shards) for weight in shard},
        }
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    shutil.copyfile(model.path / "transformer/config.json", folder / "config.json")


def _merged(
    model: ModelFolder, loras: Sequence[tuple[LoraFile, float]], image_factor: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every weight, in the order of the files; float32 where a LoRA or the factor changed it."""
    with ExitStack() as stack:
        files = [(lora, strength, stack.enter_context(opened(lora.path))) for lora, strength in loras]
        for name, slice_ in transformer_weights(model):
            value, layer = slice_[:], name.removesuffix(".weight")
            for lora, strength, tensors in files:
                if (pair := lora.pairs.get(layer)) is not None and name != layer:
                    a, b = (tensors.get_tensor(key).float() for key in (pair.a, pair.b))
                    value = torch.addmm(value.float(), b, a, alpha=strength * pair.scale)
                    if not torch.isfinite(value).all():
                        raise UserError(f"{lora.path} makes values of layer {layer} that are not finite: give another")
            if name == PATCH_EMBEDDING and image_factor != 1.0:
                value = scaled_image_channels(value.float(), model.transformer_config["in_channels"], image_factor)
            yield name, value


def scaled_image_channels(weight: torch.Tensor, in_channels: int, factor: float) -> torch.Tensor:
    """The patch embedding's weight with what multiplies the image latents, the latter half of the channels, scaled.

    weight: [dim, channels x patch values], or a convolution's [dim, channels, ...]: channels come first in both.
    """
    by_channel = weight.reshape(weight.shape[0], in_channels, -1).clone()
    by_channel[:, in_channels // 2 :] *= factor
    return by_channel.reshape(weight.shape)


def save_other_parts(folder: Path, model: ModelFolder, copy: bool) -> None:
    """Put the model's other parts beside the merged transformer, so that `folder` is a whole pipeline.

    copy: else links to the model's files, which then must stay where they are.
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
    """Every file of the model's parts but the transformer's."""
    return [
        path
        for part in PARTS
        if part != "transformer"
        for path in sorted((model.path / part).rglob("*"))
        if path.is_file()
    ]

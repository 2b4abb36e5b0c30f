"""Files of a transformer's weights as diffusers reads them, and the other parts that make a folder a whole pipeline."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME

from cogds.errors import UserError
from cogds.model.load import PARTS, ModelFolder, transformer_weights
from cogds.tensor_file import DTYPES, TensorEntry

SHARD_BYTES = 2 * 10**9
PATCH_EMBEDDING = "patch_embed.proj.weight"


def read_weights(model: ModelFolder, dtype: torch.dtype | None = None) -> list[TensorEntry]:
    """List all weights of the transformer, in the order of its files, to be stored in `dtype` or in their own dtype.

    Raises UserError if there are no files, or a weight is not stored in floating point.
    """
    weights: list[TensorEntry] = []
    for name, slice_ in transformer_weights(model):
        if (own_dtype := DTYPES.get(slice_.get_dtype())) is None:
            raise UserError(
                f"{model.path}: weight '{name}' is stored as {slice_.get_dtype()}, but only bf16, fp16 and fp32 "
                "can be merged or trained. Use an unquantized model."
            )
        weights.append(TensorEntry(name, tuple(slice_.get_shape()), dtype or own_dtype))
    if not weights:
        raise UserError(f"{model.path / 'transformer'}: the .safetensors files are gone. Put the model back.")
    return weights


def split_shards(weights: Sequence[TensorEntry], shard_bytes: int) -> list[list[TensorEntry]]:
    """Split the weights, in order, into files of at most `shard_bytes` (or of one larger weight)."""
    shards: list[list[TensorEntry]] = []
    for weight in weights:
        if not shards or sum(other.num_bytes for other in shards[-1]) + weight.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(weight)
    return shards


def weight_files(weights: Sequence[TensorEntry], shard_bytes: int) -> dict[str, list[TensorEntry]]:
    """Split the weights into files and return those of each file, by its name."""
    shards = split_shards(weights, shard_bytes)
    if len(shards) == 1:
        return {SAFETENSORS_WEIGHTS_NAME: shards[0]}
    stem, _, end = SAFETENSORS_WEIGHTS_NAME.rpartition(".")
    return {f"{stem}-{number:05d}-of-{len(shards):05d}.{end}": shard for number, shard in enumerate(shards, 1)}


def write_index(folder: Path, files: Mapping[str, Sequence[TensorEntry]]) -> None:
    """Write the index of a folder with several files of weights."""
    if len(files) == 1:
        return
    index = {
        "metadata": {"total_size": sum(weight.num_bytes for weights in files.values() for weight in weights)},
        "weight_map": {weight.name: file for file, weights in files.items() for weight in weights},
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


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

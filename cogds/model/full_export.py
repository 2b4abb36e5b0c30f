"""A fine-tuned transformer as a diffusers folder, written tensor by tensor.

Several processes can write the files of one folder. The weights come from a function that returns the trained ones, and
from the base model's files for the others. Dtype, names and order are those of the base model's files.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cogds.model.load import ModelFolder, transformer_weights
from cogds.model.weight_files import (
    PATCH_EMBEDDING,
    SHARD_BYTES,
    read_weights,
    save_other_parts,
    scale_image_channels,
    weight_files,
    write_index,
)
from cogds.tensor_file import TensorEntry, write_tensors

METADATA_KEY = "cogds"  # of the header
# Returns the values of a trained weight with this name and number of elements, in any shape.
ReadWeight = Callable[[str, int], torch.Tensor]


@dataclass(frozen=True)
class FullExport:
    """What to write.

    Attributes:
        model: the base model.
        dtype: of the weights.
        trained: names of the trained weights.
        image_factor: the factor that the pipeline's image latents would need. It is folded into the patch embedding's
            weights of the image channels, so any tool feeds image latents as the pipeline does.
        metadata: for the header of the files.
    """

    model: ModelFolder
    dtype: torch.dtype
    trained: frozenset[str]
    image_factor: float
    metadata: Mapping[str, Any]
    shard_bytes: int = SHARD_BYTES

    def files(self) -> dict[str, list[TensorEntry]]:
        """Return the weights of each file, by its name."""
        return weight_files(read_weights(self.model, self.dtype), self.shard_bytes)

    @property
    def num_bytes(self) -> int:
        """Size of all weights."""
        return sum(weight.num_bytes for weight in read_weights(self.model, self.dtype))

    def write_files(self, folder: Path, read: ReadWeight, number: int = 0, count: int = 1) -> None:
        """Write every `count`-th file of the transformer into `folder`, beginning with `number`."""
        base = transformer_weights(self.model)
        for index, (file, weights) in enumerate(self.files().items()):
            slices = [next(base)[1] for _ in weights]
            if index % count == number:
                header = {"format": "pt", METADATA_KEY: json.dumps(dict(self.metadata))}
                write_tensors(folder / file, weights, self._values(weights, slices, read), header)

    def _values(
        self, weights: Sequence[TensorEntry], slices: Sequence[Any], read: ReadWeight
    ) -> Iterator[torch.Tensor]:
        for weight, base in zip(weights, slices):
            if weight.name in self.trained:
                # First to the dtype that the model computes with.
                value = read(weight.name, torch.Size(weight.shape).numel()).view(weight.shape).to(self.dtype)
            else:
                value = base[:]
            if weight.name == PATCH_EMBEDDING and self.image_factor != 1.0:
                in_channels = self.model.transformer_config["in_channels"]
                value = scale_image_channels(value.float(), in_channels, self.image_factor)
            yield value.to(weight.dtype)

    def complete(self, folder: Path) -> None:
        """Add index, configs and links to the base model's other parts to a folder with all files of weights."""
        write_index(folder / "transformer", self.files())
        shutil.copyfile(self.model.path / "transformer/config.json", folder / "transformer/config.json")
        save_other_parts(folder, self.model, copy=False)


def trained_metadata(model: ModelFolder) -> dict[str, Any]:
    """Return the metadata that an exported model records in its weights, or {}."""
    model.fetch("transformer")
    for file in sorted((model.path / "transformer").glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            return json.loads((tensors.metadata() or {}).get(METADATA_KEY, "{}"))
    return {}

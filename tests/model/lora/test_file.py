"""A LoRA's path may come from anywhere: what is behind it is read as data, and nothing in it is run."""

import io
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from cogds.errors import UserError
from cogds.model.lora.file import OWN_METADATA_KEY, open_safetensors, read_lora


class MakesFile:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [lambda thing, file: file.write_bytes(pickle.dumps(thing)), torch.save])
@pytest.mark.parametrize(
    "name, of_folder, message",
    [
        ("pytorch_lora_weights.bin", True, "{name}: .*pickle"),
        ("adapter_model.bin", True, "{name}: .*pickle"),
        ("lora.pt", False, "{name}: .*pickle"),
        ("lora.ckpt", False, "{name}: .*pickle"),
        ("pytorch_lora_weights.safetensors", True, "{name}: .*safetensors"),
        ("lora", False, "{name}: .*safetensors"),
    ],
)
def test_a_pickle_is_never_opened(tmp_path, write, name, of_folder, message):
    made, folder = tmp_path / "made", tmp_path / "lora"
    folder.mkdir()
    write(MakesFile(made), folder / name)
    path = folder if of_folder else folder / name
    with pytest.raises(UserError, match=message.format(name=re.escape(name))):
        read_lora(path)
    assert not made.exists()
    trap = (folder / name).read_bytes()
    torch.load(io.BytesIO(trap), weights_only=False) if write is torch.save else pickle.loads(trap)
    assert made.exists()  # the trap works


def test_a_file_cut_short_is_refused(tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors: "):
        read_lora(tmp_path)


def test_an_error_while_a_file_is_open_is_not_a_fault_of_the_file(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="planted"), open_safetensors(file):
        raise ValueError("planted")


def test_metadata_that_is_not_json_is_refused(tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"a": torch.ones(1)}, file, {OWN_METADATA_KEY: "{"})
    with pytest.raises(UserError, match=rf"^{file}: .*settings"):
        read_lora(tmp_path)


def test_a_missing_lora_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "nothing.bin"):
        with pytest.raises(UserError, match=rf"^{path}: "):
            read_lora(path)

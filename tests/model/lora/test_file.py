"""A LoRA's path may come from anywhere: what is behind it is read as data, and nothing in it is run."""

import io
import pickle

import pytest
import torch
from safetensors.torch import save_file

from cogds.errors import UserError
from cogds.model.lora.file import OWN_METADATA_KEY, opened, read_lora


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
        ("pytorch_lora_weights.bin", True, "a pickle, which can run code"),
        ("adapter_model.bin", True, "a pickle, which can run code"),
        ("lora.pt", False, "a pickle, which can run code"),
        ("lora.ckpt", False, "a pickle, which can run code"),
        ("pytorch_lora_weights.safetensors", True, "not a safetensors file"),
        ("lora", False, "not a safetensors file"),
    ],
)
def test_a_pickle_is_never_opened(tmp_path, write, name, of_folder, message):
    made, folder = tmp_path / "made", tmp_path / "lora"
    folder.mkdir()
    write(MakesFile(made), folder / name)
    path = folder if of_folder else folder / name
    with pytest.raises(UserError, match=message):
        read_lora(path)
    assert not made.exists()
    trap = (folder / name).read_bytes()
    torch.load(io.BytesIO(trap), weights_only=False) if write is torch.save else pickle.loads(trap)
    assert made.exists()  # the trap was a trap


def test_a_file_cut_short_is_refused(tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="not a safetensors file"):
        read_lora(tmp_path)


def test_an_error_while_a_file_is_open_is_not_a_fault_of_the_file(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="planted"), opened(file):
        raise ValueError("planted")


def test_metadata_that_is_not_json_is_refused(tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"a": torch.ones(1)}, file, {OWN_METADATA_KEY: "{"})
    with pytest.raises(UserError, match=rf"^{file}: .*settings"):
        read_lora(tmp_path)


def test_no_lora_there_is_said(tmp_path):
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "nothing.bin"):
        with pytest.raises(UserError, match=rf"{path}: no LoRA here"):
            read_lora(path)

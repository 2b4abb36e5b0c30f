"""LoRA files are read as data: nothing in them is run."""

import io
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from cogds.errors import UserError
from cogds.model.lora.file import OWN_METADATA_KEY, open_safetensors, read_lora


class CreatesFile:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [lambda trap, file: file.write_bytes(pickle.dumps(trap)), torch.save])
@pytest.mark.parametrize(
    "name, pass_folder, message",
    [
        ("pytorch_lora_weights.bin", True, "pickle"),
        ("adapter_model.bin", True, "pickle"),
        ("lora.pt", False, "pickle"),
        ("lora.ckpt", False, "pickle"),
        ("pytorch_lora_weights.safetensors", True, "safetensors"),
        ("lora", False, "safetensors"),
    ],
)
def test_a_pickle_is_never_opened(tmp_path, write, name, pass_folder, message):
    created, folder = tmp_path / "created", tmp_path / "lora"
    folder.mkdir()
    write(CreatesFile(created), folder / name)
    with pytest.raises(UserError, match=rf"{re.escape(name)}: .*{message}"):
        read_lora(folder if pass_folder else folder / name)
    assert not created.exists()
    data = (folder / name).read_bytes()
    torch.load(io.BytesIO(data), weights_only=False) if write is torch.save else pickle.loads(data)
    assert created.exists()  # the trap works


def test_a_truncated_file_is_refused(tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors: "):
        read_lora(tmp_path)


def test_an_error_while_a_file_is_open_is_not_reported_as_a_bad_file(tmp_path):
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

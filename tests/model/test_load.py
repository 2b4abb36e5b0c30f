import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from cogds.errors import UserError
from cogds.model import load
from cogds.model.load import (
    TextEncoder,
    are_truncated,
    build_transformer,
    find_model,
    load_alphas_cumprod,
    load_transformer,
    transformer_weights,
)
from tests.tiny import MEMBERS, create_tiny_model

INDEX = '{"weight_map": {"a": "part-2.safetensors"}}'


@pytest.fixture
def copy(tiny_model, tmp_path):
    """A copy of the tiny model that a test may damage."""
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_tiny_model_has_all_features(tiny_model):
    model = find_model(str(tiny_model))
    assert model.geometry.patch_size_t == 2
    assert model.family.has_ofs
    assert model.vae_config["invert_scale_latents"]
    assert load_alphas_cumprod(model)[-1] == 0  # zero terminal SNR


def test_the_tiny_model_is_deterministic_and_never_replaced(tiny_model, tmp_path):
    create_tiny_model(tmp_path / "again")
    file = "transformer/diffusion_pytorch_model.safetensors"
    first, second = load_file(tiny_model / file), load_file(tmp_path / "again" / file)
    assert all(torch.equal(first[name], second[name]) for name in first)
    (tmp_path / "again/mark").touch()
    create_tiny_model(tmp_path / "again", seed=1)
    assert (tmp_path / "again/mark").exists()


def replace_by_pickle(file):
    """Replace a safetensors file by a pickle with the same weights, under its usual name."""
    stem = {"model": "pytorch_model"}.get(file.stem, file.stem)
    torch.save(load_file(file), file.with_name(f"{stem}.bin"))
    file.unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: shutil.rmtree(path), r"model\.path: "),
        (lambda path: (path / "model_index.json").unlink(), r"model_index\.json is missing"),
        (lambda path: (path / "model_index.json").write_text("{"), r"model_index\.json .*JSON"),
        (lambda path: edit_json(path / "model_index.json", _class_name="FluxPipeline"), " FluxPipeline"),
        (
            lambda path: edit_json(path / "model_index.json", _class_name="CogVideoXPipeline"),
            " CogVideoXPipeline, .* 16 ",
        ),
        (lambda path: shutil.rmtree(path / "vae"), "no vae/ folder"),
        (lambda path: (path / "vae/config.json").unlink(), "vae/config.json is missing"),
        (lambda path: edit_json(path / "transformer/config.json", in_channels=8), "ofs_embed_dim is 32"),
        (lambda path: edit_json(path / "transformer/config.json", in_channels=12), "in_channels is 12"),
        (lambda path: (path / "transformer/config.json").write_text("{}"), "'patch_size'"),
        (lambda path: (path / "text_encoder/model.safetensors").unlink(), r"text_encoder .*\.safetensors"),
        (
            lambda path: replace_by_pickle(path / "transformer/diffusion_pytorch_model.safetensors"),
            r"_model\.bin",
        ),
        (lambda path: (path / "vae/x.safetensors.index.json").write_text(INDEX), r"lacks part-2\.safetensors"),
    ],
)
def test_a_damaged_folder_is_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message):
        find_model(str(copy))


def test_a_link_to_a_base_model_that_was_moved_is_named(copy, tmp_path):
    base = copy / "vae/config.json"
    moved = base.rename(tmp_path / "config.json")
    base.symlink_to(moved)
    find_model(str(copy))
    moved.unlink()
    with pytest.raises(UserError, match=r"vae/config\.json is a link to .*config\.json, which is gone"):
        find_model(str(copy))


def test_a_hub_id_that_cannot_be_downloaded_is_named():
    with pytest.raises(UserError, match=r"model\.path: .*nobody/no-such-model.*hf download nobody/no-such-model"):
        find_model("nobody/no-such-model")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_model, tmp_path, monkeypatch):
    """A hub with the tiny model as somebody/some-model. files: of the model; downloads: the calls."""
    files = [str(path.relative_to(tiny_model)) for path in sorted(tiny_model.rglob("*")) if path.is_file()]
    snapshot = tmp_path / "hub/snapshots" / COMMIT
    hub = SimpleNamespace(files=[*files, "README.md"], downloads=[], snapshot=snapshot, is_reachable=True)

    def model_info(*_, **__):
        if not hub.is_reachable:
            raise OSError("no network")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in hub.files])

    def snapshot_download(model_id, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only and snapshot.is_dir():
            return str(snapshot)
        if not hub.is_reachable:
            raise OSError("no network")
        hub.downloads.append((model_id, revision, allow_patterns))
        for name in filter_repo_objects(hub.files, allow_patterns=allow_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tiny_model / name, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(load.HfApi, "model_info", model_info)
    monkeypatch.setattr(load, "snapshot_download", snapshot_download)
    return hub


def weight_files(folder):
    return {path.parent.name for path in folder.rglob("*.safetensors")}


def test_the_weights_of_a_hub_model_are_downloaded_when_they_are_needed(hub, tiny_model):
    model = find_model("somebody/some-model", "main")
    assert weight_files(hub.snapshot) == set()
    assert model.vae_size == find_model(str(tiny_model)).vae_size
    assert model.num_text_parameters
    assert are_truncated(["a red circle"], model) == [False]
    load_alphas_cumprod(model)
    assert weight_files(hub.snapshot) == set()
    load.load_vae(model, torch.float32, "cpu")
    assert weight_files(hub.snapshot) == {"vae"}
    load_transformer(model, torch.float32)
    TextEncoder(model, torch.float32, "cpu")
    assert weight_files(hub.snapshot) == set(load.WEIGHT_PARTS)
    assert {revision for _, revision, _ in hub.downloads[1:]} == {COMMIT}  # not a newer one of `main`
    hub.is_reachable, num_downloads = False, len(hub.downloads)
    model = find_model("somebody/some-model", "main")
    model.fetch(*load.WEIGHT_PARTS)
    load_transformer(model, torch.float32)
    assert len(hub.downloads) == num_downloads


def test_weights_that_cannot_be_downloaded_are_named(hub):
    model = find_model("somebody/some-model")
    hub.is_reachable = False
    with pytest.raises(UserError, match=r"^model\.path: the weights of somebody/some-model .*no network.*hf download"):
        load_transformer(model, torch.float32)
    with pytest.raises(UserError, match=r"hf download"):
        load.load_vae(find_model("somebody/some-model"), torch.float32, "cpu")  # only its configs are in the cache
    hub.is_reachable = True
    hub.files.remove("vae/diffusion_pytorch_model.safetensors")
    hub.files.append("vae/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickles \(diffusion_pytorch_model\.bin\)"):  # from the hub's list of files
        find_model("somebody/some-model")


def test_a_hub_that_does_not_answer_times_out(monkeypatch, tmp_path):
    """By default, the client waits for minutes if the network drops packets."""
    query = Mock(side_effect=TimeoutError("no answer"))
    download = Mock(return_value=str(tmp_path))
    monkeypatch.setattr(load.HfApi, "model_info", query)
    monkeypatch.setattr(load, "snapshot_download", download)
    with pytest.raises(UserError, match=r"model_index\.json is missing"):  # in the copy of an earlier download
        find_model("somebody/some-model")
    assert query.call_args.kwargs["timeout"] == load.HUB_TIMEOUT_S
    assert download.call_args.kwargs["local_files_only"]
    download.side_effect = OSError("nothing here")
    with pytest.raises(UserError, match=r"TimeoutError: no answer.*hf download somebody/some-model --local-dir"):
        find_model("somebody/some-model")
    for call in (download, query):  # a bug is not reported as a fault of the hub
        call.side_effect = TypeError("planted")
        with pytest.raises(TypeError, match="planted"):
            find_model("somebody/some-model")


@pytest.mark.parametrize(
    "file, loader",
    [
        ("transformer/diffusion_pytorch_model.safetensors", lambda model: load_transformer(model, torch.float32)),
        ("vae/diffusion_pytorch_model.safetensors", lambda model: load.load_vae(model, torch.float32, "cpu")),
        ("text_encoder/model.safetensors", lambda model: TextEncoder(model, torch.float32, "cpu")),
    ],
)
def test_pickled_weights_are_never_loaded(copy, file, loader):
    model = find_model(str(copy))
    loader(model)
    replace_by_pickle(copy / file)
    with pytest.raises((OSError, UserError), match=r"safetensors|missing"):
        loader(model)


def test_code_in_a_tokenizer_folder_is_never_run(copy):
    """A folder may refer to its own Python code. By default, transformers would ask on the terminal."""
    created, folder = copy / "created", copy / "tokenizer"
    (folder / "own.py").write_text(f"open({str(created)!r}, 'w')\nclass Own: pass\n")
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")
    with pytest.raises(UserError, match=r"/tokenizer: "):
        load.load_tokenizer(find_model(str(copy)))
    assert not created.exists()


@pytest.mark.parametrize("change", [{"prediction_type": "epsilon"}, {"_class_name": "DDPMScheduler"}])
def test_another_scheduler_is_refused(copy, change):
    edit_json(copy / "scheduler/scheduler_config.json", **change)
    with pytest.raises(UserError, match=rf"^model\.path: .*scheduler_config\.json: .*{next(iter(change.values()))}"):
        find_model(str(copy))


def test_loaded_weights_equal_those_of_the_files(tiny_model):
    model = find_model(str(tiny_model))
    weights = {name: weight[:] for name, weight in transformer_weights(model)}
    loaded = load_transformer(model, torch.float32)
    parameters = dict(loaded.named_parameters())
    assert (
        parameters.keys() == weights.keys() == dict(build_transformer(model, torch.float32).named_parameters()).keys()
    )
    assert all(torch.equal(weights[name], parameter) for name, parameter in parameters.items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MEMBERS)
def test_every_weight_and_buffer_is_loaded_or_computed(family, name, dtype):
    """The transformer is built without weights, so whatever is not set would be what was in that memory before."""
    model = find_model(str(family(name)))
    expected = CogVideoXTransformer3DModel.from_config(model.transformer_config)
    files = {name: weight[:] for name, weight in transformer_weights(model)}
    expected.load_state_dict(files)
    state = torch.get_rng_state()
    loaded = load_transformer(model, dtype)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn to be replaced
    weights, buffers = dict(expected.named_parameters()), dict(expected.named_buffers())
    assert dict(loaded.named_parameters()).keys() == weights.keys()
    assert dict(loaded.named_buffers()).keys() == buffers.keys()
    assert all(torch.equal(weights[key].to(dtype), tensor) for key, tensor in loaded.named_parameters())
    for key, tensor in loaded.named_buffers():
        assert tensor.dtype is buffers[key].dtype
        assert torch.equal(buffers[key], tensor)


def test_learned_positions_must_be_in_the_files(family, tmp_path):
    shutil.copytree(family("5b-i2v"), tmp_path / "model")
    file = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["patch_embed.pos_embedding"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing in the files, such as 'patch_embed\.pos_embedding'"):
        load_transformer(find_model(str(tmp_path / "model")), torch.float32)


def test_captions_are_padded_and_truncation_is_counted(tiny_model):
    model = find_model(str(tiny_model))
    encoder = TextEncoder(model, torch.float32, "cpu")
    assert sum(parameter.numel() for parameter in encoder.encoder.parameters()) == model.num_text_parameters
    assert encoder.encode("a red circle").shape == (model.geometry.text_tokens, 32)
    assert are_truncated(["a red circle", "a red circle " * 30, ""], model) == [False, True, False]
    assert are_truncated([], model) == []


def test_a_tokenizer_in_the_format_of_the_published_model(copy):
    """CogVideoX folders on the hub have a spiece.model and no tokenizer.json."""
    import sentencepiece

    corpus = copy / "corpus.txt"
    corpus.write_text("a red circle moves over a blue background\ntwo squares and a ball\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(copy / "spiece"), vocab_size=30, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    for file in (copy / "tokenizer").iterdir():
        file.unlink()
    (copy / "spiece.model").rename(copy / "tokenizer/spiece.model")
    (copy / "tokenizer/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0})
    )
    (copy / "tokenizer/special_tokens_map.json").write_text(
        json.dumps({"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(copy / "tokenizer/spiece.model"))
    encoder = TextEncoder(find_model(str(copy)), torch.float32, "cpu")
    assert encoder.tokenizer("a red ball moves").input_ids == [*processor.encode("a red ball moves"), 1]


def test_learned_positions_are_loaded(copy):
    """The files of CogVideoX 1.0 image-to-video contain a buffer, whose name must be listed as well."""
    file = copy / "transformer/diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "patch_embed.pos_embedding": torch.zeros(1, 2, 3)}, file, metadata={"format": "pt"})
    assert "patch_embed.pos_embedding" in dict(transformer_weights(find_model(str(copy))))

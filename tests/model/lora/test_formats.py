"""LoRAs in all formats, read by all commands: layers, strength and output."""

import copy
import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cogds.evaluate
import cogds.sample
from cogds import cli
from cogds.errors import UserError
from cogds.model.load import find_model
from cogds.model.lora.adapter import export, inject, linear_layers, load_initial_lora
from cogds.model.lora.convert import load_adapter, save_comfyui, save_comfyui_wrapper
from cogds.model.lora.file import AlphaSource, read_lora, read_loras
from cogds.model.lora.formats import comfyui_name, parse_key
from cogds.model.pipelines import load_pipeline
from cogds.train.resume import check_init
from tests.jobs import make_job
from tests.model.lora.adapters import (
    ATTENTION,
    base_transformer,
    load,
    output,
    output_in_diffusers,
    randomize,
    trainable,
)

RANK, ALPHA, NAN = 4, 3, float("nan")
SAT = {"to_q": "query_key_value.{}.0", "to_k": "query_key_value.{}.1", "to_v": "query_key_value.{}.2"}


@pytest.fixture(scope="module")
def trained(tiny_model):
    """A transformer with a LoRA, its output, and the LoRA's weights under PEFT's names, layer.lora_A.weight."""
    transformer = load(tiny_model)
    randomize(inject(transformer, RANK, ALPHA, 0.0, ATTENTION, seed=0))
    state = {name: tensor.detach() for name, tensor in get_peft_model_state_dict(transformer).items()}
    return SimpleNamespace(transformer=transformer, state=state, output=output(transformer), model=tiny_model)


def renamed(trained, **endings):
    """The weights under other names. endings: replacements of `.lora_A.weight` and `.lora_B.weight`."""
    return {
        f"{name.removesuffix(f'.lora_{half}.weight')}{endings[half]}": tensor
        for name, tensor in trained.state.items()
        for half in "AB"
        if name.endswith(f".lora_{half}.weight")
    }


def prefixed(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def diffusers(trained, folder):
    return export(folder, trained.transformer, trainable(trained.transformer), {"image_latents": "pipeline"})


def diffusers_without_alpha(trained, folder):
    CogVideoXImageToVideoPipeline.save_lora_weights(folder, transformer_lora_layers=trained.state)
    return folder


def older_diffusers(trained, folder):
    tensors = renamed(trained, A=".lora.down.weight", B=".lora.up.weight")
    save_file(prefixed("transformer.", tensors), file := folder / "pytorch_lora_weights.safetensors")
    return file


def save_lora_adapter(trained, folder):
    trained.transformer.save_lora_adapter(folder, adapter_name="default")
    return folder


def peft(trained, folder):
    model = get_peft_model(
        base_transformer(trained.model), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(ATTENTION))
    )
    model.load_state_dict(prefixed("base_model.model.", peft_state_dict(trained)), strict=False)
    model.save_pretrained(folder)
    return folder


def peft_state_dict(trained, folder=None):
    state = trained.transformer.state_dict()
    tensors = {name: tensor.contiguous() for name, tensor in state.items() if ".lora_" in name}
    assert all(".default." in name for name in tensors)
    if folder:
        save_file(tensors, folder / "checkpoint-10.safetensors")
    return folder or tensors


def cogkit(trained, folder):
    save_file(trained.state, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def finetrainers(trained, folder, config=None):
    fields = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": True, "target_modules": "(to_q|to_k|to_v|to_out.0)"}
    header = {"lora_config": json.dumps(fields, indent=4) if config is None else config, "format": "pt"}
    save_file(prefixed("transformer.", trained.state), folder / "pytorch_lora_weights.safetensors", header)
    return folder


def diffusion_pipe(trained, folder):
    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(ATTENTION)).save_pretrained(folder)
    save_file(prefixed("diffusion_model.", trained.state), folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def comfyui(trained, folder):
    save_comfyui(load_adapter(read_lora(diffusers(trained, folder))), folder / "mine.safetensors")
    return folder / "mine.safetensors"


def comfyui_wrapper(trained, folder):
    save_comfyui_wrapper(load_adapter(read_lora(diffusers(trained, folder))), folder / "mine.safetensors")
    return folder / "mine.safetensors"


def kohya_names(tensors):
    return {
        "lora_unet__" + name.rsplit(".", 2)[0].replace(".", "_") + "." + ".".join(name.rsplit(".", 2)[1:]): tensor
        for name, tensor in tensors.items()
    }


def videox_fun(trained, folder):
    tensors = kohya_names(renamed(trained, A=".lora_down.weight", B=".lora_up.weight"))
    tensors |= {f"{name.partition('.')[0]}.alpha": torch.tensor(float(ALPHA)) for name in tensors}
    save_file(tensors, folder / "checkpoint-10.safetensors", {"sshs_model_hash": "0"})
    return folder


def videox_fun_from_peft(trained, folder):
    tensors = kohya_names(renamed(trained, A=".lora_down.weight", B=".lora_up.weight"))
    save_file(tensors, folder / "checkpoint-10-compatible_with_comfyui.safetensors")
    return folder


def dotted_kohya(trained, folder):
    tensors = renamed(trained, A=".lora_down.weight", B=".lora_up.weight")
    tensors |= {f"{name.rsplit('.', 2)[0]}.alpha": torch.tensor(float(ALPHA)) for name in tensors}
    save_file(tensors, file := folder / "dotted.safetensors")
    return file


def sat(trained, folder):
    tensors = {}
    for name, tensor in trained.state.items():
        _, block, _, target, *_ = name.split(".")
        ending = SAT.get(target, "dense.{}.0").format("matrix_A" if ".lora_A." in name else "matrix_B")
        tensors[f"model.diffusion_model.transformer.layers.{block}.attention.{ending}"] = tensor
    save_file(tensors, file := folder / "sat.safetensors")
    return file


# The functions that write the formats, and the source of alpha if the user gives none.
FORMATS = [
    (diffusers, AlphaSource.FILE),
    (diffusers_without_alpha, AlphaSource.ASSUMED),  # like those of zai-org/CogVideo and its SAT exports
    (older_diffusers, AlphaSource.ASSUMED),
    (save_lora_adapter, AlphaSource.FILE),
    (peft, AlphaSource.FILE),
    (peft_state_dict, AlphaSource.ASSUMED),
    (cogkit, AlphaSource.ASSUMED),
    (finetrainers, AlphaSource.FILE),
    (diffusion_pipe, AlphaSource.FILE),
    (comfyui, AlphaSource.FILE),
    (comfyui_wrapper, AlphaSource.FILE),
    (videox_fun, AlphaSource.FILE),
    (videox_fun_from_peft, AlphaSource.ASSUMED),
    (dotted_kohya, AlphaSource.FILE),
    (sat, AlphaSource.SAT),
]


class Loaded(Exception):
    """Ends a command when its transformer is loaded."""

    def __init__(self, transformer):
        super().__init__()
        self.output = output(transformer.eval())


@pytest.fixture
def commands(tiny_model, tmp_path, monkeypatch):
    """For each command, a function of a LoRA's path and alpha that returns the output of the command's transformer."""
    model, pipelines = find_model(str(tiny_model)), []
    config = [f"model.path={tiny_model}", f"data.path={tmp_path}", "data.buckets=[9x64x96]"]

    def stop(transformer):
        raise Loaded(transformer)

    def run_until_loaded(name, *argv):
        with pytest.raises(Loaded) as loaded:
            cli.call(name, argv)
        return loaded.value.output

    def alpha_flags(alpha):
        return ["--lora-alpha", str(alpha)] if alpha else []

    def train(path, alpha):
        words = [f"lora.init_from={path}", f"lora.rank={RANK}", "lora.alpha=5"]
        words += [f"lora.init_alpha={alpha}"] if alpha else []
        job = make_job(*config, *words)
        cfg, file = job.cfg, check_init(job)
        assert (len(file.pairs), file.ranks) == (8, [RANK])
        transformer = load(tiny_model)
        inject(transformer, cfg.lora.rank, cfg.lora.alpha, 0.0, cfg.lora.target_modules, cfg.seed)
        load_initial_lora(transformer, file)
        return output(transformer)

    def evaluate(path, alpha):
        (tmp_path / "none.yaml").write_text("{}")
        with monkeypatch.context() as patch:
            patch.setattr(cogds.evaluate, "encode_dataset", lambda *_: SimpleNamespace(empty_caption_states=None))
            patch.setattr(cogds.evaluate, "load_step_builder", lambda *_: None)
            patch.setattr(cogds.evaluate, "make_evaluation", lambda *_: SimpleNamespace())
            patch.setattr(
                cogds.evaluate, "evaluate", lambda _, transformer, name: stop(transformer) if name == "LoRA" else {}
            )
            return run_until_loaded(
                "evaluate", *config, "train.precision=fp32", "--lora", str(path), *alpha_flags(alpha)
            )

    def sample(path, alpha):
        Image.new("RGB", (96, 64)).save(tmp_path / "first.png")
        if not pipelines:
            pipelines.append(load_pipeline(model, torch.float32))
        pipeline = copy.deepcopy(pipelines[0])
        with monkeypatch.context() as patch:
            patch.setattr(cogds.sample, "encode_prompts", lambda _, prompts, *__: dict.fromkeys(prompts))
            patch.setattr(cogds.sample, "load_pipeline", lambda *_: pipeline)
            patch.setattr(cogds.sample, "sample_latents", lambda pipeline, *_: stop(pipeline.transformer))
            return run_until_loaded(
                "sample", "--model", str(tiny_model), "--image", str(tmp_path / "first.png"), "--prompt", "a ball",
                "--size", "9x64x96", "--output", str(tmp_path / "a.mp4"), "--lora", str(path), *alpha_flags(alpha),
            )  # fmt: skip

    def export(path, alpha):
        out = tmp_path / "exported"
        cli.call("export", [str(path), "--to", "diffusers", "--output", str(out), "--model", str(tiny_model),
                            *alpha_flags(alpha)])  # fmt: skip
        assert len(read_lora(out).pairs) == 8
        return output_in_diffusers(tiny_model, (out, 1.0))

    return {"train": train, "evaluate": evaluate, "sample": sample, "export": export}


@pytest.mark.parametrize("write, source", FORMATS, ids=[write.__name__ for write, _ in FORMATS])
def test_every_command_reads_every_format_at_its_strength(trained, commands, tmp_path, write, source):
    (tmp_path / "lora").mkdir()
    path = write(trained, tmp_path / "lora")
    file, alpha = read_lora(path), None if source is AlphaSource.FILE else ALPHA
    assert file.alpha_source is source
    assert file.scales == [{AlphaSource.ASSUMED: 1.0, AlphaSource.SAT: 1 / RANK}.get(source, file.scales[0])]
    file = read_lora(path, ALPHA)
    assert {layer: pair.rank for layer, pair in file.pairs.items()} == {
        layer: RANK for layer in linear_layers(trained.transformer) if layer.endswith(ATTENTION)
    }
    assert file.scales == [pytest.approx(1.0 if write is comfyui_wrapper else ALPHA / RANK)]
    differences = {name: (run(path, alpha) - trained.output).abs().max().item() for name, run in commands.items()}
    assert max(differences.values()) < 1e-5, differences


def rename_all(tensors):
    return {f"lora_unet_down_blocks_{number}": tensor for number, tensor in enumerate(tensors.values())}


def add_unknown_layer(tensors):
    return {**tensors, "transformer.x_embedder.lora_A.weight": torch.ones(4, 32)}


def add_missing_block(tensors):
    block_2 = {name.replace(".1.", ".2."): tensor.clone() for name, tensor in tensors.items() if "1.attn1.to_q" in name}
    return {**tensors, **block_2}


def change_shapes(tensors):
    return {name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in tensors.items()}


def remove_one_b(tensors):
    return {name: tensor for name, tensor in tensors.items() if "0.attn1.to_q.lora_B" not in name}


def make_nan(tensors):
    return {name: tensor * NAN for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "damage", [rename_all, add_unknown_layer, add_missing_block, change_shapes, remove_one_b, make_nan]
)
def test_every_command_refuses_a_lora_that_does_not_fit(trained, commands, tmp_path, capsys, damage):
    file = diffusers(trained, tmp_path / "lora")
    save_file(damage(load_file(file)), file)
    for name, run in commands.items():
        assert cli.run(partial(run, file, None)) == 2, name
        assert str(file) in capsys.readouterr().err.splitlines()[-1]


def test_all_names_of_all_layers_are_parsed(tiny_model):
    layers = list(linear_layers(base_transformer(tiny_model)))
    assert len({comfyui_name(layer) for layer in layers}) == len(layers)
    assert comfyui_name("transformer_blocks.11.attn1.to_out.0") == "blocks.11.attn_out"
    for layer in layers:
        flat = layer.replace(".", "_")
        names = [f"{prefix}{layer}" for prefix in ("", "transformer.", "base_model.model.", "diffusion_model.")]
        names += [f"diffusion_model.{comfyui_name(layer)}", f"lora_unet__{flat}", f"lora_transformer_{flat}"]
        names += [f"lora_unet_{comfyui_name(layer).replace('.', '_')}"]
        for name in names:
            assert [tuple(parse_key(f"{name}.{end}")) for end in ("lora_A.weight", "lora_up.weight", "alpha")] == [
                (layer, "A", False), (layer, "B", False), (layer, "alpha", False)
            ]  # fmt: skip
    for name in ("attn1.to_q.lora_A.weight", "blocks.0.proj_out.lora_A.weight", "lora_te_q.lora_up.weight",
                 "transformer_blocks.0.attn1.to_q.weight", "layers.0.attention.dense.matrix_A.1"):  # fmt: skip
        assert parse_key(name) is None


def test_two_adapters_in_a_file_are_refused(trained, tmp_path):
    tensors = renamed(trained, A=".lora_A.first.weight", B=".lora_B.first.weight")
    second = {name.replace(".first.", ".second."): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | second, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"are both [AB] of layer"):
        read_lora(tmp_path)


def test_a_layer_without_alpha_uses_that_of_the_user(trained, tmp_path):
    videox_fun(trained, tmp_path)
    file = tmp_path / "checkpoint-10.safetensors"
    tensors = load_file(file)
    layer = "transformer_blocks.0.attn1.to_q"
    del tensors[f"lora_unet__{layer.replace('.', '_')}.alpha"]
    save_file(tensors, file)
    lora = read_lora(file, 8.0)
    assert (lora.alpha_source, lora.pairs[layer].scale) == (AlphaSource.USER, 2.0)
    assert lora.scales == [ALPHA / RANK, 2.0]


def with_header(trained, folder, **changes):
    """Write a file in diffusers' format with changed texts in its header."""
    file = diffusers(trained, folder)
    with safe_open(file, "pt") as tensors:
        header = tensors.metadata()
    save_file(load_file(file), file, {**header, **changes})
    return file


def with_settings(trained, folder, **changes):
    """Write a file with changed settings of cogds."""
    return with_header(trained, folder, cogds=json.dumps({"image_latents": "pipeline", **changes}))


def with_config(trained, folder, **changes):
    """Write a file with changed values in its LoraConfig."""
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(ATTENTION), **changes}
    text = json.dumps({f"transformer.{name}": value for name, value in config.items()})
    return with_header(trained, folder, lora_adapter_metadata=text)


def with_tensors(trained, folder, write=diffusers, **changes):
    """Write a file with changed tensors. changes: functions to apply to tensors, by a part of their names."""
    path = write(trained, folder)
    file = path if path.is_file() else next(path.glob("*.safetensors"))
    tensors = load_file(file)
    for part, change in changes.items():
        tensors |= {name: change(tensor) for name, tensor in tensors.items() if part in name}
    with safe_open(file, "pt") as before:
        header = before.metadata()
    save_file(tensors, file, header)
    return file


def with_bytes(trained, folder, change, write=diffusers, name="*.safetensors"):
    """Write a file with changed bytes."""
    path = write(trained, folder)
    file = path if path.is_file() else next(path.glob(name))
    file.write_bytes(change(file.read_bytes()))
    return file


def pickled(trained, folder, name):
    torch.save(trained.state, folder / name)
    return folder / name


def sat_folder(trained, folder):
    """Write a checkpoint of SwissArmyTransformer: a file with the name of a folder, and a pickle in that folder."""
    (folder / "latest").write_text("1000")
    (folder / "1000").mkdir()
    torch.save({"module": trained.state}, folder / "1000/mp_rank_00_model_states.pt")
    return folder


def sat_without_b(trained, folder):
    tensors = load_file(file := sat(trained, folder))
    del tensors["model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_B.0"]
    save_file(tensors, file)
    return file


def config_only(_, folder):
    (folder / "adapter_config.json").write_text("{}")
    return folder


HUGE = 10**400
DAMAGES = {
    "settings cut": (with_header, {"cogds": "{"}),
    "settings a list": (with_header, {"cogds": "[1]"}),
    "settings nested": (with_header, {"cogds": "[" * 100_000}),
    "settings null": (with_header, {"cogds": "null"}),
    "settings empty": (with_header, {"cogds": ""}),
    "convention unknown": (with_settings, {"image_latents": "brighter"}),
    "mode unknown": (with_settings, {"modes": {"middle": 1.0}}),
    "modes a list": (with_settings, {"modes": ["first"]}),
    "context too short": (with_settings, {"context_latents": 1}),
    "time negative": (with_settings, {"keyframe_times": [-1.0]}),
    "convention a list": (with_settings, {"image_latents": ["pipeline"]}),
    "fps a word": (with_settings, {"fps": "fast"}),
    "fps 0": (with_settings, {"fps": 0}),
    "fps null": (with_settings, {"fps": None}),
    "fps NaN": (with_settings, {"fps": NAN}),
    "buckets a text": (with_settings, {"buckets": "9x64x96"}),
    "buckets of nonsense": (with_settings, {"buckets": ["9x64"]}),
    "buckets of numbers": (with_settings, {"buckets": [9]}),
    "base_model a number": (with_settings, {"base_model": 5}),
    "recorded alpha a text": (with_settings, {"rank": 4, "alpha": "3"}),
    "targets a number": (with_settings, {"targets": 5}),
    "prompt a number": (with_settings, {"instance_prompt": 5}),
    "factor a text": (with_settings, {"image_latent_factor": "0.7"}),
    "exported_scale a text": (with_settings, {"exported_scale": "2"}),
    "alpha_in_weights a text": (with_settings, {"alpha_in_weights": "no"}),
    "config cut": (with_header, {"lora_adapter_metadata": "{"}),
    "config a list": (with_header, {"lora_adapter_metadata": "[1]"}),
    "config a number": (with_header, {"lora_adapter_metadata": "5"}),
    "config empty": (with_header, {"lora_adapter_metadata": ""}),
    "alpha a text": (with_config, {"lora_alpha": "3"}),
    "alpha a list": (with_config, {"lora_alpha": [3]}),
    "alpha null": (with_config, {"lora_alpha": None}),
    "alpha 0": (with_config, {"lora_alpha": 0}),
    "alpha negative": (with_config, {"lora_alpha": -3}),
    "alpha NaN": (with_config, {"lora_alpha": NAN}),
    "alpha too large": (with_config, {"lora_alpha": HUGE}),
    "alpha_pattern a list": (with_config, {"alpha_pattern": [1]}),
    "alpha_pattern a number": (with_config, {"alpha_pattern": 0}),
    "alpha_pattern no expression": (with_config, {"alpha_pattern": {"(": 3}}),
    "alpha_pattern of texts": (with_config, {"alpha_pattern": {"to_q": "3"}}),
    "rank a list": (with_config, {"r": [RANK]}),
    "rank a text": (with_config, {"r": str(RANK)}),
    "rank of another file": (with_config, {"r": 2 * RANK}),
    "rank_pattern of another file": (with_config, {"rank_pattern": {"to_q": 2}}),
    "rank_pattern a list": (with_config, {"rank_pattern": ["to_q"]}),
    "use_rslora a text": (with_config, {"use_rslora": "no"}),
    "finetrainers, a list": (finetrainers, {"config": "[1]"}),
    "finetrainers, alpha a text": (finetrainers, {"config": '{"lora_alpha": "3"}'}),
    "finetrainers, rank a list": (finetrainers, {"config": '{"r": [4]}'}),
    "finetrainers, empty": (finetrainers, {"config": ""}),
    **{
        f"{write.__name__}, config {name}": (
            with_bytes, {"change": lambda _, text=text: text, "write": write, "name": "adapter_config.json"}
        )
        for write in (peft, diffusion_pipe)
        for name, text in {
            "cut": b'{"r": 4, "lora_al', "empty": b"", "a list": b"[4, 3]", "a text": b'"4"', "bytes": b"\xff\x00\x80",
            "alpha a text": b'{"r": 4, "lora_alpha": "3"}', "alpha negative": b'{"r": 4, "lora_alpha": -3}',
            "rank a list": b'{"r": [4], "lora_alpha": 3}', "alpha Infinity": b'{"r": 4, "lora_alpha": Infinity}',
        }.items()
    },
    "tensor alpha NaN": (with_tensors, {"write": comfyui, "alpha": lambda tensor: tensor * NAN}),
    "tensor alpha negative": (with_tensors, {"write": comfyui, "alpha": lambda tensor: -tensor}),
    "tensor alpha of two numbers": (with_tensors, {"write": videox_fun, "alpha": lambda tensor: tensor.repeat(2)}),
    "tensor alpha of no number": (with_tensors, {"write": dotted_kohya, "alpha": lambda tensor: tensor.reshape(1)[:0]}),
    "integers": (with_tensors, {"lora_B": lambda tensor: tensor.to(torch.int8)}),
    "rank 0": (with_tensors, {"lora_A": lambda a: a[:0], "lora_B": lambda b: b[:, :0].contiguous()}),
    "a convolution": (with_tensors, {"lora_A": lambda a: a[..., None, None]}),
    "NaN": (with_tensors, {"0.attn1.to_q.lora_B": lambda tensor: tensor * NAN}),
    "cut in the header": (with_bytes, {"change": lambda data: data[:100]}),
    "cut in the tensors": (with_bytes, {"change": lambda data: data[:-1]}),
    "too long": (with_bytes, {"change": lambda data: data + b"0"}),
    "empty": (with_bytes, {"change": lambda _: b""}),
    "adapter_model empty": (with_bytes, {"change": lambda _: b"", "write": peft}),
    "a .bin": (pickled, {"name": "pytorch_lora_weights.bin"}),
    "a .pt": (pickled, {"name": "mp_rank_00_model_states.pt"}),
    "a folder without adapter": (config_only, {}),
    "SAT's folder": (sat_folder, {}),
    "SAT, cut": (with_bytes, {"change": lambda data: data[:-4], "write": sat}),
    "SAT, query without B": (sat_without_b, {}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(trained, tmp_path, damage):
    write, arguments = DAMAGES[damage]
    (tmp_path / "lora").mkdir()
    path = write(trained, tmp_path / "lora", **arguments)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_adapter(read_lora(path))


def test_a_path_that_is_too_long_is_refused():
    with pytest.raises(UserError, match=r"lll: "):
        read_lora("l" * 300)


@pytest.mark.parametrize("alpha", [NAN, 0.0, -3.0])
def test_an_invalid_alpha_of_the_user_is_refused(trained, tmp_path, alpha):
    with pytest.raises(UserError, match=r"^--lora-alpha: "):
        read_loras([cogkit(trained, tmp_path)], alpha, "--lora-alpha")


def test_an_alpha_of_several_numbers_is_refused(trained, tmp_path):
    tensors = {**trained.state, "transformer_blocks.0.attn1.to_q.alpha": torch.ones(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"to_q .*alpha \[1\.0, 1\.0\]"):
        read_lora(tmp_path)

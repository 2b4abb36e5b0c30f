"""Every format of a LoRA through everything that reads one: the layers, the strength and what the transformer gives."""

import copy
import json
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
from cogds.model.load import find_model, load_transformer
from cogds.model.lora.adapter import export, inject, linear_layers, load_initial_lora
from cogds.model.lora.convert import load_adapter, save_comfyui, save_comfyui_wrapper
from cogds.model.lora.file import AlphaSource, read_lora, read_loras
from cogds.model.lora.formats import comfyui_name, parse_key
from cogds.model.pipelines import load_pipeline
from cogds.train.resume import check_init
from tests.jobs import make_job
from tests.model.lora.adapters import base_transformer, output, output_in_diffusers
from tests.model.lora.test_adapter import ATTENTION, randomize

RANK, ALPHA = 4, 3
SAT = {"to_q": "query_key_value.{}.0", "to_k": "query_key_value.{}.1", "to_v": "query_key_value.{}.2"}


@pytest.fixture(scope="module")
def trained(tiny_model):
    """A transformer with a LoRA, and the LoRA's weights as PEFT names them: layer.lora_A.weight."""
    transformer = load_transformer(find_model(str(tiny_model)), torch.float32)
    randomize(inject(transformer, RANK, ALPHA, 0.0, ATTENTION, seed=0))
    state = {name: one.detach() for name, one in get_peft_model_state_dict(transformer).items()}
    return SimpleNamespace(transformer=transformer, state=state, output=output(transformer), model=tiny_model)


def renamed(trained, **endings):
    """The weights under other names. endings: what stands for `.lora_A.weight` and `.lora_B.weight`."""
    return {
        f"{name.removesuffix(f'.lora_{half}.weight')}{endings[half]}": tensor
        for name, tensor in trained.state.items()
        for half in "AB"
        if name.endswith(f".lora_{half}.weight")
    }


def prefixed(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def diffusers(trained, folder):
    tensors = {name: one.detach() for name, one in trained.transformer.named_parameters() if one.requires_grad}
    return export(folder, trained.transformer, tensors, {"image_latents": "pipeline"})


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
    tensors = {name: one.contiguous() for name, one in trained.transformer.state_dict().items() if ".lora_" in name}
    assert all(".default." in name for name in tensors)
    if folder:
        save_file(tensors, folder / "checkpoint-10.safetensors")
    return folder or tensors


def cogkit(trained, folder):
    save_file(trained.state, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def finetrainers(trained, folder):
    config = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": True, "target_modules": "(to_q|to_k|to_v|to_out.0)"}
    header = {"lora_config": json.dumps(config, indent=4), "format": "pt"}
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


# What writes the format, and where a file's alpha comes from if the user gives none.
FORMATS = [
    (diffusers, AlphaSource.FILE),
    (diffusers_without_alpha, AlphaSource.ASSUMED),  # as zai-org/CogVideo and its SAT exports are
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
    """Ends a verb where its transformer is ready."""


@pytest.fixture
def verbs(tiny_model, tmp_path, monkeypatch):
    """By verb, a function of a LoRA's path and an alpha: the output of the transformer that the verb works with."""
    model, pipelines = find_model(str(tiny_model)), []
    outputs = []

    def stop(transformer):
        outputs.append(output(transformer.eval()))
        raise Loaded

    def until_loaded(main, argv):
        with pytest.raises(Loaded):
            main(argv)
        return outputs[-1]

    def config(*words):
        return [f"model.path={tiny_model}", f"data.path={tmp_path}", "data.buckets=[9x64x96]", *words]

    def options(alpha):
        return ["--lora-alpha", str(alpha)] if alpha else []

    def train(path, alpha):
        words = [f"lora.init_from={path}", f"lora.rank={RANK}", "lora.alpha=5"]
        words += [f"lora.init_alpha={alpha}"] if alpha else []
        job = make_job(*config(*words))
        cfg, file = job.cfg, check_init(job)
        assert (len(file.pairs), file.ranks) == (8, [RANK])
        transformer = load_transformer(model, torch.float32)
        inject(transformer, cfg.lora.rank, cfg.lora.alpha, 0.0, cfg.lora.target_modules, cfg.seed)
        load_initial_lora(transformer, file)
        return output(transformer)

    def evaluate(path, alpha):
        load = cogds.evaluate.load_eval_transformer
        with monkeypatch.context() as patch:
            patch.setattr(cogds.evaluate, "encode_dataset", lambda *_: SimpleNamespace())
            patch.setattr(cogds.evaluate, "load_eval_transformer", lambda *args: stop(load(*args)))
            main = lambda argv: cli.call("evaluate", argv)  # noqa: E731
            (tmp_path / "none.yaml").write_text("{}")
            return until_loaded(main, [*config("train.precision=fp32"), "--lora", str(path), *options(alpha)])

    def sample(path, alpha):
        Image.new("RGB", (96, 64)).save(tmp_path / "first.png")
        if not pipelines:
            pipelines.append(load_pipeline(model, torch.float32))
        pipeline = copy.deepcopy(pipelines[0])
        with monkeypatch.context() as patch:
            patch.setattr(cogds.sample, "encode_prompts", lambda _, prompts, *__: dict.fromkeys(prompts))
            patch.setattr(cogds.sample, "load_pipeline", lambda *_: pipeline)
            patch.setattr(cogds.sample, "sample_latents", lambda pipeline, *_: stop(pipeline.transformer))
            argv = ["--model", str(tiny_model), "--image", str(tmp_path / "first.png"), "--prompt", "a ball"]
            argv += ["--size", "9x64x96", "--output", str(tmp_path / "a.mp4"), "--lora", str(path), *options(alpha)]
            return until_loaded(lambda argv: cli.call("sample", argv), argv)

    def export(path, alpha):
        out = tmp_path / "exported"
        cli.call("export", [str(path), "--to", "diffusers", "--output", str(out), "--model", str(tiny_model),
                           *options(alpha)])  # fmt: skip
        assert len(read_lora(out).pairs) == 8
        return output_in_diffusers(tiny_model, (out, 1.0))

    return {"train": train, "evaluate": evaluate, "sample": sample, "export": export}


@pytest.mark.parametrize("write, source", FORMATS, ids=[write.__name__ for write, _ in FORMATS])
def test_every_verb_reads_every_format_at_its_strength(trained, verbs, tmp_path, write, source):
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
    differences = {verb: (run(path, alpha) - trained.output).abs().max().item() for verb, run in verbs.items()}
    assert {verb: difference < 1e-5 for verb, difference in differences.items()} == dict.fromkeys(verbs, True)


def nothing_of_it(tensors):
    return {f"lora_unet_down_blocks_{name}": tensor for name, tensor in enumerate(tensors.values())}


def one_layer_of_another(tensors):
    return {**tensors, "transformer.x_embedder.lora_A.weight": torch.ones(4, 32)}


def one_layer_too_many(tensors):
    one = {name.replace(".1.", ".2."): tensor.clone() for name, tensor in tensors.items() if ".1.attn1.to_q" in name}
    return {**tensors, **one}


def another_shape(tensors):
    return {name: one.repeat(1, 2) if "lora_A" in name else one for name, one in tensors.items()}


def without_one_b(tensors):
    return {name: one for name, one in tensors.items() if "0.attn1.to_q.lora_B" not in name}


@pytest.mark.parametrize(
    "damage", [nothing_of_it, one_layer_of_another, one_layer_too_many, another_shape, without_one_b]
)
def test_what_does_not_fit_as_a_whole_ends_every_verb_with_code_2(trained, verbs, tmp_path, capsys, damage):
    file = diffusers(trained, tmp_path / "lora")
    save_file(damage(load_file(file)), file)
    for verb, run in verbs.items():
        assert cli.run(lambda: run(file, None)) == 2, verb  # noqa: B023
        assert str(file) in capsys.readouterr().err.splitlines()[-1]


def test_all_names_of_all_layers_are_known(tiny_model):
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
    tensors = renamed(trained, A=".lora_A.one.weight", B=".lora_B.one.weight")
    other = {name.replace(".one.", ".two."): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | other, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"are both [AB] of layer"):
        read_lora(tmp_path)


def test_a_layer_without_alpha_takes_the_one_that_is_given(trained, tmp_path):
    videox_fun(trained, tmp_path)
    file = tmp_path / "checkpoint-10.safetensors"
    tensors = load_file(file)
    layer = "transformer_blocks.0.attn1.to_q"
    del tensors[f"lora_unet__{layer.replace('.', '_')}.alpha"]
    save_file(tensors, file)
    read = read_lora(file, 8.0)
    assert (read.alpha_source, read.pairs[layer].scale) == (AlphaSource.USER, 2.0)
    assert read.scales == [ALPHA / RANK, 2.0]


def with_header(trained, folder, **changes):
    """A file in diffusers' format with texts in its header replaced."""
    file = diffusers(trained, folder)
    with safe_open(file, "pt") as tensors:
        header = tensors.metadata()
    save_file(load_file(file), file, {**header, **changes})
    return file


def with_settings(trained, folder, **changes):
    """A file with changed settings of cogds. Python's JSON knows NaN and Infinity."""
    return with_header(trained, folder, cogds=json.dumps({"image_latents": "pipeline", **changes}))


def with_config(trained, folder, prefix="transformer.", key="lora_adapter_metadata", **changes):
    """A file with changed values in its adapter's config."""
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(ATTENTION), **changes}
    return with_header(
        trained, folder, **{key: json.dumps({f"{prefix}{name}": value for name, value in config.items()})}
    )


def with_tensors(trained, folder, write=diffusers, **changes):
    """A file with changed tensors. changes: by a word in the names of tensors, what becomes of each."""
    path = write(trained, folder)
    file = path if path.is_file() else next(path.glob("*.safetensors"))
    tensors = load_file(file)
    for word, change in changes.items():
        tensors |= {name: change(tensor) for name, tensor in tensors.items() if word in name}
    with safe_open(file, "pt") as before:
        header = before.metadata()
    save_file(tensors, file, header)
    return file


def with_bytes(trained, folder, change, write=diffusers, name="*.safetensors"):
    """A file of a format with changed bytes."""
    path = write(trained, folder)
    file = path if path.is_file() else next(path.glob(name))
    file.write_bytes(change(file.read_bytes()))
    return file


def pickled(trained, folder, name):
    torch.save(trained.state, folder / name)
    return folder / name


def sat_folder(trained, folder):
    """A checkpoint of SwissArmyTransformer: the name of a folder, and a pickle in it."""
    (folder / "latest").write_text("1000")
    (folder / "1000").mkdir()
    torch.save({"module": trained.state}, folder / "1000/mp_rank_00_model_states.pt")
    return folder


def nothing(_, folder):
    (folder / "adapter_config.json").write_text("{}")
    return folder


NAN, HUGE = float("nan"), 10**400
DAMAGES = {
    "settings cut": (with_header, {"cogds": "{"}),
    "settings a list": (with_header, {"cogds": "[1]"}),
    "settings nested": (with_header, {"cogds": "[" * 100_000}),
    "settings null": (with_header, {"cogds": "null"}),
    "settings empty": (with_header, {"cogds": ""}),
    "convention unknown": (with_settings, {"image_latents": "brighter"}),
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
    "finetrainers, a list": (with_tensors, {"write": lambda *_: finetrainers_with(*_, "[1]")}),
    "finetrainers, alpha a text": (with_tensors, {"write": lambda *_: finetrainers_with(*_, '{"lora_alpha": "3"}')}),
    "finetrainers, rank a list": (with_tensors, {"write": lambda *_: finetrainers_with(*_, '{"r": [4]}')}),
    "finetrainers, empty": (with_tensors, {"write": lambda *_: finetrainers_with(*_, "")}),
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
    "tensor alpha NaN": (with_tensors, {"write": comfyui, "alpha": lambda one: one * NAN}),
    "tensor alpha negative": (with_tensors, {"write": comfyui, "alpha": lambda one: -one}),
    "tensor alpha of two numbers": (with_tensors, {"write": videox_fun, "alpha": lambda one: one.repeat(2)}),
    "tensor alpha of no number": (with_tensors, {"write": dotted_kohya, "alpha": lambda one: one.reshape(1)[:0]}),
    "integers": (with_tensors, {"lora_B": lambda one: one.to(torch.int8)}),
    "rank 0": (with_tensors, {"lora_A": lambda one: one[:0], "lora_B": lambda one: one[:, :0].contiguous()}),
    "a convolution": (with_tensors, {"lora_A": lambda one: one[..., None, None]}),
    "NaN": (with_tensors, {"0.attn1.to_q.lora_B": lambda one: one * NAN}),
    "cut in the header": (with_bytes, {"change": lambda data: data[:100]}),
    "cut in the tensors": (with_bytes, {"change": lambda data: data[:-1]}),
    "too long": (with_bytes, {"change": lambda data: data + b"0"}),
    "empty": (with_bytes, {"change": lambda _: b""}),
    "adapter_model empty": (with_bytes, {"change": lambda _: b"", "write": peft}),
    "a .bin": (pickled, {"name": "pytorch_lora_weights.bin"}),
    "a .pt": (pickled, {"name": "mp_rank_00_model_states.pt"}),
    "a folder without adapter": (nothing, {}),
    "SAT's folder": (sat_folder, {}),
    "SAT, cut": (with_bytes, {"change": lambda data: data[:-4], "write": sat}),
    "SAT, query without B": (with_tensors, {"write": lambda *_: sat_without_one(*_)}),
}  # fmt: skip


def finetrainers_with(trained, folder, config):
    save_file(
        prefixed("transformer.", trained.state), file := folder / "pytorch_lora_weights.safetensors",
        {"lora_config": config, "format": "pt"},
    )  # fmt: skip
    return file


def sat_without_one(trained, folder):
    tensors = load_file(file := sat(trained, folder))
    del tensors["model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_B.0"]
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_ends_every_verb_with_code_2(trained, verbs, tmp_path, capsys, damage):
    write, arguments = DAMAGES[damage]
    (tmp_path / "lora").mkdir()
    path = write(trained, tmp_path / "lora", **arguments)
    codes, places = {}, {}
    for verb, run in verbs.items():
        capsys.readouterr()
        codes[verb] = cli.run(lambda: run(path, None))  # noqa: B023
        last = capsys.readouterr().err.splitlines()
        places[verb] = str(path) in last[-1]
    assert (codes, places) == (dict.fromkeys(verbs, 2), dict.fromkeys(verbs, True))


def test_a_path_that_the_system_refuses_is_no_lora():
    with pytest.raises(UserError, match=r"lll: "):
        read_lora("l" * 300)


@pytest.mark.parametrize("alpha", [NAN, 0.0, -3.0])
def test_an_alpha_of_the_user_is_a_strength(trained, tmp_path, alpha):
    with pytest.raises(UserError, match=r"^--lora-alpha: "):
        read_loras([cogkit(trained, tmp_path)], alpha, "--lora-alpha")


def test_an_alpha_of_several_numbers_is_refused(trained, tmp_path):
    tensors = {**trained.state, "transformer_blocks.0.attn1.to_q.alpha": torch.ones(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"to_q .*alpha \[1\.0, 1\.0\]"):
        read_lora(tmp_path)

"""A LoRA extracted from a fine-tuned model is the best of its rank, and its error is what is stated."""

import shutil

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogds import cli
from cogds.card import pipeline_factor
from cogds.errors import UserError
from cogds.model.full_export import FullExport
from cogds.model.load import find_model
from cogds.model.lora import extract
from cogds.model.lora.extract import extract_lora
from cogds.model.lora.file import read_lora
from tests.model.lora.adapters import output, output_in_diffusers


def tune(base, folder, change, dtype=torch.float32):
    """Copy a model in `dtype` and call `change` with every weight of the transformer."""
    shutil.copytree(base, folder)
    transformer = CogVideoXTransformer3DModel.from_pretrained(base, subfolder="transformer", dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            change(name, weight, generator)
    transformer.save_pretrained(folder / "transformer")
    return transformer


def test_a_change_of_this_rank_is_extracted_exactly(tiny_model, tmp_path, capsys):
    """Through the command, and loaded in diffusers."""

    def change(name, weight, generator):
        if "attn1.to_" in name and weight.ndim == 2:
            b, a = (
                torch.randn(len(weight), 2, generator=generator),
                torch.randn(2, weight.shape[1], generator=generator),
            )
            weight += 0.1 * b @ a

    tuned = tune(tiny_model, tmp_path / "tuned", change)
    (tmp_path / "video.mp4").write_bytes(b"video")
    argv = [str(tmp_path / "tuned"), "--to", "lora", "--rank", "2", "--model", str(tiny_model), "--dtype", "fp32"]
    argv += ["--sample", str(tmp_path / "video.mp4"), "--output", str(tmp_path / "lora")]
    with pytest.raises(UserError, match="--lora-alpha"):
        cli.call("export", [*argv, "--lora-alpha", "4"])
    cli.call("export", argv)
    assert (tmp_path / "lora/sample.mp4").read_bytes() == b"video"
    assert "sample.mp4" in (tmp_path / "lora/README.md").read_text()
    assert "keeps 100.0% of the change" in capsys.readouterr().out
    file = read_lora(tmp_path / "lora")
    assert file.ranks == (2,) or list(file.ranks) == [2]
    assert len(file.pairs) == 2 * 4
    torch.testing.assert_close(
        output_in_diffusers(tiny_model, (tmp_path / "lora", 1.0)), output(tuned), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("exact_size", [1024, 8], ids=["exact", "randomized"])
def test_the_error_is_that_of_the_best_approximation(tiny_model, tmp_path, monkeypatch, exact_size):
    monkeypatch.setattr(extract, "EXACT_SIZE", exact_size)
    tune(
        tiny_model,
        tmp_path / "tuned",
        lambda _, weight, generator: weight.add_(0.1 * torch.randn(weight.shape, generator=generator)),
    )
    base, tuned = find_model(str(tiny_model)), find_model(str(tmp_path / "tuned"))
    total = left = outside = 0.0
    tensors = [
        CogVideoXTransformer3DModel.from_pretrained(path, subfolder="transformer") for path in (base.path, tuned.path)
    ]
    linears = {name for name, module in tensors[0].named_modules() if isinstance(module, torch.nn.Linear)}
    for (name, before), after in zip(tensors[0].named_parameters(), tensors[1].parameters()):
        difference = (after - before).detach().double()
        total += difference.square().sum()
        if name.removesuffix(".weight") in linears:
            left += torch.linalg.svdvals(difference)[4:].square().sum()
        else:
            outside += difference.square().sum()
    found = extract_lora(base, tuned, 4, torch.float32, {})
    assert found.error == pytest.approx(((left + outside) / total).sqrt().item(), rel=1e-3)
    assert found.outside == pytest.approx((outside / total).item(), rel=1e-3)
    assert found.layer_errors.keys() == linears


def test_rounding_to_another_dtype_is_not_a_change(tiny_model, tmp_path):
    """A part of a float32 model, trained in bf16."""
    trained = "transformer_blocks.0.attn1.to_q"

    def change(name, weight, generator):
        if name == f"{trained}.weight":
            weight += 0.1 * torch.randn(weight.shape, generator=generator)

    tune(tiny_model, tmp_path / "tuned", change, torch.bfloat16)
    base, tuned = find_model(str(tiny_model)), find_model(str(tmp_path / "tuned"))
    extraction = extract_lora(base, tuned, 1000, torch.float32, {})
    assert list(extraction.layer_errors) == [trained]
    assert extraction.outside == 0
    assert extraction.error < 1e-4


def test_the_factor_of_the_image_latents_is_recorded_and_not_extracted(tiny_model, tmp_path):
    """From a run with conditioning.image_latents=scaled."""
    trained, base = "transformer_blocks.0.attn1.to_q", find_model(str(tiny_model))
    factor = pipeline_factor(base.vae_config, "scaled")
    metadata = {"base_model": str(tiny_model), "image_latents": "pipeline", "trained_image_latents": "scaled"}
    export = FullExport(base, torch.float32, frozenset([f"{trained}.weight"]), factor, metadata)
    (tmp_path / "tuned/transformer").mkdir(parents=True)
    export.write_files(tmp_path / "tuned/transformer", lambda _, size: torch.linspace(-1, 1, size))
    export.complete(tmp_path / "tuned")
    cli.call("export", [str(tmp_path / "tuned"), "--to", "lora", "--output", str(tmp_path / "lora")])
    lora = read_lora(tmp_path / "lora")
    assert list(lora.pairs) == [trained]
    assert lora.metadata["image_latents"] == "scaled"
    assert lora.metadata["image_latent_factor"] == pytest.approx(factor)
    assert "trained_image_latents" not in lora.metadata


def test_weights_that_are_not_finite_are_refused(tiny_model, tmp_path):
    tune(tiny_model, tmp_path / "tuned", lambda name, weight, _: weight.fill_(torch.nan) if "to_q" in name else None)
    with pytest.raises(UserError, match=r"to_q\.\w+' is not finite"):
        extract_lora(find_model(str(tiny_model)), find_model(str(tmp_path / "tuned")), 4, torch.float32, {})


def test_other_models_are_refused(tiny_model, comfyui_model, tmp_path):
    base = find_model(str(tiny_model))
    with pytest.raises(UserError, match="no linear layer differs"):
        extract_lora(base, base, 4, torch.float32, {})
    with pytest.raises(UserError, match="--model"):
        extract_lora(base, find_model(str(comfyui_model)), 4, torch.float32, {})
    argv = [str(tiny_model), "--to", "lora", "--output", str(tmp_path / "lora")]
    with pytest.raises(UserError, match="does not record its base model"):
        cli.call("export", argv)

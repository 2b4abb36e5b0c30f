"""The startup summary on a terminal and in a log."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from cogds.config.loading import load_config
from cogds.core.geometry import ClipShape
from cogds.data.loading.index import IndexedCaption, IndexedClip
from cogds.train.summary import condition_warning, describe_ranks, learning_rate_warning, sample_command, show
from tests.conftest import ROOT


def test_a_log_has_the_lines_unchanged(capsys):
    lines = ["model /a [b] " + "x" * 300, "  two"]
    show(lines, "cogds")
    assert capsys.readouterr().out.splitlines() == lines


def test_a_terminal_shows_a_panel():
    out = io.StringIO()
    show(["model /a [b]", "LoRA rank 4"], "cogds", Console(file=out, force_terminal=True, width=60, color_system=None))
    drawn = out.getvalue().splitlines()
    assert drawn[0].startswith("╭─ cogds ─")
    assert "model /a [b]" in drawn[1]
    assert all(len(line) == 60 for line in drawn)


def test_the_summary_names_the_devices(monkeypatch):
    def text(device, size, sequence_size=1):
        world = SimpleNamespace(device=torch.device(device), size=size, sequence_size=sequence_size)
        return describe_ranks(SimpleNamespace(world=world))

    assert text("cpu", 2) == "2 ranks on CPUs"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert text("cuda", 1) == "1 GPU (NVIDIA H100 80GB HBM3)"
    assert text("cuda", 4, 2) == "4 GPUs (NVIDIA H100 80GB HBM3), 2 per clip"


@pytest.mark.parametrize(
    ("overrides", "is_warned"),
    [((), False), (("train.method=full",), True), (("train.method=full", "optimizer.lr=1e-5"), False)],
    ids=["lora", "full", "full, lower"],
)
def test_the_rate_of_a_lora_in_a_shipped_config_is_too_high_for_a_full_fine_tune(overrides, is_warned):
    config = ROOT / "launch/configs/cogvideox1.5_i2v_lora.yaml"
    cfg = load_config([str(config)], ["data.path=clips", *overrides])[0]
    assert bool(learning_rate_warning(cfg)) is is_warned


def test_the_default_rate_of_a_full_fine_tune_is_not_warned_about():
    cfg = load_config(None, ["model.path=m", "data.path=clips", "train.method=full"])[0]
    assert learning_rate_warning(cfg) is None


@pytest.mark.parametrize(
    ("overrides", "patch_size_t", "is_warned"),
    [
        ((), 2, False),
        (("conditioning.modes={first: 0.5, last: 0.5}",), 2, True),
        (("conditioning.modes={first: 0.5, last: 0.5}",), None, False),
        (("conditioning.modes={first: 0.5, none: 0.5}",), 2, False),
        (("conditioning.modes={last: 1}", "lora.target_modules=[to_q, patch_embed.proj]"), 2, False),
        (("conditioning.modes={last: 1}", "lora.target_modules=[to_q, embed.proj]"), 2, True),
        (("conditioning.modes={last: 1}", "lora.target_modules=[all-linear]"), 2, False),
        (("conditioning.modes={last: 1}", "train.method=full"), 2, False),
    ],
)
def test_new_conditions_need_the_patch_embedding_of_a_model_with_temporal_patches(overrides, patch_size_t, is_warned):
    cfg = load_config(None, ["model.path=m", "data.path=clips", *overrides])[0]
    assert bool(condition_warning(cfg, SimpleNamespace(patch_size_t=patch_size_t))) is is_warned


@pytest.mark.parametrize("kind, flags", [("video", "--video a.mp4"), ("image", "--image a.mp4")])
def test_an_image_is_not_continued(tmp_path, kind, flags):
    clip = IndexedClip(
        "a.mp4", kind, None, (IndexedCaption("a", "", ""),), 0.0, False, 0, ClipShape(9, 64, 64), "", ""
    )  # fmt: skip
    words = ["model.path=/m", "data.path=/d", f"output_dir={tmp_path}", "conditioning.modes={first: 0.4, prefix: 0.6}"]
    run = SimpleNamespace(
        cfg=load_config([], words)[0],
        data=SimpleNamespace(held_out=None, index=[clip]),
        model=SimpleNamespace(family=SimpleNamespace(takes_image=True)),
    )
    assert f" {flags} --prompt a" in sample_command(run, tmp_path)

"""Cache keys of earlier versions stay valid: with other keys, every user would have to encode everything again."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import torch

from cogds.config.loading import load_config
from cogds.core.geometry import ClipShape
from cogds.data.manifest.assignment import BucketAssignment
from cogds.encode.cache_keys import CacheKeys
from cogds.encode.clip_set import ClipSet


def test_keys_do_not_change(tmp_path, monkeypatch):
    for part in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "weights").write_bytes(part.encode())
    cfg, _ = load_config(
        None,
        [f"model.path={tmp_path}", "data.path=/clips", f"data.cache_dir={tmp_path / 'cache'}", "data.vae_tiling=off",
         "train.precision=bf16"],
    )  # fmt: skip
    geometry = SimpleNamespace(text_tokens=226)
    keys = CacheKeys(cfg, SimpleNamespace(path=tmp_path, geometry=geometry, fetch=lambda *_: None))
    assert keys.caption("a cat").hex() == "d4b1b41b49c98fefc157f713ccf53abd"
    assert keys.caption("").hex() == "bb29a41d02bdf799bf3f344469fd7896"
    table = pa.table(
        {
            "kind": ["video", "image"],
            "digest": pa.array([b"a" * 16, b"b" * 16], pa.binary(16)),
            "image_digest": pa.array([None, b"c" * 16], pa.binary(16)),
            "control_digest": pa.nulls(2, pa.binary(16)),
        }
    )
    rows = np.arange(2)
    assignment = BucketAssignment(
        rows, np.array([0.0, 1.5]), ((2,),), np.zeros(2, np.int16), np.full(2, 9), np.zeros(2, bool)
    )
    clips = ClipSet(table, assignment, (ClipShape(9, 64, 96),), (1.0,), 16.0, "/clips")
    before = ["9aa257bae08758f4de40442f308dd1da", "b4bc0a1fe74ae8559eafbb0ee038ff23"]
    assert [key.hex() for key in keys.clips(clips).to_pylist()] == before
    digests = pa.array([b"d" * 16, None], pa.binary(16))
    controlled = dataclasses.replace(clips, table=table.set_column(3, "control_digest", digests))
    first, second = (key.hex() for key in keys.clips(controlled).to_pylist())
    assert first not in before
    assert second == before[1]
    # On a GPU, the version of cuDNN is part of the key, because some versions compute wrongly.
    on_gpu = []
    for version in (91500, 91600):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        on_gpu.append([key.hex() for key in keys.clips(clips).to_pylist()])
    assert len({key for keys in [before, *on_gpu] for key in keys}) == 6

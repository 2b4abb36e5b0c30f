"""FlashAttention-4 as torch's flash operator.

torch's wrapper (torch/nn/attention/_fa4.py) unpacks exactly 2 results of the package's forward function and 3 of the
backward function. Versions of the package return 2 to 5, the output and the log-sum-exp first, and do not know the same
arguments. This module has the two functions as the wrapper expects them, for any version.
"""

import importlib
import inspect
from types import ModuleType
from typing import Any

import torch
from torch.nn import attention

PACKAGE = "flash_attn.cute.interface"


def register() -> None:
    """Have torch use this module if FlashAttention-4 is activated."""
    from torch.nn.attention import _fa4

    attention.register_flash_attention_impl(
        "FA4", register_fn=lambda: _import_package() and _fa4.register_flash_attention_fa4(__name__)
    )


def _import_package() -> ModuleType:
    return importlib.import_module(PACKAGE)


def _flash_attn_fwd(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    return _call("_flash_attn_fwd", args, kwargs)[:2]


def _flash_attn_bwd(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    return _call("_flash_attn_bwd", args, kwargs)[:3]


def _call(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Call a function of the package. Arguments that it does not know are dropped if they are not set."""
    function = getattr(_import_package(), name)
    known = inspect.signature(function).parameters
    return function(*args, **{key: value for key, value in kwargs.items() if key in known or _is_set(key, value)})


def _is_set(key: str, value: Any) -> bool:
    """Whether an argument of torch's wrapper has an effect. `num_splits` is 1 by default."""
    return value is not None and value is not False and (key, value) != ("num_splits", 1)

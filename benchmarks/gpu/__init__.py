"""Checks that need a GPU, in pieces: `benchmarks/gpu/run.sh`. They also run where torch is a little older and Hydra is missing."""

import sys
from importlib.util import find_spec
from typing import Any
from unittest.mock import MagicMock


def import_config() -> None:
    """Import `ipt.config`, which tells Hydra of its dataclasses; where there is no Hydra it tells a stand-in, and nothing here composes."""
    names = () if find_spec("hydra") else ("hydra", "hydra.core", "hydra.core.config_store", "omegaconf")
    sys.modules.update({name: MagicMock() for name in names})
    import ipt.config  # noqa: F401

    for name in names:
        del sys.modules[name]


def allow_older_torch() -> None:
    """Before torch 2.13 its varlen attention shares keys among heads unasked, and does not know the argument that asks for it."""
    import inspect

    from torch.nn.attention import varlen

    kernel = varlen.varlen_attn
    if "enable_gqa" in inspect.signature(kernel).parameters:
        return

    def unasked(*arguments: Any, enable_gqa: bool = False, **options: Any) -> Any:
        return kernel(*arguments, **options)

    varlen.varlen_attn = unasked


import_config()

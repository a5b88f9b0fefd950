"""Checks that need a GPU, in pieces: `benchmarks/gpu/run.sh`. They also run where torch is a little
older and Hydra is missing.
"""

import inspect
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import MagicMock

# What ipt installs and no training needs once it is configured, by the modules that are imported of
# it.
OPTIONAL = {
    "hydra": ("hydra", "hydra.core", "hydra.core.config_store"),
    "omegaconf": ("omegaconf",),
    "zstandard": ("zstandard",),
}


def import_all_the_same(module: str) -> None:
    """Import a module of ipt's that imports packages of OPTIONAL; what is not installed gets
    stand-ins, which nothing here calls.
    """
    names = [
        name for package, names in OPTIONAL.items() if find_spec(package) is None for name in names
    ]
    sys.modules.update({name: MagicMock() for name in names})
    import_module(module)
    for name in names:
        del sys.modules[name]


def allow_older_torch() -> None:
    """Before torch 2.13 its varlen attention shares keys among heads unasked, and does not know the
    argument that asks for it.
    """
    from torch.nn.attention import varlen

    kernel = varlen.varlen_attn
    if "enable_gqa" in inspect.signature(kernel).parameters:
        return

    def unasked(*arguments: Any, enable_gqa: bool = False, **options: Any) -> Any:
        return kernel(*arguments, **options)

    varlen.varlen_attn = unasked


import_all_the_same("ipt.config")

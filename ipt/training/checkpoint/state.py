"""The state of a training run: named tensors that are read and written in place, and the random
states of a process.

Names of weights are `model.` and the name in the Hugging Face model; of other tensors of the
LightningModule, such as the guard's statistics, `module.` and their name; of optimizer state
`optimizer.`, the weight's name and the state's name.
"""

import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ipt.training.checkpoint.storage import own_name

# Added to names by torch.compile and by activation checkpointing.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
MODEL = "model."


class TrainingState:
    """The tensors of a module and its optimizer by name. Names do not depend on wrappers or
    sharding.
    """

    def __init__(
        self, module: L.LightningModule, model: nn.Module, optimizer: Optimizer, frozen: bool
    ) -> None:
        """`frozen`: include frozen weights, which cannot be read from the model's folder again."""
        self.module = module
        self.optimizer = optimizer
        self.frozen = frozen
        self._prefix = next(name for name, part in module.named_modules() if part is model) + "."
        self._names = {}
        for name, parameter in module.named_parameters():
            self._names[id(parameter)] = self._name(plain_name(name))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors. They share memory with the run."""
        tensors = dict(self._optimizer_state())
        for name, value in trained_tensors(self.module, self.frozen).items():
            tensors[self._name(name)] = value
        return tensors

    def prepare(self) -> None:
        """Let the optimizer create its state, as in its first step, to read a checkpoint into."""
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def _optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each entry. Tensors that each process has for itself, such as scales
        of a slice, have the process in their name.
        """
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                name = f"optimizer.{self._names[id(parameter)]}.{key}"
                is_own = isinstance(parameter, DTensor) and not isinstance(value, DTensor)
                yield own_name(name) if is_own and value.numel() != 1 else name, value

    def _name(self, name: str) -> str:
        if name.startswith(self._prefix):
            return MODEL + name.removeprefix(self._prefix)
        return f"module.{name}"


def trained_tensors(module: nn.Module, frozen: bool) -> dict[str, Tensor]:
    """Weights and persistent buffers by their plain names, tied ones once. Frozen weights only with
    `frozen`, and without the state of their quantisation.
    """
    names = {plain_name(name) for name, _ in module.named_buffers()}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or frozen:
            names.add(plain_name(name))
    tensors = {}
    for name, value in module.state_dict().items():
        if plain_name(name) in names:
            tensors[plain_name(name)] = value.detach()
    return tensors


def plain_name(name: str) -> str:
    """The name of a weight without the names of wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


# Random states
# ----------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """States of this process's random generators, as JSON values."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    cuda = torch.cuda.get_rng_state().numpy() if torch.cuda.is_available() else None
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": None if cuda is None else cuda.tobytes().hex(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that `random_state` returned; a GPU's if there was one and is one."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        with suppress(RuntimeError):  # the state of another kind of GPU
            torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

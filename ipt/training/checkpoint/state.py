"""The state of a training run: named tensors that are read and written in place, and the random
states of a process.

Weights are called `model.` and their name in the Hugging Face model, other tensors of the
LightningModule, such as a guard's statistics, `module.`, and the optimizer's state `optimizer.`,
the weight's name and the state's.
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

WRAPPERS = (
    "_orig_mod.",
    "_checkpoint_wrapped_module.",
)  # of torch.compile and of activation checkpointing
MODEL = "model."


class TrainingState:
    """The tensors of a module and its optimizer by name, the same names whatever wraps the module
    and however it is sharded.
    """

    def __init__(
        self, module: L.LightningModule, model: nn.Module, optimizer: Optimizer, frozen: bool
    ) -> None:
        """With `frozen`, weights that are not trained are in it too: they need not be where they
        are read from a model's folder.
        """
        self.module, self.optimizer, self.frozen = module, optimizer, frozen
        self._prefix = next(name for name, part in module.named_modules() if part is model) + "."
        self._names = {
            id(parameter): self._name(plain_name(name))
            for name, parameter in module.named_parameters()
        }

    def tensors(self) -> dict[str, Tensor]:
        """All tensors; they share memory with the run, but for those that stand for a number."""
        weights = trained_tensors(self.module, self.frozen)
        return {
            **{self._name(name): value for name, value in weights.items()},
            **{name: value for name, _, _, value in self._optimizer_state()},
        }

    def prepare(self) -> None:
        """Let the optimizer make its state, as its first step does, so that there is something to
        read a checkpoint into.
        """
        parameters = [
            parameter for group in self.optimizer.param_groups for parameter in group["params"]
        ]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def put_back(self, tensors: dict[str, Tensor]) -> None:
        """Numbers of the optimizer's state, which could not be read in place."""
        for name, state, key, _ in list(self._optimizer_state()):
            if isinstance(state[key], int | float):
                state[key] = type(state[key])(tensors[name].item())

    def _optimizer_state(self) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
        """Name, where it is, and a tensor of each entry. A tensor of a process's own, with a
        slice's scales, has the process's name.
        """
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                name = f"optimizer.{self._names[id(parameter)]}.{key}"
                if isinstance(value, int | float):
                    yield name, state, key, torch.tensor(value, dtype=torch.float64)
                elif isinstance(value, Tensor):
                    whole = (
                        not isinstance(parameter, DTensor)
                        or isinstance(value, DTensor)
                        or value.numel() == 1
                    )
                    yield name if whole else own_name(name), state, key, value

    def _name(self, name: str) -> str:
        return (
            MODEL + name.removeprefix(self._prefix)
            if name.startswith(self._prefix)
            else f"module.{name}"
        )


def trained_tensors(module: nn.Module, frozen: bool) -> dict[str, Tensor]:
    """Weights and persistent buffers by their plain names, tied ones once; frozen weights only if
    asked, without what quantises them.
    """
    names = {
        plain_name(name)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or frozen
    }
    names |= {plain_name(name) for name, _ in module.named_buffers()}
    state = {plain_name(name): value for name, value in module.state_dict().items()}
    return {name: value.detach() for name, value in state.items() if name in names}


def plain_name(name: str) -> str:
    """The name of a weight without those of wrappers around the modules that hold it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


# Random states
# ----------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """States of the generators of this process, JSON-able."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex()
        if torch.cuda.is_available()
        else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo what happened to the generators since `random_state` gave `state`; a GPU's only where
    there was one, and is one.
    """
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        with suppress(RuntimeError):  # of another kind of device
            torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

"""Weights of a sharded model: each process reads its own rows of them, so nobody ever holds the
whole model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ipt.errors import UserError
from ipt.models import resolve_model
from ipt.models.checks import check_weights
from ipt.models.files import read_headers, weight_files
from ipt.training.model import base_model, initial_lora, is_lora
from ipt.training.optim.dtensor import like, local, rows


def stored_weights(name: str) -> dict[str, Path]:
    """Weights of the model `name` -> the safetensors file that holds them; fetches a hub's. Empty
    if there are none in this format.

    Raises UserError unless these are all of the model's weights and no others.
    """
    resolved = resolve_model(name)
    if not Path(resolved).is_dir():
        from huggingface_hub import snapshot_download

        resolved = snapshot_download(resolved, allow_patterns=["*.json", "*.safetensors"])
    if not any(Path(resolved).glob("*.safetensors*")):
        return {}
    check_weights(resolved)
    files = weight_files(Path(resolved))
    if files[0].suffix != ".safetensors":
        return {}
    return {name: tensor.file for name, tensor in read_headers(files).items()}


def can_be_filled(model: Any, stored: Mapping[str, Path]) -> bool:
    """Whether the weights have the names of the model's and nothing else is needed.

    Not where transformers converts them while loading, as it does for mixtures of experts, or where
    the model has buffers that are stored.
    """
    wanted = (stored_name(name) for name, _ in model.named_parameters() if not is_lora(name))
    return all(name in stored for name in wanted) and all(
        _is_rotary(module) for module in _modules_with_buffers(model)
    )


def fill(model: Any, stored: Mapping[str, Path], device: torch.device, seed: int) -> None:
    """Give `model`, cut while on the meta device, its weights, on `device`; LoRA layers get their
    first values.

    Raises UserError for a weight of another shape than the model's.
    """
    made: dict[int, nn.Parameter] = {}
    parameters = {
        name: parameter for name, parameter in model.named_parameters() if parameter.is_meta
    }  # tied ones once
    for file in sorted({stored[stored_name(name)] for name in parameters if not is_lora(name)}):
        with safe_open(
            file, "pt"
        ) as weights:  # one at a time: what is read stays mapped until it is closed
            for name, parameter in parameters.items():
                if not is_lora(name) and stored[stored_name(name)] == file:
                    part = _read_rows(weights, stored_name(name), parameter)
                    made[id(parameter)] = _filled(parameter, part, device)
    for name, parameter in parameters.items():
        if is_lora(name):
            made[id(parameter)] = _filled(
                parameter, initial_lora(name, parameter, seed)[slice(*rows(parameter))], device
            )
    for (
        module
    ) in model.modules():  # not by name: tied weights are one object in two places, and stay so
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in made:
                setattr(module, key, made[id(parameter)])
    for module in _modules_with_buffers(model):
        module.to_empty(device=device, recurse=False)
        base_model(model)._init_weights(module)


def stored_name(name: str) -> str:
    """The name of a weight before PEFT wrapped it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _read_rows(weights: Any, name: str, parameter: Tensor) -> Tensor:
    view = weights.get_slice(name)
    if list(parameter.shape) != view.get_shape():
        raise UserError(
            f"{name}: stored as {view.get_shape()}, but the model's config.json makes it "
            f"{list(parameter.shape)}"
        )
    start, end = rows(parameter)
    return view[start:end] if end > start else torch.empty(0, *parameter.shape[1:])


def _filled(parameter: nn.Parameter, part: Tensor, device: torch.device) -> nn.Parameter:
    part = part.to(device=device, dtype=parameter.dtype, copy=True)
    filled = like(parameter, part, parameter.shape)
    assert local(filled).shape == local(parameter).shape
    return nn.Parameter(filled, requires_grad=parameter.requires_grad)


def _modules_with_buffers(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if any(buffer.is_meta for buffer in module.buffers(recurse=False))
    ]


def _is_rotary(module: nn.Module) -> bool:
    """The buffers of rotary embeddings are computed from the model's config, by transformers
    itself.
    """
    return hasattr(module, "original_inv_freq")

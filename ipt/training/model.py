"""The model that a run trains: Hugging Face weights or random ones, with LoRA layers and frozen
weights quantised if the config asks for it.

One process loads the whole model (`build_model`). Under FSDP2 the model is created without weights
(`empty_model`), sharded, and then each process reads its own rows from the files (`fill`).
`meta_model` has no weights at all, for dry runs.
"""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ipt.config import Config
from ipt.errors import UserError
from ipt.models import load_model, quantization_config, resolve_model
from ipt.models.checks import check_weights
from ipt.models.files import read_headers, weight_files
from ipt.training.attention import implementation, resolve_attention
from ipt.training.optim.dtensor import like, local, rows

ARCHITECTURES = Path(__file__).with_name("architectures.yaml")


def build_model(config: Config, attention: str | None = None) -> Any:
    """The whole model in memory and in training mode, with weights in the dtype of
    `trainer.precision`.

    `attention` is one of the values of `trainer.attn_implementation`; by default the first one that
    this machine can run. Raises UserError for one that the model does not support.
    """
    attention = implementation(attention or resolve_attention(config.trainer))
    if config.architecture:
        model = _random_model(architecture_of(config), config, attention)
    else:
        _check_flash_attention(architecture_of(config), attention)
        options: dict[str, Any] = {"attn_implementation": attention}
        if config.lora.quantize:
            compute = torch.bfloat16 if config.trainer.bf16_arithmetic else torch.float32
            options["quantization_config"] = quantization_config(
                config.lora.quantize, compute, double_quant=True
            )
        model = load_model(resolve_model(config.model), weights_dtype(config), **options)
    model = _to_train(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.copy_(initial_lora(name, parameter, config.seed))
    return model


def empty_model(config: Config, attention: str | None = None) -> Any:
    """The model of `build_model` on the meta device, to be sharded and then filled with `fill`."""
    attention = implementation(attention or resolve_attention(config.trainer))
    architecture = architecture_of(config)
    _check_flash_attention(architecture, attention)
    with torch.device("meta"):
        return _to_train(_random_model(architecture, config, attention), config)


def whole_or_empty_model(
    config: Config, attention: str, sharded: bool
) -> tuple[Any, dict[str, Path]]:
    """If the model will be `sharded`, an empty model and the files for `fill`.

    Otherwise the whole model and no files; likewise for random and quantised weights, and for
    weights that transformers converts while loading.
    """
    if sharded and not config.architecture and not config.lora.quantize:
        files = stored_weights(config.model)
        if files:
            model = empty_model(config, attention)
            if can_be_filled(model, files):
                return model, files
    return build_model(config, attention), {}


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a Hugging Face decoder, which are checkpointed, compiled and sharded
    one by one.
    """
    names = base_model(model)._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def base_model(model: Any) -> Any:
    """The Hugging Face model inside the LoRA layers, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(base: Any) -> Any:
    """The part of a Hugging Face causal LM that computes its last hidden states."""
    decoder = base.get_decoder()
    return base.model if decoder is base else decoder  # Llama-4's text model returns itself


def evaluation_mode(model: nn.Module) -> None:
    """`model.eval()`, except for the layers of bitsandbytes.

    On CPUs with AVX512-BF16 those repack their 4-bit weights irreversibly at the first forward pass
    in evaluation mode.
    """
    for part in model.modules():
        if not type(part).__module__.startswith("bitsandbytes"):
            part.training = False


def architecture_of(config: Config) -> Any:
    """The transformers config of the model; downloads the config of a hub model."""
    if config.architecture:
        return AutoConfig.for_model(**config.architecture)
    return AutoConfig.from_pretrained(resolve_model(config.model), trust_remote_code=False)


def weights_dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.trainer.bf16_weights else torch.float32


def is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def initial_lora(name: str, parameter: Tensor, seed: int) -> Tensor:
    """Initial value of a LoRA matrix [out, in] on the host: uniform as in PEFT for A, zeros for B.

    It depends on the seed and the name only, not on the number of devices.
    """
    values = torch.zeros(parameter.shape)
    if ".lora_A." in name:
        sequence = np.random.SeedSequence([seed, *name.encode()])
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        bound = 1 / math.sqrt(parameter.shape[1])
        values.uniform_(-bound, bound, generator=generator)
    return values


def _random_model(architecture: Any, config: Config, attention: str) -> Any:
    return AutoModelForCausalLM.from_config(
        architecture, dtype=weights_dtype(config), attn_implementation=attention
    )


def _to_train(model: Any, config: Config) -> Any:
    """In training mode, with fp32 LoRA layers on all linear layers if the config asks for them."""
    model.train()
    if not config.lora.rank:
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules="all-linear",
    )
    return get_peft_model(model, lora)


def _check_flash_attention(architecture: Any, attention: str) -> None:
    """Some models support only certain flash kernels; transformers would silently download another
    one from the hub.
    """
    if "flash" not in attention or type(architecture) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(architecture)]
    supported = getattr(model_class, "_compatible_flash_implementations", None)
    if supported and attention not in supported:
        raise UserError(
            f"trainer.attn_implementation={attention}: this model supports only "
            f"{', '.join(supported)}; use sdpa"
        )


# Loading into a sharded model
# ----------------------------------------------------------------------------------------------


def stored_weights(name: str) -> dict[str, Path]:
    """Weight name -> safetensors file of the model `name`; downloads a hub model. Empty for other
    formats.

    Raises UserError if weights are missing or do not belong to the model.
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


def can_be_filled(model: Any, files: Mapping[str, Path]) -> bool:
    """Whether the files hold each parameter under the model's own name, and all buffers can be
    computed.

    False for mixtures of experts, whose weights transformers converts while loading.
    """
    for name, _ in model.named_parameters():
        if not is_lora(name) and stored_name(name) not in files:
            return False
    # transformers computes the buffers of rotary embeddings from the config
    return all(hasattr(module, "original_inv_freq") for module in _modules_with_buffers(model))


def fill(model: Any, files: Mapping[str, Path], device: torch.device, seed: int) -> None:
    """Read this process's rows of each weight of a sharded meta model to `device`, and initialise
    its LoRA layers.

    Raises UserError for a weight with another shape than in the model.
    """
    # `named_parameters` names tied parameters once.
    empty = {name: weight for name, weight in model.named_parameters() if weight.is_meta}
    by_file: dict[Path, list[str]] = {}
    filled: dict[int, nn.Parameter] = {}
    for name, weight in empty.items():
        if is_lora(name):
            start, end = rows(weight)
            part = initial_lora(name, weight, seed)[start:end]
            filled[id(weight)] = _filled(weight, part, device)
        else:
            by_file.setdefault(files[stored_name(name)], []).append(name)
    for file, names in sorted(by_file.items()):
        with safe_open(file, "pt") as weights:  # its pages stay mapped until it is closed
            for name in names:
                part = _read_rows(weights, stored_name(name), empty[name])
                filled[id(empty[name])] = _filled(empty[name], part, device)
    # Parameters are replaced by identity, not by name, so that tied ones stay tied.
    for module in model.modules():
        for key, weight in module.named_parameters(recurse=False):
            if id(weight) in filled:
                setattr(module, key, filled[id(weight)])
    for module in _modules_with_buffers(model):
        module.to_empty(device=device, recurse=False)
        base_model(model)._init_weights(module)


def stored_name(name: str) -> str:
    """The name of a weight without what PEFT adds to it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _read_rows(weights: Any, name: str, parameter: Tensor) -> Tensor:
    view = weights.get_slice(name)
    if list(parameter.shape) != view.get_shape():
        raise UserError(
            f"{name}: the stored shape is {view.get_shape()}, but config.json defines "
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
    found = []
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            found.append(module)
    return found


# Models without weights
# ----------------------------------------------------------------------------------------------


def meta_model(config: Config, attention: str = "eager") -> Any:
    """The model on the meta device in the dtype of `trainer.precision`, with LoRA layers but
    without quantisation. Reads no weights and does not use the network.

    `attention` is a name that transformers knows. Raises UserError as `model_config`.
    """
    with torch.device("meta"):
        return _to_train(_random_model(model_config(config), config, attention), config)


def model_config(config: Config) -> Any:
    """The transformers config of the model, from `architecture`, a folder, the list of known models
    or the hub's cache, without using the network.

    Raises UserError for an unknown model type, and for a hub name that is not known here.
    """
    facts = config.architecture
    if not facts and not Path(config.model).exists():
        facts = known_architectures().get(config.model, {})
    if facts:
        try:
            return AutoConfig.for_model(**facts)
        except (TypeError, ValueError) as error:
            raise UserError(f"architecture: {str(error).splitlines()[0]}") from None
    try:
        return AutoConfig.from_pretrained(
            config.model, local_files_only=True, trust_remote_code=False
        )
    except OSError:
        raise UserError(
            f"model={config.model}: a dry run does not use the network, and the shape of this "
            "model is not known here: download the model and give its folder"
        ) from None


@cache
def known_architectures() -> dict[str, dict[str, Any]]:
    """Hub and embedded names -> keyword arguments of a transformers config."""
    return yaml.safe_load(ARCHITECTURES.read_text(encoding="utf-8"))

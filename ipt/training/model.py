"""The model that a run trains: from its weights or from scratch, with LoRA layers, frozen weights
quantised if asked for.
"""

import math
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from ipt.config import Config
from ipt.errors import UserError
from ipt.models import load_model, resolve_model
from ipt.training.attention import implementation, resolve_attention


def build_model(config: Config, attention: str | None = None) -> Any:
    """The whole model in memory, in training mode, its weights as `trainer.precision` says.

    `attention` is an implementation of `trainer.attn_implementation`'s that is not looked for on this
    machine; by default the resolved one. Raises UserError for an implementation that this machine
    or this model does not allow.
    """
    chosen = implementation(attention or resolve_attention(config.trainer))
    if config.architecture:
        model = _from_config(architecture_of(config), config, chosen)
    else:
        _check_kernel(load_config(config), chosen)
        quantized = {"quantization_config": _quantization(config)} if config.lora.quantize else {}
        model = load_model(
            resolve_model(config.model),
            weights_dtype(config),
            attn_implementation=chosen,
            **quantized,
        )
    model = _finished(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.copy_(initial_lora(name, parameter, config.seed))
    return model


def empty_model(config: Config, attention: str | None = None) -> Any:
    """The model of `build_model` without its weights, on the meta device, to be cut and then filled
    by ipt.training.loading.
    """
    architecture, chosen = (
        load_config(config),
        implementation(attention or resolve_attention(config.trainer)),
    )
    _check_kernel(architecture, chosen)
    return model_on_meta(architecture, config, chosen)


def model_on_meta(architecture: Any, config: Config, attention: str) -> Any:
    """The model of a transformers config on the meta device, as `config` trains it; `attention` is
    transformers' name for it.
    """
    with torch.device("meta"):
        return _finished(_from_config(architecture, config, attention), config)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a Hugging Face decoder: what is checkpointed, compiled and sharded one
    by one.
    """
    names = base_model(model)._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def base_model(model: Any) -> Any:
    """The Hugging Face model inside the LoRA layers, if it has any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def evaluation_mode(model: nn.Module) -> None:
    """Like `model.eval()`, except for the layers of bitsandbytes.

    On CPUs with AVX512-BF16 these repack their 4-bit weights for good at their first forward pass
    in evaluation mode.
    """
    for part in model.modules():
        if not type(part).__module__.startswith("bitsandbytes"):
            part.training = False


def decoder_of(base: Any) -> Any:
    """The part of a Hugging Face causal LM that computes its last hidden states."""
    decoder = base.get_decoder()
    return base.model if decoder is base else decoder  # Llama-4's text model returns itself


def architecture_of(config: Config) -> Any:
    """The transformers config of the model that a run trains; fetches that of a hub's model."""
    if not config.architecture:
        return load_config(config)
    from transformers import AutoConfig

    return AutoConfig.for_model(**config.architecture)


def load_config(config: Config) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(resolve_model(config.model), trust_remote_code=False)


def weights_dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.trainer.bf16_weights else torch.float32


def is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def initial_lora(name: str, parameter: Tensor, seed: int) -> Tensor:
    """The first value of a LoRA matrix [out, in], on the host: uniform as PEFT's for A, zeros for
    B. The same whatever the devices.
    """
    values = torch.zeros(parameter.shape)
    if ".lora_A." in name:
        bound = 1 / math.sqrt(parameter.shape[1])
        values.uniform_(
            -bound,
            bound,
            generator=torch.Generator().manual_seed(seed * 1_000_003 + crc32(name.encode())),
        )
    return values


def _from_config(architecture: Any, config: Config, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        architecture, dtype=weights_dtype(config), attn_implementation=attention
    )


def _finished(model: Any, config: Config) -> Any:
    """In training mode, which from_pretrained leaves, and with LoRA layers on all linear ones, in
    fp32.
    """
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


def _quantization(config: Config) -> Any:
    from transformers import BitsAndBytesConfig

    if config.lora.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if config.trainer.bf16_arithmetic else torch.float32,
    )


def _check_kernel(architecture: Any, attention: str) -> None:
    """Some models take certain kernels only, and transformers would put one of those, of a hub, in
    another's place.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known = type(architecture) in MODEL_FOR_CAUSAL_LM_MAPPING
    allowed = (
        getattr(
            MODEL_FOR_CAUSAL_LM_MAPPING[type(architecture)],
            "_compatible_flash_implementations",
            None,
        )
        if known
        else None
    )
    if "flash" in attention and allowed and attention not in allowed:
        raise UserError(
            f"trainer.attn_implementation={attention}: this model only takes {', '.join(allowed)}; use sdpa"
        )

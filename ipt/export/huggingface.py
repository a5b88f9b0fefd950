"""A trained model as a Hugging Face folder: safetensors, tokenizer, and a card that says what it
was trained on.

`python -m ipt.export CHECKPOINT OUTPUT` does the same from a checkpoint, without a GPU and in one
process, however many wrote it. ipt.export.folder checks before the training that everything except
the weights can be written.
"""

import argparse
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from ipt.cli import exit_on_user_error
from ipt.config import Config
from ipt.errors import UserError
from ipt.export.card import model_card
from ipt.export.folder import DTYPES, plain_model
from ipt.models import load_tokenizer
from ipt.places import check_writable
from ipt.training.checkpoint.state import MODEL, trained_tensors
from ipt.training.checkpoint.storage import (
    METRICS,
    newest_checkpoint,
    read_facts,
    read_whole_tensors,
)
from ipt.training.model import build_model

SHARD = "5GB"


def export(model: Any, config: Config, output: Path, sources: Mapping[str, Any]) -> None:
    """Write `output/export`; LoRA layers are merged there and also written as they are to
    `output/adapter`.

    All processes must call it: sharded weights are gathered one by one, and the first process
    writes. Raises UserError if the folder cannot be written. `sources` is the mixture's report of
    what was taken from each source.
    """
    weights = gather_weights(
        model, DTYPES[config.trainer.export_dtype], frozen=bool(config.architecture)
    )
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        try:
            write_model(
                weights,
                config,
                output / "export",
                output / "adapter",
                model_card(config, sources, output / METRICS),
            )
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{output / 'export'} could not be written ({error}): remove the cause and run the "
                "same command again;"
                " it resumes from the newest checkpoint and writes the export"
            ) from error


def export_checkpoint(
    checkpoint: Path, output: Path, dtype: str | None = None, model: str | None = None
) -> None:
    """Write the model of a checkpoint to the folder `output`, and its LoRA layers, if it has any,
    to `output/adapter`.

    `dtype` is fp32 or bf16, by default that of the run's own export; `model` is where the model
    that training started from is now, if it has moved. Raises UserError.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(
            f"{output} is not empty: give a folder that is, or one that is not there yet"
        )
    checkpoint = newest_checkpoint(checkpoint)
    facts = read_facts(checkpoint)
    config = _stored_config(facts["config"])
    config.model = model or config.model
    config.trainer.export_dtype = dtype or config.trainer.export_dtype
    weights = read_whole_tensors(checkpoint, MODEL, DTYPES[config.trainer.export_dtype])
    card = model_card(config, facts["about"]["sources"], checkpoint / METRICS)
    write_model(weights, config, output, output / "adapter", card)


def gather_weights(model: Any, dtype: torch.dtype, frozen: bool) -> dict[str, Tensor]:
    """`trained_tensors` whole and on the host of the first process; elsewhere nothing. Only one at
    a time is whole on a device.
    """
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    weights = {}
    for name, value in trained_tensors(model, frozen).items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if first:
            weights[name] = whole.to(
                "cpu", dtype if whole.is_floating_point() else whole.dtype, copy=True
            )
    return weights


def write_model(
    weights: dict[str, Tensor], config: Config, folder: Path, adapter: Path, card: str
) -> None:
    """Write a Hugging Face folder that is there whole or not at all; `weights` are the trained ones
    by their plain names.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    if config.lora.rank:
        weights = _merged(
            weights, config, adapter if adapter.parent != folder else temporary / adapter.name
        )
    model = plain_model(config)
    model.save_pretrained(temporary, state_dict=weights, max_shard_size=SHARD)
    load_tokenizer(config.model).save_pretrained(temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a Hugging Face folder as the repository OWNER/NAME and return its address. Raises
    UserError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=name, folder_path=folder, commit_message="Upload a model trained with ipt"
            )
        )
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"--push {name}: {str(error).splitlines()[0]}; the model itself is in {folder}"
        ) from None


def _merged(adapter: dict[str, Tensor], config: Config, folder: Path) -> dict[str, Tensor]:
    """Write the LoRA layers to `folder`, and give all weights of the model with them merged in.

    Where the base was quantised, its weights are those that training has seen: quantised and put
    back.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import dequantize_module_weight

    dtype = DTYPES[config.trainer.export_dtype]
    model: Any = build_model(
        config, "eager"
    )  # every class has it, and the attention changes no weights
    unknown = model.load_state_dict(adapter, strict=False).unexpected_keys
    if unknown:
        raise UserError(
            f"model={config.model} has no {unknown[0]}, which was trained: it is not the model "
            "that training started from"
        )
    model.peft_config[
        "default"
    ].base_model_name_or_path = config.model  # not the place where this machine keeps it
    model.save_pretrained(
        folder,
        state_dict={
            name: value.to(dtype) for name, value in get_peft_model_state_dict(model).items()
        },
    )
    weights: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, BaseTunerLayer):
                layer: Any = module
                base = layer.get_base_layer()
                change = layer.get_delta_weight("default")
                weights[f"{name}.weight"] = (
                    dequantize_module_weight(base).to(change.dtype) + change
                ).to(dtype)
                if base.bias is not None:
                    weights[f"{name}.bias"] = base.bias.to(dtype)
        for name, value in model.get_base_model().named_parameters():
            if ".lora_" not in name and ".base_layer." not in name:
                weights[name] = value.detach().to(dtype)
    return weights


def _stored_config(facts: dict[str, Any]) -> Config:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), facts))
    assert isinstance(config, Config)
    return config


# Command
# ----------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ipt.export",
        description="Write the model of a checkpoint as a Hugging Face folder.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a checkpoint, or a run's output folder for its newest one",
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        type=Path,
        help="folder that is written; not there yet, or empty",
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help="of the weights (default: the run's trainer.export_dtype)",
    )
    parser.add_argument(
        "--model", help="where the model that training started from is now, if it has moved"
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="then upload the folder to the hub under this name"
    )
    parser.add_argument(
        "--private",
        action="store_true",
        help="with --push: make a repository that only its owner sees",
    )
    options = parser.parse_args(arguments)
    warnings.filterwarnings(
        "ignore", message="torch.distributed is disabled"
    )  # there is one process, and is meant to be
    with exit_on_user_error(), _readable_weights():
        if options.push:
            _check_push(options.push)
        check_writable("OUTPUT", options.output)
        export_checkpoint(options.checkpoint, options.output, options.dtype, options.model)
        print(f"model: {options.output}")
        if options.push:
            print(f"uploaded: {push(options.output, options.push, options.private)}")


@contextmanager
def _readable_weights() -> Iterator[None]:
    """Turn what transformers and safetensors raise for files of the model that training started
    from into UserErrors.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        raise UserError(" ".join(str(error).split())) from error


def _check_push(name: str) -> None:
    """What can be known to be wrong before anything is written."""
    from huggingface_hub import constants, get_token

    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"--push {name}: must be OWNER/NAME")
    if get_token() is None:
        raise UserError("--push needs a token of the hub's: run `hf auth login`, or set HF_TOKEN")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push: HF_HUB_OFFLINE is set, so the hub must not be reached: unset it")

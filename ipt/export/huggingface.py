"""A trained model as a Hugging Face folder: safetensors, tokenizer, and a model card.

`python -m ipt.export CHECKPOINT OUTPUT` writes one from a checkpoint, without a GPU and in one
process, whatever number of processes wrote the checkpoint. ipt.export.folder checks before training
that everything except the weights can be written.
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
    """Write `output/export`. LoRA layers are merged into it, and also written to `output/adapter`.

    All processes must call it: sharded weights are gathered one by one, and the first process
    writes. `sources` is the mixture's report of what it takes from each source. Raises UserError if
    the folder cannot be written.
    """
    dtype = DTYPES[config.trainer.export_dtype]
    weights = gather_weights(model, dtype, frozen=bool(config.architecture))
    if not _is_first():
        return
    card = model_card(config, sources, output / METRICS)
    try:
        write_model(weights, config, output / "export", output / "adapter", card)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{output / 'export'} could not be written ({error}): remove the cause and run the "
            "same command again, which only writes the export"
        ) from error


def export_checkpoint(
    checkpoint: Path, output: Path, dtype: str | None = None, model: str | None = None
) -> None:
    """Write the model of a checkpoint to the folder `output`, and its LoRA layers, if any, to
    `output/adapter`.

    `dtype` is a key of DTYPES, by default the run's `trainer.export_dtype`. `model` is the new
    location of the base model if it has moved. Raises UserError.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty: choose an empty or a new folder")
    checkpoint = newest_checkpoint(checkpoint)
    facts = read_facts(checkpoint)
    config = _stored_config(facts["config"])
    config.model = model or config.model
    config.trainer.export_dtype = dtype or config.trainer.export_dtype
    weights = read_whole_tensors(checkpoint, MODEL, DTYPES[config.trainer.export_dtype])
    card = model_card(config, facts["about"]["sources"], checkpoint / METRICS)
    write_model(weights, config, output, output / "adapter", card)


def gather_weights(model: Any, dtype: torch.dtype, frozen: bool) -> dict[str, Tensor]:
    """The whole `trained_tensors` on the host of the first process; nothing in the others. A device
    holds one whole tensor at a time.
    """
    weights = {}
    for name, value in trained_tensors(model, frozen).items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if _is_first():
            kind = dtype if whole.is_floating_point() else whole.dtype
            weights[name] = whole.to("cpu", kind, copy=True)
    return weights


def _is_first() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def write_model(
    weights: dict[str, Tensor], config: Config, folder: Path, adapter: Path, card: str
) -> None:
    """Write a Hugging Face folder, complete or not at all. `weights` are the trained weights by
    their plain names.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    if config.lora.rank:
        if adapter.parent == folder:
            adapter = temporary / adapter.name
        weights = _merged(weights, config, adapter)
    model = plain_model(config)
    model.save_pretrained(temporary, state_dict=weights, max_shard_size=SHARD)
    load_tokenizer(config.model).save_pretrained(temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a Hugging Face folder as the repository OWNER/NAME and return its URL. Raises
    UserError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        message = "Upload a model trained with ipt"
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message))
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"--push {name}: {str(error).splitlines()[0]}; the model was written to {folder}"
        ) from None


def _merged(adapter: dict[str, Tensor], config: Config, folder: Path) -> dict[str, Tensor]:
    """Write the LoRA layers to `folder`; return all weights of the model with the layers merged.

    The weights of a quantised base are those that training used, quantised and dequantised.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import dequantize_module_weight

    dtype = DTYPES[config.trainer.export_dtype]
    model: Any = build_model(config, "eager")  # which every class supports
    unknown = model.load_state_dict(adapter, strict=False).unexpected_keys
    if unknown:
        raise UserError(
            f"model={config.model} has no weight {unknown[0]}, which was trained: give the model "
            "that training started from"
        )
    model.peft_config["default"].base_model_name_or_path = config.model  # not a local cache path
    state = get_peft_model_state_dict(model)
    model.save_pretrained(
        folder, state_dict={name: value.to(dtype) for name, value in state.items()}
    )
    weights: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, BaseTunerLayer):
                layer: Any = module
                base = layer.get_base_layer()
                delta = layer.get_delta_weight("default")
                merged = dequantize_module_weight(base).to(delta.dtype) + delta
                weights[f"{name}.weight"] = merged.to(dtype)
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
        help="a checkpoint, or the output folder of a run: its newest checkpoint",
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        type=Path,
        help="the folder to write: new or empty",
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help="dtype of the weights (default: the run's trainer.export_dtype)",
    )
    parser.add_argument(
        "--model", help="new location of the base model, if it has moved since training"
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload the folder to the hub under this name"
    )
    parser.add_argument(
        "--private",
        action="store_true",
        help="with --push: create a private repository",
    )
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process
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
    """Turn errors of transformers and safetensors about files of the base model into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        raise UserError(" ".join(str(error).split())) from error


def _check_push(name: str) -> None:
    """Raise UserError for problems that are known before anything is written."""
    from huggingface_hub import constants, get_token

    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"--push {name}: must be OWNER/NAME")
    if get_token() is None:
        raise UserError("--push needs a token of the hub: run `hf auth login`, or set HF_TOKEN")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push: HF_HUB_OFFLINE is set: unset it to upload")

"""The parts of an export that come from the base model: config, generation config, tokenizer."""

from tempfile import TemporaryDirectory
from typing import Any

import torch

from ipt.config import Config
from ipt.models import load_tokenizer, resolve_model
from ipt.models.checks import quiet, read_config, readable
from ipt.models.generation_config import load_generation_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_export(config: Config) -> None:
    """Write everything of an export except weights and card to a temporary folder.

    Raises UserError if config, generation config, tokenizer or chat template could not be written
    after training.
    """
    what = f"model={config.model}"
    with TemporaryDirectory(prefix="ipt-export-") as folder:
        with readable(what, "an export could not write the model's config"):
            model = plain_model(config)
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            read_config(folder)
        with readable(what, "an export could not write the tokenizer"):
            load_tokenizer(config.model).save_pretrained(folder)


def plain_model(config: Config) -> Any:
    """The Hugging Face model of the run on the meta device, whose `save_pretrained` writes the
    folder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    start = None if config.architecture else resolve_model(config.model)
    facts = read_config(start) if start else AutoConfig.for_model(**config.architecture)
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(facts, dtype=DTYPES[config.trainer.export_dtype])
    generation = load_generation_config(start) if start else None
    if generation is not None:
        model.generation_config = generation
    return model

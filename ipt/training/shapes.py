"""Models without weights: on the meta device, from a folder's config.json or from what is known of
well-known models.
"""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ipt.config import Config
from ipt.errors import UserError
from ipt.training.model import model_on_meta

KNOWN = Path(__file__).with_name("architectures.yaml")


def meta_model(config: Config, attention: str = "eager") -> Any:
    """The model that a run trains, on the meta device in the type of `trainer.precision`, with its
    LoRA layers.

    Reads no weights and reaches no hub. Matrices that `lora.quantize` packs are there as they were.

    Raises what `model_config` raises.
    """
    return model_on_meta(model_config(config), config, attention)


def model_config(config: Config) -> Any:
    """The transformers config of the model that a run trains: `architecture`, a folder's, a known
    or a cached one.

    Raises UserError for an architecture that transformers does not know, and for a hub name of
    which nothing is known here.
    """
    from transformers import AutoConfig

    facts = config.architecture or (
        None if Path(config.model).exists() else known_architectures().get(config.model)
    )
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
            f"model={config.model}: a dry run reaches no hub, and this model's shape is not known "
            "here: download it and give its folder"
        ) from None


@cache
def known_architectures() -> dict[str, dict[str, Any]]:
    """Hub and embedded names -> keyword arguments of a transformers config."""
    return yaml.safe_load(KNOWN.read_text(encoding="utf-8"))

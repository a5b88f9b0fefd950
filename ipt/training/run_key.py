"""What makes two training runs the same run. Imports no torch, since a stage's key is made of
it.
"""

from collections.abc import Mapping
from typing import Any

from ipt.config import Config, TrainerConfig, key_settings
from ipt.files import hash_json
from ipt.models import model_identity


def trainer_settings(config: TrainerConfig) -> dict[str, Any]:
    """The trainer's settings that the result depends on, with the global batch size."""
    return {**key_settings(config), "global_batch": config.global_batch_size}


def run_key(config: Config, sources: Mapping[str, Any]) -> str:
    """The same for runs that may go on from each other's checkpoints. `sources` is the mixture's
    report of what it takes from each.
    """
    mixture = config.mixture
    return hash_json(
        {
            "seed": config.seed,
            "model": config.architecture or model_identity(config.model),
            "trainer": trainer_settings(config.trainer),
            "optimizer": vars(config.optimizer),
            "lr_scheduler": vars(config.lr_scheduler),
            "lora": vars(config.lora),
            "mixture": [mixture.seq_len, mixture.packing, mixture.intra_document_mask],
            "sources": sources,
        }
    )

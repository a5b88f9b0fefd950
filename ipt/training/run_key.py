"""Which settings make two training runs the same run. Does not import torch, because the key of the
training stage depends on it.
"""

from collections.abc import Mapping
from typing import Any

from ipt.config import Config, TrainerConfig
from ipt.files import hash_json
from ipt.models import model_identity

# How the sequences of a step are distributed. Only their number matters (`global_batch_size`).
DISTRIBUTION = {
    "micro_batch_size",
    "accumulate_grad_batches",
    "devices",
    "num_nodes",
    "replicas",
}
NO_EFFECT = {"num_workers", "log_every_n_steps", "profiler"}


def trainer_settings(config: TrainerConfig) -> dict[str, Any]:
    """The trainer's settings that affect the result. The others may change when a run resumes."""
    settings = {}
    for name, value in vars(config).items():
        if name not in DISTRIBUTION | NO_EFFECT:
            settings[name] = value
    return {**settings, "global_batch": config.global_batch_size}


def run_key(config: Config, sources: Mapping[str, Any]) -> str:
    """Equal for runs that may resume from each other's checkpoints. `sources` is the mixture's
    report of what it takes from each source.
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

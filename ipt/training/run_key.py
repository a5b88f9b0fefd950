"""What makes two training runs the same run. Imports no torch, since a stage's key is made of it."""

from collections.abc import Mapping
from typing import Any

from ipt.config import Config, TrainerConfig
from ipt.files import hash_json
from ipt.models import model_identity

SPREAD = (
    "micro_batch_size",
    "accumulate_grad_batches",
    "devices",
    "num_nodes",
    "replicas",
)  # how the sequences of a step are spread
BESIDE = (  # what goes on beside the training
    "num_workers",
    "log_every_n_steps",
    "profiler",
)


def global_batch(config: TrainerConfig) -> int:
    """Sequences of one optimizer step over all devices."""
    return (
        config.micro_batch_size * config.accumulate_grad_batches * config.devices * config.num_nodes
    )


def trainer_settings(config: TrainerConfig) -> dict[str, Any]:
    """What of the trainer's settings decides about the result: a run goes on with others of the
    rest, as with more devices.
    """
    settings = {
        name: value for name, value in vars(config).items() if name not in (*SPREAD, *BESIDE)
    }
    return {**settings, "global_batch": global_batch(config)}


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

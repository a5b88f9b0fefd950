"""What processes of tests need, imported once, by the server that forks them (tests/processes.py). Starts no thread."""

import gc

import lightning.pytorch.strategies  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import torch.distributed.tensor.debug  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import ipt.evaluation.during_training
import ipt.evaluation.run
import ipt.experiment.dashboard
import ipt.experiment.evaluation_log
import ipt.experiment.lineage
import ipt.experiment.pipeline
import ipt.training.run  # noqa: F401

gc.collect()
gc.freeze()  # pages that no collection writes to stay shared

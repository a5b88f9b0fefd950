"""What processes of tests need, imported once, by the server that forks them (tests/processes.py).
Starts no Python thread.
"""

import gc
from importlib import import_module

MODULES = (
    "ipt.training.train",
    "ipt.pipeline.stages",
    "ipt.pipeline.tracking.lineage",
    "ipt.pipeline.tracking.evaluation_log",
    "ipt.pipeline.tracking.dashboard",
    "ipt.evaluation.run",
    "ipt.evaluation.callback",
    "lightning.pytorch.strategies",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "transformers.models.llama.modeling_llama",
)

for name in MODULES:
    import_module(name)
gc.collect()
gc.freeze()  # so that no collection writes to the pages that the processes share

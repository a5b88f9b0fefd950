"""Scores of a model during its training."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ipt.config import Config
from ipt.distributed import rank
from ipt.errors import UserError
from ipt.evaluation.results import RESULTS, SCORES
from ipt.evaluation.run import check_tasks, read_work, results_of, score_tasks
from ipt.evaluation.task import Task
from ipt.files import write_json

if TYPE_CHECKING:
    from ipt.evaluation.backends.huggingface import Scorer
    from ipt.training.module import PretrainingModule

log = logging.getLogger(__name__)


class DuringTraining:
    """Scores tasks every `evaluation.during_training.every_n_train_steps` optimizer steps. All
    processes call it.

    Each time writes a finished evaluation to `output/scores/step-00000400`. The model is scored
    without dropout, with the attention of inference, in the precision of the forward pass in
    training, and uncompiled. Training continues bit for bit as without scores.
    """

    def __init__(self, config: Config, corpus: Path | None, output: Path) -> None:
        """Reads the items. Raises UserError or MissingFileError for faulty ones."""
        self.config, self.output = config, output
        limit = config.evaluation.during_training.limit
        self.work = read_work(scored_tasks(config), limit, corpus, config.data_dir)
        self._scorer: Scorer | None = None  # created with the first scores: it probes the model

    def __call__(self, module: "PretrainingModule", step: int) -> dict[str, float | None]:
        """`eval/TASK/METRIC` -> value (None: not finite), and `eval_seconds`; {} at other steps."""
        steps = self.config.evaluation.during_training.every_n_train_steps
        if steps is None or (step % steps and step != self.config.trainer.max_steps):
            return {}
        started = time.monotonic()
        folder = self.output / SCORES / f"step-{step:08d}"
        predictions = {}
        with as_in_inference(module):
            for task, rows, _ in score_tasks(self.work, self._ready(module), folder):
                predictions[task.name] = rows
        results = results_of(self.work, predictions)
        seconds = time.monotonic() - started
        if rank() == 0:
            write_json(folder / RESULTS, results)
            items = sum(len(one.items) for one in self.work)
            log.info(
                f"step {step}: {items} items of {len(results)} tasks scored in {seconds:.1f} s",
                extra={"style": "dim"},
            )
        figures: dict[str, float | None] = {"eval_seconds": seconds}
        for task_name, metrics in results.items():
            for name, entry in metrics.items():
                figures[f"eval/{task_name}/{name}"] = entry["value"]
        return figures

    def _ready(self, module: "PretrainingModule") -> "Scorer":
        from ipt.evaluation.backends.huggingface import Scorer
        from ipt.models import load_tokenizer
        from ipt.training.model import base_model

        if self._scorer is None:
            config = replace(self.config.evaluation, backend="hf", quantize=None, device="auto")
            tokenizer = load_tokenizer(self.config.model)
            self._scorer = Scorer(base_model(module.model), tokenizer, config)
        return self._scorer


def scored_tasks(config: Config) -> list[str]:
    return config.evaluation.during_training.tasks or config.tasks


def check_during_training(config: Config) -> list[Task]:
    """The tasks to score during training, checked by ipt.evaluation.run.check_tasks."""
    during = config.evaluation.during_training
    if during.every_n_train_steps is None:
        return []
    for name in ("every_n_train_steps", "limit"):
        value = getattr(during, name)
        if value is not None and value < 1:
            raise UserError(
                f"evaluation.during_training.{name} is {value}, expected 1 or more, or null"
            )
    if not scored_tasks(config):
        raise UserError("evaluation.during_training.tasks is empty: name tasks there or in `tasks`")
    return check_tasks(config.evaluation, scored_tasks(config), data_dir=config.data_dir)


@contextmanager
def as_in_inference(module: "PretrainingModule") -> Iterator[None]:
    """Run the model in training as an exported one: evaluation mode, inference attention, no
    compiled blocks. Restores all of these and the random states.

    The blocks of a sharded model are gathered one by one, as in training. The parameters outside of
    blocks stay gathered, so that decoder and projection can be called separately.
    """
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedModel

    from ipt.models.small_copy import plain_attention
    from ipt.training.checkpoint.state import random_state, set_random_state
    from ipt.training.model import base_model, evaluation_mode, transformer_blocks

    assert module.loss is not None
    model, root = base_model(module.model), module.loss
    random, modes = random_state(), {part: part.training for part in root.modules()}
    kernels = [
        (part.config, part.config._attn_implementation)
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
    ]
    forwards = {
        block: vars(block).pop("forward")
        for block in transformer_blocks(module.model)
        if "forward" in vars(block)
    }
    evaluation_mode(root)
    # supports plain rows and tree masks
    model.config._attn_implementation = plain_attention(model.config)
    if isinstance(root, FSDPModule):
        root.unshard()
    try:
        yield
    finally:
        if isinstance(root, FSDPModule):
            # state of forward passes without backward ones; gradients stay
            root.reset_iter_state()
        for block, forward in forwards.items():
            block.forward = forward
        for config, kernel in kernels:
            config._attn_implementation = kernel
        for part, mode in modes.items():
            part.training = mode
        set_random_state(random)

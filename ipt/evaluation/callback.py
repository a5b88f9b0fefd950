"""Scores of a model while it is trained: on the live model, which goes on as if nothing had
happened.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ipt.config import Config
from ipt.console import console
from ipt.distributed import rank
from ipt.errors import UserError
from ipt.evaluation.results import RESULTS, SCORES
from ipt.evaluation.run import check_tasks, read_work, results_of, score_tasks
from ipt.evaluation.task import Task
from ipt.files import write_json

if TYPE_CHECKING:
    from ipt.evaluation.backends.huggingface import Scorer
    from ipt.training.module import PretrainingModule


class DuringTraining:
    """What a training calls at the end of each optimizer step, in all its processes: scores tasks
    where that is due.

    Each time leaves a finished evaluation, in `output/scores/step-00000400`. Models are scored on
    one process and sharded alike, without dropout, by the attention that inference uses, and in the
    arithmetic of the forward pass in training; nothing is compiled.
    """

    def __init__(self, config: Config, corpus: Path | None, output: Path) -> None:
        """Reads the items: what is wrong with them raises UserError or MissingFileError."""
        self.config, self.output = config, output
        self.work = read_work(
            scored_tasks(config), config.evaluation.during_training.limit, corpus, config.data_dir
        )
        self._scorer: Scorer | None = None  # made with the first scores: it tries out the model

    def __call__(self, module: "PretrainingModule", step: int) -> dict[str, float | None]:
        """`eval/TASK/METRIC` -> value (None: not finite), and `eval_seconds`; nothing where the
        step is not due.
        """
        steps = self.config.evaluation.during_training.every_n_train_steps
        if steps is None or (step % steps and step != self.config.trainer.max_steps):
            return {}
        started = time.monotonic()
        folder = self.output / SCORES / f"step-{step:08d}"
        with as_in_inference(module), _bars_on_terminals():
            predictions = {
                task.name: rows
                for task, rows, _ in score_tasks(self.work, self._ready(module), folder)
            }
        results = results_of(self.work, predictions)
        if rank() == 0:
            write_json(folder / RESULTS, results)
            items = sum(len(one.items) for one in self.work)
            console.print(
                f"[dim]step {step}: {items} items of {len(results)} tasks scored in "
                f"{time.monotonic() - started:.1f} s"
            )
        figures = {
            f"eval/{task}/{name}": entry["value"]
            for task, metrics in results.items()
            for name, entry in metrics.items()
        }
        return {**figures, "eval_seconds": time.monotonic() - started}

    def _ready(self, module: "PretrainingModule") -> "Scorer":
        from ipt.evaluation.backends.huggingface import Scorer
        from ipt.models import load_tokenizer
        from ipt.training.model import base_model

        if self._scorer is None:
            config = replace(self.config.evaluation, backend="hf", quantize=None, device="auto")
            self._scorer = Scorer(
                base_model(module.model), load_tokenizer(self.config.model), config
            )
        return self._scorer


def scored_tasks(config: Config) -> list[str]:
    return config.evaluation.during_training.tasks or config.tasks


def check_during_training(config: Config) -> list[Task]:
    """The tasks that are scored during training, checked as ipt.evaluation.run.check_tasks does;
    none if that is not asked for.
    """
    during = config.evaluation.during_training
    if during.every_n_train_steps is None:
        return []
    for name, value in {"steps": during.every_n_train_steps, "limit": during.limit}.items():
        if value is not None and value < 1:
            raise UserError(
                f"evaluation.during_training.{name} is {value}, expected 1 or more, or null"
            )
    if not scored_tasks(config):
        raise UserError(
            "evaluation.during_training.tasks=[]: name the tasks to score while training, or name "
            "some in tasks"
        )
    return check_tasks(config.evaluation, scored_tasks(config), data_dir=config.data_dir)


@contextmanager
def as_in_inference(module: "PretrainingModule") -> Iterator[None]:
    """Let the model of a training answer as an exported one does, and put everything back: modes,
    kernels, compiled blocks, random states.

    A sharded model's blocks are gathered one by one as in training; what lies outside of them stays
    whole meanwhile, so that decoder and projection can be called by themselves.
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
    model.config._attn_implementation = plain_attention(
        model.config
    )  # takes plain rows and masks of trees
    if isinstance(root, FSDPModule):
        root.unshard()
    try:
        yield
    finally:
        if isinstance(root, FSDPModule):
            # what forward passes without backward ones leave behind; gradients are not of it
            root.reset_iter_state()
        for block, forward in forwards.items():
            block.forward = forward
        for config, kernel in kernels:
            config._attn_implementation = kernel
        for part, mode in modes.items():
            part.training = mode
        set_random_state(random)


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Elsewhere each bar of each task would leave a line, again and again."""
    console.quiet = not console.is_terminal
    try:
        yield
    finally:
        console.quiet = False

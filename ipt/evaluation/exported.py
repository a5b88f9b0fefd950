"""The class of exported tasks in lm-evaluation-harness: its model answers, and our code scores the
answers.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task as HarnessTask
from lm_eval.config.task import TaskConfig
from lm_eval.filters import build_filter_ensemble
from numpy.typing import NDArray

from ipt.errors import UserError
from ipt.evaluation.backends import encoding
from ipt.evaluation.backends.base import Generation
from ipt.evaluation.backends.batching import UNLIMITED
from ipt.evaluation.backends.encoding import Encoder, start_tokens
from ipt.evaluation.export import ITEMS
from ipt.evaluation.task import Task
from ipt.evaluation.task_types.registry import kind_of
from ipt.models import load_tokenizer

# model arguments of the harness that name the tokenizer
MODEL = ("tokenizer", "pretrained", "model")
OUTPUT_TYPES = {
    "choice": "loglikelihood",
    "generation": "generate_until",
    "perplexity": "loglikelihood",
}
LOWER_IS_BETTER = ("nll", "perplexity", "bits_per_byte")


class ExportedTask(HarnessTask):
    """A task with its items in a .jsonl file next to the YAML file."""

    VERSION = 1

    def __init__(self, config: dict[str, Any]) -> None:
        metadata = config["metadata"]
        model = next((metadata[name] for name in MODEL if metadata.get(name)), None)
        if model is None:
            raise UserError(
                f"task {config['task']} needs the model's tokenizer: give --model_args "
                "pretrained=MODEL, or tokenizer=MODEL"
            )
        self.task = Task.from_definition(metadata["definition"])
        self.kind = kind_of(self.task)
        lines = (
            Path(metadata["config_source"])
            .with_suffix(".jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        )
        self.items = [ITEMS[self.task.kind](**json.loads(line)) for line in lines]
        tokenizer = load_tokenizer(model)
        self.encoder = Encoder(tokenizer, start_tokens(tokenizer, None), UNLIMITED)
        # The harness always puts BOS or EOS before a text without context.
        self.prefix = (
            tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        )
        self.OUTPUT_TYPE = OUTPUT_TYPES[self.task.kind]
        self._config = TaskConfig(
            task=config["task"], num_fewshot=0, metadata=metadata, output_type=self.OUTPUT_TYPE
        )
        if self.task.kind == "generation":
            self._config.generation_kwargs = {
                "until": self.task.stop,
                "max_gen_toks": self.task.max_new_tokens,
                "do_sample": False,
            }
        self._filters = [build_filter_ensemble("none", [["take_first", None]])]
        blank = "" if self.task.kind == "generation" else (0.0, False)
        predictions = [
            self._prediction(item, [blank] * len(self._requests(item))) for item in self.items
        ]
        self.names = list(self.kind.metrics(self.task, predictions))

    # The interface of the harness

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[Any]:
        return [item._asdict() for item in self.items]

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return str(doc.get("prompt", ""))

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        item = self._item(doc)
        return str(
            item.options[item.gold]
            if self.task.kind == "choice"
            else doc.get("answer", doc.get("text"))
        )

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **_: Any) -> str:
        """The prompt, which contains the demonstrations."""
        return self.doc_to_text(doc)

    def construct_requests(
        self, doc: dict[str, Any], ctx: str, metadata: tuple[Any, ...], **_: Any
    ) -> list[Instance]:
        requests = enumerate(self._requests(self._item(doc)))
        return [
            Instance(kind, doc, arguments, index, metadata=metadata)
            for index, (kind, arguments) in requests
        ]

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """The prediction for every metric, from which `aggregation` computes the value."""
        return dict.fromkeys(self.names, self._prediction(self._item(doc), results))

    def aggregation(self) -> dict[str, Callable[[list[dict[str, Any]]], float]]:
        return {name: partial(self._value, name) for name in self.names}

    def higher_is_better(self) -> dict[str, bool]:
        return {name: name not in LOWER_IS_BETTER for name in self.names}

    # From an item to requests, and from answers to a prediction

    def _item(self, doc: dict[str, Any]) -> Any:
        return ITEMS[self.task.kind](**doc)

    def _requests(self, item: Any) -> list[tuple[Any, tuple[Any, ...]]]:
        if self.task.kind == "generation":
            return [("generate_until", (item.prompt, dict(self.config.generation_kwargs)))]
        if self.task.kind == "perplexity":
            parts = (item.text[: item.begin], item.scored)
            return (
                [("loglikelihood", parts)]
                if item.begin
                else [("loglikelihood_rolling", (item.text,))]
            )
        prompts = repeat(item.prompts) if isinstance(item.prompts, str) else item.prompts
        alone = (
            []
            if item.unconditional is None
            else [(item.unconditional, option) for option in item.options]
        )
        return [
            ("loglikelihood", pair) for pair in [*zip(prompts, item.options, strict=False), *alone]
        ]

    def _prediction(self, item: Any, results: Sequence[Any]) -> dict[str, Any]:
        whole_text = self.task.kind == "perplexity" and not item.begin
        encoder = replace(self.encoder, start=[self.prefix]) if whole_text else self.encoder
        (prediction,) = self.kind.score(self.task, [item], _Answers(encoder, results, item))
        return prediction

    def _value(self, name: str, predictions: list[dict[str, Any]]) -> float:
        return self.kind.metrics(self.task, predictions)[name].value


class _Answers:
    """A backend with the answers of the harness's model to the requests for one item."""

    def __init__(self, encoder: Encoder, results: Sequence[Any], item: Any) -> None:
        self.encoder, self._results, self._item = encoder, results, item

    def option_rows(self, question: encoding.Question) -> list[encoding.EncodedRow]:
        return encoding.plain_rows(question)

    def logprobs(
        self, rows: Sequence[encoding.EncodedRow], description: str
    ) -> list[NDArray[np.float64]]:
        """The harness gives a sum for each row, which is divided equally among its tokens."""
        return [
            np.full(len(row.targets), total / len(row.targets))
            for row, total in zip(rows, self._sums(), strict=True)
        ]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        stop: Sequence[str],
        max_new_tokens: int,
        description: str,
    ) -> list[Generation]:
        (answer,) = self._results
        if isinstance(answer, str):
            ids = self.encoder.tokenizer(answer, add_special_tokens=False)["input_ids"]
            return [Generation(answer, len(ids), "stop", tuple(ids))] * len(prompts)
        if not answer[1]:
            return [Generation("", 0, "stop")] * len(prompts)
        context, text = self._item.text[: self._item.begin], self._item.scored
        ids = self.encoder.question(context, [text]).options[0]
        return [Generation(text, len(ids), "stop", tuple(ids))] * len(prompts)

    def _sums(self) -> Iterator[float]:
        for answer in self._results:
            yield float(answer[0] if isinstance(answer, (tuple, list)) else answer)

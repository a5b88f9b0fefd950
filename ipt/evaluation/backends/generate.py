"""Greedy generation with a Hugging Face model: a sequence that ends leaves the batch."""

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from ipt.console import progress
from ipt.distributed import gathered, place
from ipt.errors import UserError
from ipt.evaluation.backends.base import Generation, cut, end_tokens, generated_text
from ipt.evaluation.backends.batching import batches, full_attention_length
from ipt.evaluation.backends.encoding import common_prefix
from ipt.training.model import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# minimum length of a common prefix of a batch that is computed only once
SHARED = 64


class Greedy:
    """Greedy continuation of prompts in the model's dtype.

    A sequence ends at an end token of the model or tokenizer, at a string in `stop`, or after
    `max_new_tokens`.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        stop: Sequence[str],
        max_new_tokens: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._stop = stop
        self._max_new_tokens = max_new_tokens
        inner = base_model(model)
        self._device = inner.get_input_embeddings().weight.device
        self._end = end_tokens(inner.generation_config, tokenizer)
        known = inspect.signature(inner.forward).parameters
        self._takes = frozenset(known)
        attends = "past_key_values" in known
        self._cache_name = "past_key_values" if attends else "cache_params"
        # length up to which all layers attend to the whole text
        self._attends = full_attention_length(inner) if attends else 0

    def run(
        self, prompts: Sequence[Sequence[int]], batch_tokens: int, description: str
    ) -> list[Generation]:
        """The continuation of each prompt, in batches of at most `batch_tokens` with new tokens.

        Processes divide the batches. All call the model equally often, which a sharded model needs.
        """
        found: dict[int, Generation] = {}
        rank, size = place()
        work = list(self._batches(prompts, batch_tokens))
        with progress(description, len(prompts), hidden=rank > 0) as bar:
            for first in range(0, len(work), size):
                mine = work[first + rank] if first + rank < len(work) else []
                for number, generation in self._continue([list(prompts[index]) for index in mine]):
                    found[mine[number]] = generation
                    bar.advance(size)
        found = gathered(found)
        return [found[index] for index in range(len(prompts))]

    def _batches(self, prompts: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
        """Without attention padding cannot be masked: prompts of a batch have equal lengths."""
        groups: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(0 if self._attends else len(prompt), []).append(index)
        for group in groups.values():
            for batch in batches(
                [len(prompts[index]) + self._max_new_tokens for index in group], batch_tokens
            ):
                yield [group[place] for place in batch]

    @torch.no_grad()  # not inference_mode: what a live model gathers must stay fit for training
    def _continue(self, prompts: list[list[int]]) -> Iterator[tuple[int, Generation]]:
        """The indices of prompts and their continuations, in the order of their ends. Padding is
        between the common prefix and the rest of a prompt; it is masked and has no positions.
        """
        cache, shared = self._shared_beginning(prompts)
        width = max(map(len, prompts), default=0)
        padding = [width - len(prompt) for prompt in prompts]
        ids_BT = self._tensor(
            [[0] * pad + prompt[shared:] for pad, prompt in zip(padding, prompts, strict=True)]
        )
        mask_BT = self._tensor(
            [[1] * shared + [0] * pad + [1] * (width - shared - pad) for pad in padding]
        )
        live, new = list(range(len(prompts))), [list[int]() for _ in prompts]
        while self._anywhere(bool(live)):
            if not live:
                self._idle()
                continue
            token_B, cache = self._step(ids_BT, mask_BT, cache)
            going = []
            for row, (number, token) in enumerate(zip(live, token_B.tolist(), strict=True)):
                new[number].append(token)
                generation = self._ended(new[number])
                if generation is None:
                    going.append(row)
                else:
                    yield number, generation
            if going and len(going) < len(live):
                rows = torch.tensor(going, device=token_B.device)
                token_B, mask_BT = token_B[rows], mask_BT[rows]
                cache.reorder_cache(rows)
            live = [live[row] for row in going]
            ids_BT = token_B[:, None]
            mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)

    def _shared_beginning(self, prompts: list[list[int]]) -> tuple[Any, int]:
        """Keys and values of the common prefix of all prompts, which excludes their last tokens,
        and its length.
        """
        shared = common_prefix([prompt[:-1] for prompt in prompts])
        pays = len(prompts) > 1 and shared >= SHARED and self._attends >= max(map(len, prompts))
        if not pays:
            if self._anywhere(False):
                self._idle()
            return None, 0
        self._anywhere(True)
        ids_BT = self._tensor([prompts[0][:shared]])
        _, cache = self._step(ids_BT, torch.ones_like(ids_BT), None)
        cache.batch_repeat_interleave(len(prompts))
        return cache, shared

    def _anywhere(self, mine: bool) -> bool:
        """Whether `mine` is true in any process."""
        if place()[1] == 1:
            return mine
        flag = torch.tensor(int(mine), device=self._device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def _idle(self) -> None:
        """Call the model because other processes do."""
        self._model(input_ids=self._tensor([[0]]), use_cache=False)

    def _step(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """The most likely next token of each row, and the updated cache."""
        position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        inputs = {
            "input_ids": ids_BT,
            "position_ids": position_BT,
            "logits_to_keep": 1,
            "use_cache": True,
        }
        # Other layers have no padding, and some expect a mask of their input only.
        if self._attends:
            inputs["attention_mask"] = mask_BT
        known = {name: value for name, value in inputs.items() if name in self._takes}
        outputs = self._model(**known, **{self._cache_name: cache})
        best_B, token_B = outputs.logits[:, -1].max(-1)
        if not bool(best_B.isfinite().all()):
            raise UserError(
                "generation: the model's logits are not finite: its weights are broken, or its "
                "training diverged"
            )
        return token_B, outputs[self._cache_name]

    def _ended(self, ids: list[int]) -> Generation | None:
        """The generation, if it has ended."""
        if ids[-1] in self._end:
            return Generation(self._text(ids[:-1]), len(ids), "eos", tuple(ids))
        # `stop` may contain special tokens
        text = str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if any(mark in text for mark in self._stop):
            return Generation(cut(self._text(ids), self._stop), len(ids), "stop", tuple(ids))
        if len(ids) < self._max_new_tokens:
            return None
        return Generation(self._text(ids), len(ids), "length", tuple(ids))

    def _text(self, ids: list[int]) -> str:
        return generated_text(self._tokenizer, ids)

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self._device)

"""Greedy generation with a Hugging Face model: each sequence stops on its own, and then leaves the
batch.
"""

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

# tokens: a beginning that all prompts of a batch share is computed once if it is at least so long
SHARED = 64


class Greedy:
    """Continues prompts with the likeliest token at each step, in the model's dtype.

    A sequence ends at a token that the model or its tokenizer names as an end, when its text
    contains one of `stop`, or after `max_new_tokens`.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        stop: Sequence[str],
        max_new_tokens: int,
    ) -> None:
        self._model, self._tokenizer, self._stop, self._max_new_tokens = (
            model,
            tokenizer,
            stop,
            max_new_tokens,
        )
        inner = base_model(model)
        self._device = inner.get_input_embeddings().weight.device
        self._end = end_tokens(inner.generation_config, tokenizer)
        known = inspect.signature(inner.forward).parameters
        self._takes = frozenset(known)
        attends = "past_key_values" in known
        self._cache_name = "past_key_values" if attends else "cache_params"
        # texts of at most so many tokens are seen whole by every layer
        self._attends = full_attention_length(inner) if attends else 0

    def run(
        self, prompts: Sequence[Sequence[int]], batch_tokens: int, description: str
    ) -> list[Generation]:
        """The continuation of each prompt; batches of similar length have at most `batch_tokens`
        with what is generated.

        Processes that work together divide the batches, and each calls the model as often as every
        other, as a sharded one needs.
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
        """Only layers that attend can leave out padding; for others the prompts of a batch have one
        length.
        """
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
        """The number of a prompt and its continuation, in the order in which they end. Padding goes
        to the left, between what all prompts share and the rest, where no token sees it and no
        position counts it.
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
        """Keys and values of what all prompts begin with, computed once, and how many tokens that
        is; of each prompt one is left.
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
        """Whether it is so in any of the processes that work together."""
        if place()[1] == 1:
            return mine
        flag = torch.tensor(int(mine), device=self._device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def _idle(self) -> None:
        """A call of the model beside those of the other processes."""
        self._model(input_ids=self._tensor([[0]]), use_cache=False)

    def _step(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """The likeliest next token of each row, and the cache with these tokens."""
        position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        inputs = {
            "input_ids": ids_BT,
            "position_ids": position_BT,
            "logits_to_keep": 1,
            "use_cache": True,
        }
        # layers of other kinds have no padding to leave out, and some take the mask for that of
        # their input alone
        if self._attends:
            inputs["attention_mask"] = mask_BT
        known = {name: value for name, value in inputs.items() if name in self._takes}
        outputs = self._model(**known, **{self._cache_name: cache})
        best_B, token_B = outputs.logits[:, -1].max(-1)
        if not bool(best_B.isfinite().all()):
            raise UserError(
                "generation: the model's logits are not finite: its weights are broken, or "
                "training diverged"
            )
        return token_B, outputs[self._cache_name]

    def _ended(self, ids: list[int]) -> Generation | None:
        """What was generated, if that is all."""
        if ids[-1] in self._end:
            return Generation(self._text(ids[:-1]), len(ids), "eos", tuple(ids))
        # special tokens may be asked for in `stop`
        text = str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if any(mark in text for mark in self._stop):
            return Generation(cut(self._text(ids), self._stop), len(ids), "stop", tuple(ids))
        return (
            Generation(self._text(ids), len(ids), "length", tuple(ids))
            if len(ids) == self._max_new_tokens
            else None
        )

    def _text(self, ids: list[int]) -> str:
        return generated_text(self._tokenizer, ids)

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self._device)

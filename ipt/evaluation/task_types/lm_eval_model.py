"""Our backend as a model of lm-evaluation-harness."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ipt.chat_templates import render
from ipt.errors import UserError
from ipt.evaluation.backends.encoding import Question, common_prefix, plain_rows

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from ipt.evaluation.backends.base import Backend

Pair = tuple[list[int], list[int]]  # tokens of a context and of its scored continuation


class BackendLM(LM):
    """Gives the same answers as the harness's Hugging Face model, with one forward pass for all
    continuations of a document.

    Whether a continuation is greedy is only determined for the tasks in `greedy`: it takes a
    generation, and few metrics need it. `cut` collects the contexts that lost their beginning.
    """

    def __init__(self, backend: "Backend", description: str, greedy: Collection[str]) -> None:
        super().__init__()
        self.backend, self.description, self.greedy = backend, description, greedy
        self.tokenizer = backend.encoder.tokenizer
        self.start = backend.encoder.start
        self.max_length = backend.encoder.max_length
        self.cut: set[str] = set()

    def loglikelihood(self, requests: "list[Instance]") -> list[tuple[float, bool]]:
        """For each (context, continuation) its log-probability, and whether it is greedy."""
        pairs = [self._pair(*request.args) for request in requests]
        documents = groupby(
            range(len(requests)),
            key=lambda index: (requests[index].task_name, requests[index].doc_id),
        )
        questions = [
            question
            for _, group in documents
            for question in _questions([pairs[index] for index in group])
        ]
        rows = [row for question in questions for row in self.backend.option_rows(question)]
        values = iter(
            [value for scored in self.backend.logprobs(rows, self.description) for value in scored]
        )
        sums = [sum(float(next(values)) for _ in continuation) for _, continuation in pairs]
        asked = [
            index for index, request in enumerate(requests) if request.task_name in self.greedy
        ]
        greedy = dict(zip(asked, self._are_greedy([pairs[index] for index in asked]), strict=True))
        return [(total, greedy.get(index, False)) for index, total in enumerate(sums)]

    def loglikelihood_rolling(self, requests: "list[Instance]") -> list[float]:
        """For each text the log-probability of its tokens after BOS (or EOS), in the windows of the
        harness.
        """
        windows = [[*self._windows(request.args[0])] for request in requests]
        rows = [row for text in windows for window in text for row in plain_rows(window)]
        scored = iter(self.backend.logprobs(rows, self.description))
        return [float(sum(next(scored).sum() for _ in text)) for text in windows]

    def generate_until(self, requests: "list[Instance]") -> list[str]:
        """For each (context, settings) the greedy continuation before a stop string."""
        kinds: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            settings = normalize_gen_kwargs(request.args[1])
            if settings.get("do_sample") or settings.get("temperature"):
                raise UserError(
                    f"task {request.task_name} samples its answers ({request.args[1]}), but ipt "
                    "only generates greedily: leave the task out"
                )
            kinds[tuple(settings["until"]), settings["max_gen_toks"]].append(index)
        answers = [""] * len(requests)
        for (stop, room), group in kinds.items():
            prompts = [self._prompt(requests[index].args[0], room) for index in group]
            for index, answer in zip(
                group, self.backend.generate(prompts, stop, room, self.description), strict=True
            ):
                answers[index] = answer.text
        return answers

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        kwargs = self.backend.encoder.chat_template_kwargs
        return render(
            self.tokenizer,
            chat_history,
            kwargs,
            add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def _pair(self, context: str, continuation: str) -> Pair:
        """Trailing spaces of the context belong to the continuation. The context loses its
        beginning if both do not fit.
        """
        whole, border = self._encode(context + continuation), len(self._encode(context.rstrip()))
        begin, scored = whole[:border], whole[border:]
        if not begin:
            # A text of only one token would leave nothing to score.
            begin, scored = (
                ([self._prefix], scored)
                if scored[:1] != [self._prefix]
                else (scored[:1], scored[1:])
            )
        if not scored:
            raise UserError(
                f"{self.description}: the continuation {continuation!r} adds no token to its "
                "context: nothing can be scored"
            )
        excess = len(begin) + len(scored) - self.max_length - 1  # the last token is not fed
        if excess >= len(begin):
            raise UserError(
                f"{self.description}: a continuation of {len(scored)} tokens does not fit in the "
                f"context length {self.max_length}"
            )
        if excess > 0:
            self.cut.add(context)
        return begin[max(0, excess) :], scored

    def _prompt(self, context: str, room: int) -> list[int]:
        kept = self.max_length - room
        if kept < 1:
            raise UserError(
                f"{self.description}: {room} new tokens do not fit in the context length "
                f"{self.max_length}"
            )
        tokens = self._encode(context) or [self._prefix]
        if len(tokens) > kept:
            self.cut.add(context)
        return tokens[-kept:]

    def _windows(self, text: str) -> Iterator[Question]:
        tokens = self._encode(text)
        windows = get_rolling_token_windows(
            token_list=tokens, prefix_token=self._prefix, max_seq_len=self.max_length, context_len=1
        )
        for context, scored in map(make_disjoint_window, windows):
            yield Question(context, [scored], truncated=False)

    def _are_greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether each continuation is the greedy one."""
        lengths: dict[int, list[int]] = defaultdict(list)
        for index, (_, continuation) in enumerate(pairs):
            lengths[len(continuation)].append(index)
        result = [False] * len(pairs)
        for length, group in lengths.items():
            answers = self.backend.generate(
                [pairs[index][0] for index in group], [], length, self.description
            )
            for index, answer in zip(group, answers, strict=True):
                result[index] = list(answer.ids) == pairs[index][1]
        return result

    def _encode(self, text: str) -> list[int]:
        """Tokens, with BOS if texts begin with it; a BOS from a chat template is not doubled."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return tokens if self.start and tokens[:1] == self.start else self.start + tokens

    @property
    def _prefix(self) -> int:
        """The token before a text without context."""
        found = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if found is None else found)


def _questions(pairs: list[Pair]) -> Iterator[Question]:
    """The continuations of a document as one tree, or as one each if they have no common prefix."""
    wholes = [context + continuation for context, continuation in pairs]
    trunk = min(common_prefix(wholes), *(len(context) for context, _ in pairs))
    if not trunk and len(pairs) > 1:
        yield from (question for pair in pairs for question in _questions([pair]))
        return
    yield Question(
        wholes[0][:trunk],
        [whole[trunk:] for whole in wholes],
        truncated=False,
        scored=[len(scored) for _, scored in pairs],
    )

"""The models that can be talked to: which they are, and the one that is loaded."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING

from ipt.chat import Turn, answer, prompt_of
from ipt.config import ChatConfig, Config
from ipt.errors import UserError

if TYPE_CHECKING:
    from ipt.evaluation.backends.huggingface import Scorer


class Models:
    """One model at a time, loaded when it is first asked."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._name = ""
        self._scorer: Scorer | None = None
        self._one_at_a_time = Lock()

    def names(self) -> list[str]:
        """The config's model, those of `playground.models`, and the exports of earlier runs, the
        newest first.
        """
        exports = [
            path.parent
            for path in Path(self._config.playground.exports).glob("**/export/config.json")
        ]
        exports.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        return list(
            dict.fromkeys([self._config.model, *self._config.playground.models, *map(str, exports)])
        )

    def answer(
        self, name: str, turns: list[Turn], config: ChatConfig, stopped: Event
    ) -> Iterator[tuple[str, bool]]:
        """The answer to the last turn as it grows, and whether the model reads the whole
        conversation.

        Raises UserError for a model that is none of `names`, and for a template where the tokenizer
        has none.
        """
        if name not in self.names():
            raise UserError(f"model {name}: not one of those that this playground was started with")
        with self._one_at_a_time:
            scorer = self._load(name)
            if config.apply_chat_template and not scorer.encoder.tokenizer.chat_template:
                raise UserError(
                    f"the tokenizer of {name} has no chat template: talk to it without one"
                )
            prompt, complete = prompt_of(turns, scorer, config)
            said = ""
            for piece in answer(scorer, prompt, config):
                said += piece
                yield said, complete
                if stopped.is_set():
                    break

    def _load(self, name: str) -> "Scorer":
        from ipt.evaluation.backends.huggingface import load_scorer

        if self._scorer is None or name != self._name:
            self._scorer = None  # makes room for the next one
            self._scorer = load_scorer(
                replace(self._config.evaluation, apply_chat_template=False, scoring="plain"), name
            )
            self._name = name
        return self._scorer

"""The models of the chat tab: their names, and the one that is loaded."""

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
    """Keeps one model at a time, loaded on first use."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._name = ""
        self._scorer: Scorer | None = None
        self._one_at_a_time = Lock()

    def names(self) -> list[str]:
        """The config's model, those of `playground.models`, and exports, the newest first."""
        playground = self._config.playground
        found = Path(playground.exports).glob("**/export/config.json")
        exports = [path.parent for path in found]
        exports.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        names = [self._config.model, *playground.models, *map(str, exports)]
        return list(dict.fromkeys(names))

    def answer(
        self, name: str, turns: list[Turn], config: ChatConfig, stopped: Event
    ) -> Iterator[tuple[str, bool]]:
        """Yield the answer to the last turn as it grows, and whether the model reads all turns.

        Raises UserError for a model that is not in `names()`, and for a chat template that the
        tokenizer does not have.
        """
        if name not in self.names():
            raise UserError(
                f"model {name} is not in the list: restart with playground.models=[NAME]"
            )
        with self._one_at_a_time:
            scorer = self._load(name)
            if config.apply_chat_template and not scorer.encoder.tokenizer.chat_template:
                raise UserError(
                    f"the tokenizer of {name} has no chat template: turn the template off"
                )
            prompt, complete = prompt_of(turns, scorer, config)
            text = ""
            for piece in answer(scorer, prompt, config):
                text += piece
                yield text, complete
                if stopped.is_set():
                    break

    def _load(self, name: str) -> "Scorer":
        from ipt.evaluation.backends.huggingface import load_scorer

        if self._scorer is None or name != self._name:
            self._scorer = None  # frees its memory before the next one is loaded
            evaluation = self._config.evaluation
            self._scorer = load_scorer(
                replace(evaluation, apply_chat_template=False, scoring="plain"), name
            )
            self._name = name
        return self._scorer

"""No engine: pairs mined from the text by rules, for `synthesis.format=rule_based`. Nothing is
loaded and nothing is generated.
"""

from typing import Any

from ipt.synthesis.engines import Generation, Watch
from ipt.synthesis.formats.base import Message, Prompt
from ipt.synthesis.formats.rule_based import mine
from ipt.synthesis.formats.tags import END, Parsed, pairs_text, parse


class RuleFormat:
    """The prompt is the document; a shot sees nothing of the shots before it, but they are joined
    as those of a model are.
    """

    pair_end = END
    schema: dict[str, Any] | None = None
    grammar: str | None = None

    def __init__(self) -> None:
        self.stop_ids: list[int] = []

    def begin(self, document: str) -> Prompt:
        return Prompt([], (Message("user", document),))

    def follow(self, history: Prompt, document: str) -> Prompt:
        return self.begin(document)

    def parse(self, output: str) -> Parsed:
        return parse(output)

    def finish(self, prompt: Prompt, output_ids: list[int], output: str, parsed: Parsed) -> Prompt:
        return Prompt([])


class RuleEngine:
    """Mines at once. The choice among what can be mined depends on the seed and on the text."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    async def generate(
        self, prompt: Prompt, *, priority: int, lane: int, watch: Watch | None = None
    ) -> Generation:
        document = prompt.messages[0].content
        return Generation([], pairs_text(mine(document, self._seed)), "stop", 0)

    def close(self) -> None:
        pass

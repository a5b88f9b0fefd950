"""The engine of `synthesis.format=rule_based`: no model, pairs are extracted from the text by
rules.
"""

from ipt.synthesis.engines import Generation, Watch
from ipt.synthesis.formats.base import Prompt
from ipt.synthesis.formats.rule_based import mine
from ipt.synthesis.formats.tags import pairs_text


class RuleEngine:
    """Extracts pairs immediately. The selection depends on the seed and the text."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    async def generate(
        self, prompt: Prompt, *, priority: int, slot: int, watch: Watch | None = None
    ) -> Generation:
        document = prompt.messages[0].content
        return Generation([], pairs_text(mine(document, self._seed)), "stop", 0)

    def close(self) -> None:
        pass

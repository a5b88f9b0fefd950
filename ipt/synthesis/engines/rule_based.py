"""No engine: pairs mined from the text by rules, for `synthesis.format=rule_based`. Nothing is
loaded and nothing is generated.
"""

from ipt.synthesis.engines import Generation, Watch
from ipt.synthesis.formats.base import Prompt
from ipt.synthesis.formats.rule_based import mine
from ipt.synthesis.formats.tags import pairs_text


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

"""The prompt formats by the name in `synthesis.format`."""

from collections.abc import Callable
from typing import Any

from ipt.config import SynthesisConfig
from ipt.synthesis.formats.base import RULE_BASED, IptFormat, PromptFormat
from ipt.synthesis.formats.chat import ChatFormat
from ipt.synthesis.formats.rule_based import RuleFormat

FORMATS: dict[str, Callable[[Any, SynthesisConfig], PromptFormat]] = {
    "ipt": IptFormat,
    "chat": ChatFormat,
    RULE_BASED: lambda vocabulary, config: RuleFormat(),
}

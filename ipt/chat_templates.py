"""Chat templates of tokenizers, for synthesis, evaluation and chat."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ipt.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENS_THINKING, CLOSED_THINKING = "<think>", "<think>\n\n</think>\n\n"
# Arguments of `apply_chat_template` that are not template variables, or that `render` sets.
RESERVED = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "messages",
    "return_dict",
    "return_tensors",
    "tokenize",
)


class TemplateFails(UserError):
    """A chat template raised an error, with the message `reason`."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    # for worker processes, which pickle errors
    def __reduce__(self) -> tuple[type["TemplateFails"], tuple[str, str]]:
        return type(self), (str(self), self.reason)


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, str]],
    kwargs: Mapping[str, Any],
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """The conversation in the tokenizer's chat template, with the template variables `kwargs`
    (chat_template_kwargs).

    With `enable_thinking: false` the prompt never ends inside a reasoning block: if the template
    opens one, it is closed. Raises TemplateFails if the template raises an error.
    """
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )
    except Exception as error:  # expressions in a template raise any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        roles = ", ".join(message["role"] for message in messages)
        raise TemplateFails(
            f"the chat template of {tokenizer.name_or_path} raises an error for a conversation of "
            f"{roles}: {reason}: "
            "set its variables in chat_template_kwargs, use another model, or disable the chat "
            "template",
            reason,
        ) from None
    assert isinstance(text, str)
    opens = add_generation_prompt and text.rstrip().endswith(OPENS_THINKING)
    if opens and kwargs.get("enable_thinking") is False:
        text = text.rstrip().removesuffix(OPENS_THINKING) + CLOSED_THINKING
    return text


def check_kwargs(kwargs: Mapping[str, Any], key: str) -> None:
    """Raise UserError if a name in the config key `key` cannot be a template variable."""
    reserved = [name for name in kwargs if name in RESERVED]
    if reserved:
        raise UserError(
            f"{key}.{reserved[0]}: set by ipt: remove it, only variables of the chat template are "
            "allowed"
        )

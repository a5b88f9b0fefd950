"""Layouts: how the pairs of one document become one block of text (paper section 2.1).

A layout takes the pairs, with their options already listed, and the style of the text. It does not
see the document, because an arrangement may put the block before it, after it or into a text of its
own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

from ipt.rendering.draws import Draws
from ipt.rendering.pairs import Item
from ipt.rendering.pools import ExamplesFormat, OptionFormat, Pools

T = TypeVar("T")
PARAGRAPH = "\n\n"


class Style(NamedTuple):
    """The appearance of one text: the pools, and the choices from them."""

    pools: Pools
    draws: Draws
    mark: Callable[[str, str], str] | None = (
        None  # (name of a part, its text) -> what is printed in its place
    )

    def shown(self, part: str, text: str) -> str:
        return self.mark(part, text) if self.mark and text else text


class Shown(NamedTuple):
    """A pair in the form in which it is printed."""

    kind: str
    question: str
    options: str  # the listing; empty without options
    reasoning: str  # empty without reasoning
    answer: str  # with options: the label, or the option's text where options have no label


class Layout(NamedTuple):
    render: Callable[[Sequence[Shown], Style], str]
    fewest_pairs: int  # of every document in the text
    # whether a sentence may lead from the document to the block; other layouts open by themselves
    takes_lead: bool


def choose_layout(weights: Mapping[str, float], fewest_pairs: int, fraction: float) -> str:
    """The layout at `fraction` (in [0, 1)) of the weights.

    A layout that needs more pairs than the smallest document of the text gives its weight to the
    classic one: the published 80/5/5/5/5 becomes the published 95/5.
    """
    point = fraction * sum(weights.values())
    for name, weight in sorted(weights.items()):
        if LAYOUTS[name].fewest_pairs <= fewest_pairs:
            point -= weight
            if point < 0:
                return name
    return "classic"


def show(items: Sequence[Item], document: int, style: Style) -> list[Shown]:
    """The pairs of document number `document` of a chain, with shuffled, listed and labelled
    options.
    """
    pairs = [
        _list_options(item, f"order/{document}/{index}", style)
        if item.options
        else Shown(item.kind, item.question, "", item.reasoning, item.answer)
        for index, item in enumerate(items)
    ]
    return [_marked(pair, style) for pair in pairs] if style.mark else pairs


def classic(pairs: Sequence[Shown], style: Style) -> str:
    """One pair after the other; pairs of one kind have the same format."""
    parts: list[str] = []
    for pair in pairs:
        chosen = style.draws.pick(f"pairs/{pair.kind}", style.pools.pairs[pair.kind])
        filled = chosen.text.fill(
            question=pair.question,
            options=pair.options,
            reasoning=pair.reasoning,
            answer=pair.answer,
        )
        parts += filled, chosen.separator
    return "".join(parts[:-1])


def dialogue(pairs: Sequence[Shown], style: Style) -> str:
    """Two speakers: one asks, the other answers."""
    asker, answerer = style.draws.pick("dialogue/speakers", style.pools.speakers)
    chosen = style.draws.pick("dialogue/turns", style.pools.turns)
    turns: list[str] = []
    for pair in pairs:
        turns.append(chosen.text.fill(speaker=asker, turn=_question(pair, style)))
        turns.append(chosen.text.fill(speaker=answerer, turn=_answer(pair, style)))
    opening = optional("dialogue_opening", style.pools.dialogue_openings, style)
    return _headed(
        opening.fill(asker=asker, answerer=answerer) if opening else "",
        chosen.separator.join(turns),
        chosen.separator,
    )


def numbered(pairs: Sequence[Shown], style: Style) -> str:
    """All questions, then all answers with the same numbers."""
    chosen = style.draws.pick("numbered", style.pools.numbered)
    questions = [
        chosen.question.fill(question=_question(pair, style), **labels(index))
        for index, pair in enumerate(pairs)
    ]
    answers = [
        chosen.answer.fill(answer=_answer(pair, style), **labels(index))
        for index, pair in enumerate(pairs)
    ]
    asked = _headed(chosen.questions, chosen.separator.join(questions), chosen.separator)
    answered = _headed(chosen.answers, chosen.separator.join(answers), chosen.separator)
    return asked + PARAGRAPH + answered


def inline_few_shot(pairs: Sequence[Shown], style: Style) -> str:
    """Earlier pairs as worked examples, the last as the test. If all have reasoning, it explains
    the answer afterwards.
    """
    explained = all(pair.reasoning for pair in pairs)
    return _examples(
        pairs, style.draws.pick("inline_few_shot", style.pools.inline_few_shot), style, explained
    )


def next_turn(pairs: Sequence[Shown], style: Style) -> str:
    """Earlier pairs as the history of a conversation, the last as its next turn."""
    return _examples(
        pairs, style.draws.pick("next_turn", style.pools.next_turn), style, explained=False
    )


LAYOUTS: dict[str, Layout] = {
    "classic": Layout(classic, fewest_pairs=1, takes_lead=True),
    "dialogue": Layout(dialogue, fewest_pairs=1, takes_lead=False),
    "numbered": Layout(numbered, fewest_pairs=2, takes_lead=False),
    "inline_few_shot": Layout(inline_few_shot, fewest_pairs=2, takes_lead=False),
    "next_turn": Layout(next_turn, fewest_pairs=2, takes_lead=False),
}


# Parts
# ----------------------------------------------------------------------------------------------


def optional(name: str, pool: Sequence[T], style: Style) -> T | None:
    """One of `pool`, or None for the fraction of texts without it."""
    goes_without = style.draws.fraction(f"without/{name}") < style.pools.without[name]
    return None if goes_without else style.draws.pick(name, pool)


def _examples(pairs: Sequence[Shown], chosen: ExamplesFormat, style: Style, explained: bool) -> str:
    filled = [
        (chosen.last if index == len(pairs) - 1 else chosen.example).fill(
            question=_question(pair, style),
            answer=_explained_answer(pair, style) if explained else _answer(pair, style),
        )
        for index, pair in enumerate(pairs)
    ]
    examples = _headed(chosen.opening, chosen.separator.join(filled[:-1]), chosen.separator)
    return f"{examples}{PARAGRAPH}{filled[-1]}"


def _question(pair: Shown, style: Style) -> str:
    question = f"{pair.question}\n{pair.options}" if pair.options else pair.question
    hint = optional("hint", style.pools.hints, style) if pair.reasoning else None
    return hint.fill(question=question) if hint else question


def _answer(pair: Shown, style: Style) -> str:
    if not pair.reasoning:
        return pair.answer
    return style.draws.pick("conclusions", style.pools.conclusions).fill(
        reasoning=pair.reasoning, answer=pair.answer
    )


def _explained_answer(pair: Shown, style: Style) -> str:
    return style.draws.pick("explanations", style.pools.explanations).fill(
        reasoning=pair.reasoning, answer=pair.answer
    )


def _list_options(item: Item, purpose: str, style: Style) -> Shown:
    chosen = style.draws.pick("options/format", style.pools.option_formats)
    header = optional("options_header", style.pools.options_headers, style)
    options = [item.options[index] for index in style.draws.order(purpose, len(item.options))]
    listed = chosen.separator.join(
        _list_option(chosen, index, option) for index, option in enumerate(options)
    )
    answer = chosen.answer.fill(option=item.answer, **labels(options.index(item.answer)))
    return Shown(
        item.kind,
        item.question,
        _headed(header or "", listed, "\n" if "\n" in chosen.separator else " "),
        item.reasoning,
        answer,
    )


def _marked(pair: Shown, style: Style) -> Shown:
    return Shown(
        pair.kind,
        *(style.shown(part, text) for part, text in zip(Shown._fields[1:], pair[1:], strict=True)),
    )


def _list_option(chosen: OptionFormat, index: int, option: str) -> str:
    return chosen.item.fill(option=option, **labels(index))


def _headed(heading: str, body: str, separator: str) -> str:
    return f"{heading}{separator}{body}" if heading else body


@lru_cache(maxsize=1024)
def labels(index: int) -> dict[str, str]:
    """The labels of item `index` (from 0) in each numbering. No numbering ends (a, …, z, aa, ab,
    …).
    """
    letter, roman = _letters(index + 1), _roman(index + 1)
    return {
        "number": str(index + 1),
        "letter": letter,
        "LETTER": letter.upper(),
        "roman": roman.lower(),
        "ROMAN": roman,
    }


def _letters(number: int) -> str:
    letters = ""
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return letters


def _roman(number: int) -> str:
    digits = (
        ("M", 1000),
        ("CM", 900),
        ("D", 500),
        ("CD", 400),
        ("C", 100),
        ("XC", 90),
        ("L", 50),
        ("XL", 40),
        ("X", 10),
    )
    roman = ""
    for sign, value in (*digits, ("IX", 9), ("V", 5), ("IV", 4), ("I", 1)):
        count, number = divmod(number, value)
        roman += sign * count
    return roman

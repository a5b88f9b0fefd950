"""Layouts: how the pairs of one document become one block of text (paper section 2.1).

A layout takes the pairs with their options already listed, the pools and the choices of the text the block belongs to. It
says nothing about the document, since an arrangement may put the block before it, behind it or into a text of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

from ipt.rendering.draws import Draws
from ipt.rendering.pairs import Item
from ipt.rendering.pools import ExamplesStyle, OptionStyle, Pools

T = TypeVar("T")
PARAGRAPH = "\n\n"


class Shown(NamedTuple):
    """A pair as it is going to be printed."""

    kind: str
    question: str
    options: str  # the listing; empty without options
    reasoning: str  # empty without reasoning
    answer: str  # with options: the label, or the option's text where options have no label


class Layout(NamedTuple):
    render: Callable[[Sequence[Shown], Pools, Draws], str]
    fewest_pairs: int  # of every document in the text
    takes_lead: bool  # whether a sentence may lead from the document to the block; other layouts open by themselves


def choose_layout(weights: Mapping[str, float], fewest_pairs: int, fraction: float) -> str:
    """The layout at `fraction` (in [0, 1)) of the weights.

    Layouts that need more pairs than the text's poorest document has leave their weight to the classic one: the published
    80/5/5/5/5 becomes the published 95/5.
    """
    point = fraction * sum(weights.values())
    for name, weight in sorted(weights.items()):
        if LAYOUTS[name].fewest_pairs <= fewest_pairs:
            point -= weight
            if point < 0:
                return name
    return "classic"


def show(items: Sequence[Item], document: int, pools: Pools, draws: Draws) -> list[Shown]:
    """The pairs of a chain's `document`-th document with their options shuffled, listed and labelled."""
    return [
        _list_options(item, f"order/{document}/{index}", pools, draws)
        if item.options
        else Shown(item.kind, item.question, "", item.reasoning, item.answer)
        for index, item in enumerate(items)
    ]


def classic(pairs: Sequence[Shown], pools: Pools, draws: Draws) -> str:
    """One pair after the other; pairs of one kind look alike."""
    parts: list[str] = []
    for pair in pairs:
        style = draws.pick(f"pairs/{pair.kind}", pools.pairs[pair.kind])
        filled = style.text.fill(question=pair.question, options=pair.options, reasoning=pair.reasoning, answer=pair.answer)
        parts += filled, style.separator
    return "".join(parts[:-1])


def dialogue(pairs: Sequence[Shown], pools: Pools, draws: Draws) -> str:
    """Two speakers: one asks, the other answers."""
    asker, answerer = draws.pick("dialogue/speakers", pools.speakers)
    style = draws.pick("dialogue/turns", pools.turns)
    turns: list[str] = []
    for pair in pairs:
        turns.append(style.text.fill(speaker=asker, turn=_question(pair, pools, draws)))
        turns.append(style.text.fill(speaker=answerer, turn=_answer(pair, pools, draws)))
    opening = optional("dialogue_opening", pools.dialogue_openings, pools, draws)
    return _join(opening.fill(asker=asker, answerer=answerer) if opening else "", style.separator.join(turns), style.separator)


def numbered(pairs: Sequence[Shown], pools: Pools, draws: Draws) -> str:
    """All questions, then all answers under the same numbers."""
    style = draws.pick("numbered", pools.numbered)
    questions = [style.question.fill(question=_question(pair, pools, draws), **labels(index)) for index, pair in enumerate(pairs)]
    answers = [style.answer.fill(answer=_answer(pair, pools, draws), **labels(index)) for index, pair in enumerate(pairs)]
    asked = _join(style.questions, style.separator.join(questions), style.separator)
    answered = _join(style.answers, style.separator.join(answers), style.separator)
    return asked + PARAGRAPH + answered


def inline_few_shot(pairs: Sequence[Shown], pools: Pools, draws: Draws) -> str:
    """Earlier pairs as worked examples, the last as the test. If all have reasoning, it explains the answer afterwards."""
    explained = all(pair.reasoning for pair in pairs)
    return _examples(pairs, draws.pick("inline_few_shot", pools.inline_few_shot), pools, draws, explained)


def next_turn(pairs: Sequence[Shown], pools: Pools, draws: Draws) -> str:
    """Earlier pairs as the history of a conversation, the last as its next turn."""
    return _examples(pairs, draws.pick("next_turn", pools.next_turn), pools, draws, explained=False)


LAYOUTS: dict[str, Layout] = {
    "classic": Layout(classic, fewest_pairs=1, takes_lead=True),
    "dialogue": Layout(dialogue, fewest_pairs=1, takes_lead=False),
    "numbered": Layout(numbered, fewest_pairs=2, takes_lead=False),
    "inline_few_shot": Layout(inline_few_shot, fewest_pairs=2, takes_lead=False),
    "next_turn": Layout(next_turn, fewest_pairs=2, takes_lead=False),
}


# Parts ---------------------------------------------------------------------------------------------------------------


def optional(name: str, pool: Sequence[T], pools: Pools, draws: Draws) -> T | None:
    """One of `pool`, or None in the share of texts that go without it."""
    return None if draws.fraction(f"without/{name}") < pools.without[name] else draws.pick(name, pool)


def _examples(pairs: Sequence[Shown], style: ExamplesStyle, pools: Pools, draws: Draws, explained: bool) -> str:
    filled = [
        (style.last if index == len(pairs) - 1 else style.example).fill(
            question=_question(pair, pools, draws),
            answer=_explained_answer(pair, pools, draws) if explained else _answer(pair, pools, draws),
        )
        for index, pair in enumerate(pairs)
    ]
    examples = _join(style.opening, style.separator.join(filled[:-1]), style.separator)
    return f"{examples}{PARAGRAPH}{filled[-1]}"


def _question(pair: Shown, pools: Pools, draws: Draws) -> str:
    question = f"{pair.question}\n{pair.options}" if pair.options else pair.question
    hint = optional("hint", pools.hints, pools, draws) if pair.reasoning else None
    return hint.fill(question=question) if hint else question


def _answer(pair: Shown, pools: Pools, draws: Draws) -> str:
    if not pair.reasoning:
        return pair.answer
    return draws.pick("conclusions", pools.conclusions).fill(reasoning=pair.reasoning, answer=pair.answer)


def _explained_answer(pair: Shown, pools: Pools, draws: Draws) -> str:
    return draws.pick("explanations", pools.explanations).fill(reasoning=pair.reasoning, answer=pair.answer)


def _list_options(item: Item, purpose: str, pools: Pools, draws: Draws) -> Shown:
    style = draws.pick("options/style", pools.option_styles)
    header = optional("options_header", pools.options_headers, pools, draws)
    options = [item.options[index] for index in draws.order(purpose, len(item.options))]
    listed = style.separator.join(_list_option(style, index, option) for index, option in enumerate(options))
    answer = style.answer.fill(option=item.answer, **labels(options.index(item.answer)))
    return Shown(item.kind, item.question, _join(header or "", listed, "\n" if "\n" in style.separator else " "), item.reasoning, answer)


def _list_option(style: OptionStyle, index: int, option: str) -> str:
    return style.item.fill(option=option, **labels(index))


def _join(heading: str, body: str, separator: str) -> str:
    return f"{heading}{separator}{body}" if heading else body


@lru_cache(maxsize=1024)
def labels(index: int) -> dict[str, str]:
    """The labels of the `index`-th item from 0 in each way of counting; none ends (a, …, z, aa, ab, …)."""
    letter, roman = _letters(index + 1), _roman(index + 1)
    return {"number": str(index + 1), "letter": letter, "LETTER": letter.upper(), "roman": roman.lower(), "ROMAN": roman}


def _letters(number: int) -> str:
    letters = ""
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return letters


def _roman(number: int) -> str:
    digits = ("M", 1000), ("CM", 900), ("D", 500), ("CD", 400), ("C", 100), ("XC", 90), ("L", 50), ("XL", 40), ("X", 10)
    roman = ""
    for sign, value in (*digits, ("IX", 9), ("V", 5), ("IV", 4), ("I", 1)):
        count, number = divmod(number, value)
        roman += sign * count
    return roman

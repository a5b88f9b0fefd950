"""What the page shows, as HTML. Every text is escaped: nothing that a document or a model says is
markup.
"""

from collections.abc import Sequence
from dataclasses import replace

from markupsafe import Markup

from ipt.chat import Turn
from ipt.config import RenderingConfig
from ipt.playground.outputs import Said, read_output
from ipt.playground.synthesizer import UNFINISHED, Example, Writing
from ipt.rendering.pairs import Item, read_document, read_pair
from ipt.rendering.preview import COLOURS, mark, marked_parts
from ipt.rendering.render import Settings, Text, render_documents
from ipt.rendering.run import PairsRow, read_chains
from ipt.synthesis.chains import Round
from ipt.synthesis.formats.base import PromptFormat

KINDS = {
    "options": "multiple choice",
    "reasoning": "step by step",
    "options_reasoning": "multiple choice, step by step",
}
ENDS = {
    "stop": "ended by itself",
    "length": "cut at synthesis.max_new_tokens",
    "repetition": "ended at a question that it had asked before",
    UNFINISHED: "stopped by you",
}
DRAWS = 3  # renderings side by side
BEGINNING = 70  # characters that name an earlier text


def notice(message: object, is_error: bool = False) -> Markup:
    return Markup('<p class="notice{}" role="{}">{}</p>').format(
        " error" if is_error else "", "alert" if is_error else "status", message
    )


def pairs_view(writing: Writing) -> str:
    """What the synthesizer says of the text, read by the parser while it is written."""
    if writing.prompt_format is None:
        return notice("Loading the synthesizer. This is done once.")
    rounds = writing.written()
    if not rounds:
        return notice("Stopped." if writing.ended else "Reading the text …")
    body = Markup("").join(_round(round, writing.prompt_format, writing.ended) for round in rounds)
    if writing.ended:
        body += _figures(rounds, writing.seconds)
    if writing.examples and not rounds[0].inherits_previous:
        body += notice(_why_alone(rounds[0], writing.ended))
    return Markup('<div class="pairs">{}</div>').format(body)


def draws_view(rows: Sequence[PairsRow], config: RenderingConfig, seed: int) -> str:
    """The texts that would be trained on, as `DRAWS` seeds from `seed` on give them, coloured by
    part.
    """
    if not any(read_document(row.content).items or row.content.rewrite for row in rows):
        return notice(
            "Here you will see how the pairs and their text are put together for training."
        )
    settings = replace(Settings.of(config), mark=mark)
    draws = Markup("").join(_draw(rows, settings, seed + draw) for draw in range(DRAWS))
    legend = Markup("").join(
        Markup('<li><span class="part {0}">{0}</span></li>').format(part)
        for part in COLOURS
        if part != "rewrite"
    )
    template = Markup('<li><span class="part template">template</span></li>')
    return Markup(
        '<ul class="legend" aria-label="Colours">{}{}</ul><div class="draws">{}</div>'
    ).format(legend, template, draws)


def examples_view(examples: Sequence[Example]) -> str:
    """The texts that stand before the next one in its prompt."""
    if not examples:
        return Markup(
            '<p class="hint">1 shot: the synthesizer sees this text alone. Keep a text with its '
            "pairs as an example to add a shot.</p>"
        )
    items = Markup("").join(
        Markup("<li>{} <small>{}</small></li>").format(
            _beginning(example.text), _count(example.pairs, "pair")
        )
        for example in examples
    )
    shots = len(examples) + 1
    return Markup(
        '<p class="hint">{} shots: before this text the synthesizer reads</p><ol '
        'class="examples">{}</ol>'
    ).format(shots, items)


def conversation_view(turns: Sequence[Turn]) -> str:
    """What was said, oldest first; an answer that is still empty is about to come."""
    if not turns:
        return notice("What you write, and how the model goes on, appears here.")
    template = Markup('<li class="asked">{}</li><li class="said">{}</li>')
    waiting = Markup('<span class="cursor"></span>')
    said = Markup("").join(template.format(turn.question, turn.answer or waiting) for turn in turns)
    return Markup('<ol class="conversation" aria-label="Questions and answers">{}</ol>').format(
        said
    )


# Pairs
# ----------------------------------------------------------------------------------------------


def _round(round: Round, prompt_format: PromptFormat, ended: bool) -> Markup:
    finished = ended or round.generation.finish_reason != UNFINISHED
    reading = read_output(round.generation.text, prompt_format, finished)
    parts = [_said(said) for said in reading.pieces]
    if reading.rewrite:
        parts.append(
            Markup(
                '<article class="pair"><h4>Written from the text</h4><p '
                'class="answer">{}</p></article>'
            ).format(reading.rewrite)
        )
    if not finished:
        parts.append(
            Markup(
                '<p class="coming" aria-hidden="true">{}<span class="cursor"></span></p>'
            ).format(reading.rest)
        )
    elif not parts:
        parts.append(notice("The synthesizer wrote no pair for this text."))
    return Markup("").join(parts)


def _said(said: Said) -> Markup:
    if said.pair is None:
        template = (
            '<article class="pair malformed"><h4>No pair: {}</h4><p class="raw">{}</p></article>'
        )
        return Markup(template).format(said.reason.replace("_", " "), said.text)
    item = read_pair(said.pair)
    if isinstance(item, str):
        tag = Markup("<h4>Not in the training text: {}</h4>").format(item.replace("_", " "))
    else:
        tag = Markup("<h4>{}</h4>").format(KINDS[item.kind]) if item.kind in KINDS else Markup("")
    malformed = "" if isinstance(item, Item) else " malformed"
    template = (
        '<article class="pair{}">{}<p class="question">{}</p><p class="answer">{}</p></article>'
    )
    return Markup(template).format(malformed, tag, said.pair.question, said.pair.answer)


def _figures(rounds: Sequence[Round], seconds: float) -> Markup:
    pairs = sum(len(round.parsed.pairs) for round in rounds)
    prompt, output = (
        sum(round.prompt_tokens for round in rounds),
        sum(len(round.generation.token_ids) for round in rounds),
    )
    facts = [_count(pairs, "pair"), f"{prompt:,} prompt tokens"]
    if output and seconds:
        facts += [f"{output:,} tokens written in {seconds:.1f} s"]
    facts.append(ENDS.get(rounds[-1].generation.finish_reason, rounds[-1].generation.finish_reason))
    return Markup('<p class="figures">{}</p>').format(" · ".join(facts))


def _why_alone(round: Round, ended: bool) -> str:
    if round.parsed.found or not ended:
        return (
            "The examples are not in this prompt: the one before has no pair, or all of it would "
            "not fit the context window."
        )
    return "Without a pair this text does not join the examples."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _beginning(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= BEGINNING else f"{line[:BEGINNING].rstrip()}…"


# Training texts
# ----------------------------------------------------------------------------------------------


def _draw(rows: Sequence[PairsRow], settings: Settings, seed: int) -> Markup:
    texts = [
        text
        for chain in read_chains(rows)
        for text in render_documents([read_document(row) for row in chain], settings, seed)
    ]
    return Markup('<section class="draw"><h4>Seed {}</h4>{}</section>').format(
        seed, Markup("").join(map(_text, texts))
    )


def _text(text: Text) -> Markup:
    facts = [
        text.layout.replace("_", " "),
        *([_count(text.n_shots, "shot"), _count(text.n_pairs, "pair")] if text.n_pairs else []),
    ]
    facts += ["pairs first, by chance"] if text.inverted else []
    parts = Markup("").join(
        Markup('<span class="part {}">{}</span>').format(part or "template", said)
        for part, said in marked_parts(text.text)
    )
    return Markup('<p class="facts">{}</p><pre class="text" tabindex="0">{}</pre>').format(
        " · ".join(facts), parts
    )

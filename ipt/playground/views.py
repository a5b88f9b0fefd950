"""The content of the page as HTML. All texts of documents and models are escaped."""

from collections.abc import Sequence
from dataclasses import replace

from markupsafe import Markup

from ipt.chat import Turn
from ipt.config import RenderingConfig
from ipt.playground.outputs import OutputPiece, read_output
from ipt.playground.synthesizer import UNFINISHED, Example, Writing
from ipt.rendering.pairs import Item, read_document, read_pair
from ipt.rendering.preview import COLOURS, mark, marked_parts
from ipt.rendering.render import Settings, Text, render_documents
from ipt.rendering.run import PairsRow, read_chains
from ipt.report.formatting import count_of, spaced
from ipt.synthesis.chains import Round
from ipt.synthesis.formats.base import PromptFormat

KINDS = {
    "options": "multiple choice",
    "reasoning": "step by step",
    "options_reasoning": "multiple choice, step by step",
}
ENDS = {
    "stop": "finished",
    "length": "truncated at synthesis.max_new_tokens",
    "repetition": "stopped at a repeated question",
    UNFINISHED: "stopped by you",
}
DRAWS = 3  # renderings next to each other
BEGINNING = 70  # characters shown of an earlier text


def notice(message: object, is_error: bool = False) -> Markup:
    return Markup('<p class="notice{}" role="{}">{}</p>').format(
        " error" if is_error else "", "alert" if is_error else "status", message
    )


def pairs_view(writing: Writing) -> str:
    """The output of the synthesizer, parsed while it grows."""
    if writing.prompt_format is None:
        return notice("Loading the synthesizer. This happens only once.")
    rounds = writing.written()
    if not rounds:
        return notice("Stopped." if writing.ended else "Processing the text …")
    body = Markup("").join(_round(round, writing.prompt_format, writing.ended) for round in rounds)
    if writing.ended:
        body += _figures(rounds, writing.seconds)
    if writing.examples and not rounds[0].inherits_previous:
        body += notice(_why_alone(rounds[0], writing.ended))
    return Markup('<div class="pairs">{}</div>').format(body)


def draws_view(rows: Sequence[PairsRow], config: RenderingConfig, seed: int) -> str:
    """The training texts of `DRAWS` seeds from `seed` on, coloured by part."""
    if not any(read_document(row.content).items or row.content.rewrite for row in rows):
        return notice("The training texts made from the text and its pairs appear here.")
    settings = replace(Settings.of(config), mark=mark)
    draws = Markup("").join(_draw(rows, settings, seed + draw) for draw in range(DRAWS))
    entry = Markup('<li><span class="part {0}">{0}</span></li>')
    parts = [*(part for part in COLOURS if part != "rewrite"), "template"]
    legend = Markup("").join(map(entry.format, parts))
    return Markup(
        '<ul class="legend" aria-label="Colours">{}</ul><div class="draws">{}</div>'
    ).format(legend, draws)


def examples_view(examples: Sequence[Example]) -> str:
    """The texts that precede the next one in its prompt."""
    if not examples:
        return Markup(
            '<p class="hint">1 shot: the prompt has this text only. Keep a text with its pairs as '
            "an example to add a shot.</p>"
        )
    items = Markup("")
    for example in examples:
        pairs = count_of(example.pairs, "pair")
        items += Markup("<li>{} <small>{}</small></li>").format(_beginning(example.text), pairs)
    hint = f"{len(examples) + 1} shots: these examples precede the text in the prompt"
    return Markup('<p class="hint">{}</p><ol class="examples">{}</ol>').format(hint, items)


def conversation_view(turns: Sequence[Turn]) -> str:
    """The turns, oldest first; an empty answer is shown as a cursor."""
    if not turns:
        return notice("Your messages and the answers of the model appear here.")
    template = Markup('<li class="asked">{}</li><li class="said">{}</li>')
    waiting = Markup('<span class="cursor"></span>')
    items = Markup("").join(
        template.format(turn.question, turn.answer or waiting) for turn in turns
    )
    return Markup('<ol class="conversation" aria-label="Conversation">{}</ol>').format(items)


# Pairs
# ----------------------------------------------------------------------------------------------


def _round(round: Round, prompt_format: PromptFormat, ended: bool) -> Markup:
    finished = ended or round.generation.finish_reason != UNFINISHED
    reading = read_output(round.generation.text, prompt_format, finished)
    parts = [piece_view(piece) for piece in reading.pieces]
    if reading.rewrite:
        parts.append(
            Markup(
                '<article class="pair"><h4>Rewrite</h4><p class="answer">{}</p></article>'
            ).format(reading.rewrite)
        )
    if not finished:
        parts.append(
            Markup(
                '<p class="coming" aria-hidden="true">{}<span class="cursor"></span></p>'
            ).format(reading.rest)
        )
    elif not parts:
        parts.append(notice("The synthesizer generated no pair for this text."))
    return Markup("").join(parts)


def piece_view(piece: OutputPiece) -> Markup:
    """A pair, or a text that is not a pair with the reason."""
    if piece.pair is None:
        template = (
            '<article class="pair malformed"><h4>Not a pair: {}</h4><p class="raw">{}</p></article>'
        )
        return Markup(template).format(spaced(piece.reason), piece.text)
    item = read_pair(piece.pair)
    if isinstance(item, str):
        tag = Markup("<h4>Left out of the training text: {}</h4>").format(spaced(item))
    else:
        tag = Markup("<h4>{}</h4>").format(KINDS[item.kind]) if item.kind in KINDS else Markup("")
    malformed = "" if isinstance(item, Item) else " malformed"
    template = (
        '<article class="pair{}">{}<p class="question">{}</p><p class="answer">{}</p></article>'
    )
    return Markup(template).format(malformed, tag, piece.pair.question, piece.pair.answer)


def _figures(rounds: Sequence[Round], seconds: float) -> Markup:
    pairs = sum(len(round.parsed.pairs) for round in rounds)
    prompt = sum(round.prompt_tokens for round in rounds)
    output = sum(len(round.generation.token_ids) for round in rounds)
    facts = [count_of(pairs, "pair"), count_of(prompt, "prompt token")]
    if output and seconds:
        facts.append(f"{count_of(output, 'token')} generated in {seconds:.1f} s")
    reason = rounds[-1].generation.finish_reason
    facts.append(ENDS.get(reason, reason))
    return Markup('<p class="figures">{}</p>').format(" · ".join(facts))


def _why_alone(round: Round, ended: bool) -> str:
    if round.parsed.found or not ended:
        return (
            "The examples are not in this prompt, because the last one has no pair or the prompt "
            "would not fit the context window."
        )
    return "This text has no pair, so it cannot be an example."


def _beginning(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= BEGINNING else f"{line[:BEGINNING].rstrip()}…"


# Training texts
# ----------------------------------------------------------------------------------------------


def _draw(rows: Sequence[PairsRow], settings: Settings, seed: int) -> Markup:
    texts: list[Text] = []
    for chain in read_chains(rows):
        texts += render_documents([read_document(row) for row in chain], settings, seed)
    return Markup('<section class="draw"><h4>Seed {}</h4>{}</section>').format(
        seed, Markup("").join(map(_text, texts))
    )


def _text(text: Text) -> Markup:
    facts = [spaced(text.layout)]
    if text.n_pairs:
        facts += [count_of(text.n_shots, "shot"), count_of(text.n_pairs, "pair")]
    if text.inverted:
        facts.append("pairs first (drawn at random)")
    span = Markup('<span class="part {}">{}</span>')
    parts = Markup("")
    for part, content in marked_parts(text.text):
        parts += span.format(part or "template", content)
    return Markup('<p class="facts">{}</p><pre class="text" tabindex="0">{}</pre>').format(
        " · ".join(facts), parts
    )

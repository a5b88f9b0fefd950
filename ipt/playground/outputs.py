"""The pieces of a synthesizer's output: those that became a pair, and why others did not."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ipt.synthesis.formats.base import PromptFormat
from ipt.synthesis.formats.tags import Pair, Parsed

TRUNCATED = "truncated"


class OutputPiece(NamedTuple):
    """A pair, or a text that is not a pair with the parser's reason."""

    pair: Pair | None
    text: str = ""
    reason: str = ""


class Reading(NamedTuple):
    pieces: list[OutputPiece]
    rewrite: str  # of formats that rewrite the text
    rest: str  # the beginning of the next piece


def read_output(output: str, prompt_format: PromptFormat, ended: bool) -> Reading:
    """Split an output, which may still grow unless it has `ended`, into its pieces.

    The pairs are those that the parser finds in the whole output, so pairs of a draft before the
    final object are left out. The reason for rejecting a piece is the difference between parsing
    the output up to that piece and including it.
    """
    parsed = prompt_format.parse(output)
    pieces: list[OutputPiece] = []
    before, rejected, start = Parsed([], Counter()), Counter[str](), 0
    for end in _ends(output, prompt_format.pair_end):
        now = prompt_format.parse(output[:end])
        _add_pairs(pieces, [pair for pair in now.pairs if pair in parsed.pairs])
        reasons = (now.rejected - before.rejected) & (parsed.rejected - rejected)
        reasons.pop(TRUNCATED, None)
        pieces += [
            OutputPiece(None, output[start:end].strip(), reason) for reason in reasons.elements()
        ]
        rejected += reasons
        before, start = now, end
    rest = output[start:].strip()
    _add_pairs(pieces, parsed.pairs)
    if ended:
        pieces += [
            OutputPiece(None, rest if reason == TRUNCATED else "", reason)
            for reason in (parsed.rejected - rejected).elements()
        ]
    return Reading(pieces, parsed.rewrite, "" if ended else rest)


def _add_pairs(pieces: list[OutputPiece], pairs: list[Pair]) -> None:
    """Add the pairs that are not among the pieces yet."""
    shown = {piece.pair for piece in pieces}
    pieces += [OutputPiece(pair) for pair in pairs if pair not in shown]


def _ends(output: str, pair_end: str) -> Iterator[int]:
    """The end of each occurrence of `pair_end`."""
    end = 0
    while (found := output.find(pair_end, end)) >= 0:
        end = found + len(pair_end)
        yield end

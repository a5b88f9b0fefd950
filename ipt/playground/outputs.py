"""What a synthesizer said, piece by piece: which pieces became a pair, and why the others did not."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ipt.synthesis.formats.base import PromptFormat
from ipt.synthesis.formats.tags import Pair, Parsed

CUT = "truncated"


class Said(NamedTuple):
    """A piece of an output: a pair, or the text that is none and the parser's reason."""

    pair: Pair | None
    text: str = ""
    reason: str = ""


class Reading(NamedTuple):
    pieces: list[Said]
    rewrite: str  # by formats that have such
    rest: str  # what stands behind the last piece: the beginning of the next one


def read_output(output: str, prompt_format: PromptFormat, ended: bool) -> Reading:
    """Read an output that goes on being written unless it has `ended`. The pairs are those that the
    parser finds in the whole of it.

    What became of a piece is the difference that it makes: the parser reads what stands before it,
    then also the piece itself. Pairs of a draft, before the object that counts, are not shown.
    """
    parsed = prompt_format.parse(output)
    pieces: list[Said] = []
    before, rejected, start = Parsed([], Counter()), Counter[str](), 0
    for end in _ends(output, prompt_format.pair_end):
        now = prompt_format.parse(output[:end])
        _add_pairs(pieces, [pair for pair in now.pairs if pair in parsed.pairs])
        reasons = (now.rejected - before.rejected) & (parsed.rejected - rejected)
        reasons.pop(CUT, None)
        pieces += [Said(None, output[start:end].strip(), reason) for reason in reasons.elements()]
        rejected += reasons
        before, start = now, end
    rest = output[start:].strip()
    _add_pairs(pieces, parsed.pairs)
    if ended:
        pieces += [
            Said(None, rest if reason == CUT else "", reason)
            for reason in (parsed.rejected - rejected).elements()
        ]
    return Reading(pieces, parsed.rewrite, "" if ended else rest)


def _add_pairs(pieces: list[Said], pairs: list[Pair]) -> None:
    """Add the pairs that are not among the pieces yet."""
    shown = {piece.pair for piece in pieces}
    pieces += [Said(pair) for pair in pairs if pair not in shown]


def _ends(output: str, pair_end: str) -> Iterator[int]:
    """Where each occurrence of what ends a pair ends."""
    end = 0
    while (found := output.find(pair_end, end)) >= 0:
        end = found + len(pair_end)
        yield end

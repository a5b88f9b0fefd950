from ipt.config import SynthesisConfig
from ipt.models import load_tokenizer
from ipt.synthesis.engines import Repetitions
from ipt.synthesis.formats.base import IptFormat, Vocabulary
from ipt.synthesis.formats.tags import Pair, pairs_text


def test_a_generation_repeats_itself_exactly_where_a_pair_with_an_earlier_question_ends(tiny_model):
    vocabulary = Vocabulary(load_tokenizer(tiny_model))
    first, second = Pair("What is it?", "A cell."), Pair("Where is it?", "In blood.")
    again = Pair("WHAT is it?", "Another answer.")
    ids = vocabulary.encode_continuation(pairs_text([first, second, again, first]))
    repetitions = Repetitions(vocabulary, IptFormat(vocabulary, SynthesisConfig()))
    places = [end for end in range(1, len(ids) + 1) if repetitions.ended_by_last(ids[:end])]
    assert vocabulary.decode_continuation(ids[: places[0]]) == pairs_text([first, second, again])
    assert not any(repetitions.ended_by_last(ids[:end]) for end in range(1, places[0]))

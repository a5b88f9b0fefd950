import asyncio
from itertools import pairwise
from threading import Event

import pytest

from ipt.config import SynthesisConfig
from ipt.models import load_tokenizer
from ipt.playground.synthesizer import Synthesizer
from ipt.rendering.run import read_chains
from ipt.synthesis.formats.tags import context_text
from ipt.synthesis.worker import start

CONFIG = SynthesisConfig(
    model="embedded:tiny-synthesizer", engine="transformers", max_model_len=512, max_new_tokens=60
)
# it does not stop before it must
SLOW = SynthesisConfig(**{**vars(CONFIG), "model": "embedded:tiny", "max_new_tokens": 400})
TEXT = "A tide pool stays filled with sea water when the tide goes out."


@pytest.fixture(scope="module")
def synthesizer():
    made = Synthesizer(CONFIG, 0)
    yield made
    made.close()


def last(writings):
    """All of what was seen of a writing on the way, and the finished one."""
    outputs = []
    for writing in writings:
        outputs.append("".join(round.generation.text for round in writing.written()))
    return outputs, writing


async def unwatched(config):
    """What synthesis has for the text."""
    prompt_format, engine = start(config, 0)
    generation = await engine.generate(prompt_format.begin(TEXT), priority=0, slot=0)
    engine.close()
    return generation


@pytest.mark.parametrize("config", [CONFIG, SLOW], ids=["ends", "slow"])
def test_an_output_is_seen_to_grow_and_is_that_of_synthesis(config, monkeypatch):
    monkeypatch.setattr("ipt.playground.synthesizer.PAUSE", 0.01)
    synthesizer = Synthesizer(config, 0)
    outputs, writing = last(synthesizer.write([], TEXT, Event()))
    synthesizer.close()
    (round,) = writing.written()
    assert round.generation == asyncio.run(unwatched(config)) and writing.ended
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(outputs))
    if config is SLOW:  # the other is done in the twinkling of an eye
        assert any(output and output != outputs[-1] for output in outputs), (
            "nothing was seen on the way"
        )


def test_an_example_stands_in_the_prompt_and_in_the_text(synthesizer):
    _, first = last(synthesizer.write([], TEXT, Event()))
    _, second = last(synthesizer.write([first.example()], "A lung breathes.", Event()))
    (round,) = second.written()
    assert round.prompt_tokens > first.written()[0].prompt_tokens + len(
        first.written()[0].generation.token_ids
    )
    (chain,) = read_chains(second.rows())
    assert [row.text for row in chain] == [TEXT, "A lung breathes."] and all(
        row.pairs for row in chain
    )


def test_a_long_text_is_cut_as_synthesis_cuts_it(synthesizer):
    text = " ".join(f"Sentence {number} says a little." for number in range(150))
    _, writing = last(synthesizer.write([], text, Event()))
    assert (
        len(writing.written()) > 1
        and "".join(round.piece.text for round in writing.written()) == text
    )
    _, after = last(synthesizer.write([writing.example()], TEXT, Event()))
    assert len(after.written()) == 1 and after.written()[0].piece.text == TEXT


def test_stopping_keeps_what_was_written(monkeypatch):
    monkeypatch.setattr("ipt.playground.synthesizer.PAUSE", 0.01)
    slow = Synthesizer(SLOW, 0)
    stopped = Event()
    for writing in slow.write([], TEXT, stopped):
        if writing.written():
            stopped.set()
    (round,) = writing.written()
    assert (
        writing.ended and round.generation.text and round.generation.finish_reason == "unfinished"
    )
    slow.close()


def test_what_is_wrong_is_told():
    synthesizer = Synthesizer(SynthesisConfig(**{**vars(CONFIG), "long_documents": "skip"}), 0)
    with pytest.raises(
        ValueError, match=r"synthesis.long_documents=skip drops this text: too_long"
    ):
        last(synthesizer.write([], TEXT * 80, Event()))
    synthesizer.close()
    assert len(load_tokenizer(CONFIG.model)(context_text(TEXT * 80))["input_ids"]) > 512

"""Prompts are compared with the published format as a string, in which `<s>` and `</s>` stand for
the model's BOS and EOS.
"""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ipt.config import SynthesisConfig
from ipt.synthesis.chains import Piece, run_chain
from ipt.synthesis.engines import Generation
from ipt.synthesis.formats.base import IptFormat, Prompt, Vocabulary
from ipt.synthesis.formats.tags import Pair, pairs_text, parse
from tests.examples import examples

DOCUMENTS = [
    "The heart pumps blood.",
    "心臓は血液を送り出す。\n\nΗ καρδιά  \t",
    "A <b>tag</b>, an emoji 🫀 and <|im_end|> spelt out.",
]
OUTPUTS = [
    "<QUE> What pumps blood? <ANS> The heart </END>\n\n<QUE> Où? <ANS> Là — 心臓 🫀 </END>",
    "<QUE> B? <ANS> c </END>",
    "nothing",
]


def published(shots: list[tuple[str, str]], last: str) -> str:
    return (
        "".join(f"<s> <CON> {context} </CON>\n\n{pairs}</s>" for context, pairs in shots)
        + f"<s> <CON> {last} </CON>\n\n"
    )


def prompts_of_chain(vocabulary, documents, outputs, max_prompt_tokens=10_000):
    """The prompts that a chain of `documents` sends when the model answers `outputs` and stops, and
    the chain's rounds.
    """
    prompt_format = IptFormat(vocabulary, SynthesisConfig())
    prompts = []

    async def generate(prompt, number):
        prompts.append(prompt.ids)
        return Generation(
            [*vocabulary.encode_continuation(outputs[number]), vocabulary.eos],
            outputs[number],
            "stop",
            0,
        )

    async def rounds():
        pieces = [
            Piece(str(n), text, prompt_format.begin(text), n) for n, text in enumerate(documents)
        ]
        return [
            finished
            async for finished in run_chain(pieces, prompt_format, generate, max_prompt_tokens)
        ]

    return prompts, asyncio.run(rounds())


def spell(tokenizer, ids):
    """The exact text of `ids`, with BOS and EOS as the published format has them."""
    text = ""
    for kind, run in _runs(ids, {tokenizer.bos_token_id: "<s>", tokenizer.eos_token_id: "</s>"}):
        text += kind or tokenizer.decode(run, clean_up_tokenization_spaces=False)
    return text


def _runs(ids, names):
    run = []
    for token in ids:
        if token in names:
            if run:
                yield None, run
            yield names[token], []
            run = []
        else:
            run.append(token)
    if run:
        yield None, run


def test_a_chain_of_three_is_the_published_prompt_to_the_byte(vocabulary, tokenizer):
    prompts, rounds = prompts_of_chain(vocabulary, DOCUMENTS, OUTPUTS)
    assert spell(tokenizer, prompts[0]) == published([], DOCUMENTS[0])
    assert spell(tokenizer, prompts[1]) == published([(DOCUMENTS[0], OUTPUTS[0])], DOCUMENTS[1])
    assert spell(tokenizer, prompts[2]) == published(
        list(zip(DOCUMENTS[:2], OUTPUTS[:2], strict=True)), DOCUMENTS[2]
    )
    # one for each shot, never two at the beginning
    assert [prompt.count(tokenizer.bos_token_id) for prompt in prompts] == [1, 2, 3]
    # the parent's ids as they are, so that they are in the engine's cache
    assert prompts[2][: len(prompts[1])] == prompts[1]
    # the last one gave no pair
    assert [finished.inherits_previous for finished in rounds] == [False, True, False]


def test_a_special_token_in_a_document_is_text(vocabulary, tokenizer):
    prompt = (
        IptFormat(vocabulary, SynthesisConfig())
        .begin(f"before {tokenizer.eos_token} after {tokenizer.bos_token}")
        .ids
    )
    assert prompt.count(tokenizer.eos_token_id) == 0
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert spell(tokenizer, prompt) == published([], "before <|im_end|> after <|im_start|>")


def test_a_round_without_pairs_breaks_the_chain(vocabulary, tokenizer):
    prompts, rounds = prompts_of_chain(
        vocabulary, ["a", "b", "c"], ["nothing", OUTPUTS[1], OUTPUTS[1]]
    )
    assert spell(tokenizer, prompts[1]) == published([], "b")
    assert spell(tokenizer, prompts[2]) == published([("b", OUTPUTS[1])], "c")
    assert [finished.inherits_previous for finished in rounds] == [False, False, True]


def test_a_chain_that_would_overflow_starts_afresh(vocabulary, tokenizer):
    whole, _ = prompts_of_chain(vocabulary, ["a", "b", "c"], [OUTPUTS[1]] * 3)
    prompts, rounds = prompts_of_chain(
        vocabulary, ["a", "b", "c"], [OUTPUTS[1]] * 3, max_prompt_tokens=len(whole[2]) - 1
    )
    assert prompts[:2] == whole[:2]
    assert spell(tokenizer, prompts[2]) == published([], "c")
    assert [finished.inherits_previous for finished in rounds] == [False, True, False]
    exact, _ = prompts_of_chain(
        vocabulary, ["a", "b", "c"], [OUTPUTS[1]] * 3, max_prompt_tokens=len(whole[2])
    )
    assert exact == whole


@pytest.mark.parametrize(
    "output",
    [
        "<QUE> A? <ANS> b </END>\n\n<QUE> cut <ANS> of",  # truncated
        "<QUE> A? <ANS> b </END>\n\n<QUE> a? <ANS> again </END>",  # repeated
        "<QUE> no answer </END>\n\n<QUE> A? <ANS> b </END>",  # rejected first
        "<QUE>  A?  <ANS> b </END>",  # other spaces than the format's
        "<QUE> A? <ANS> b </END>\n\n",
    ],
)
def test_later_shots_see_accepted_pairs_only(vocabulary, tokenizer, output):
    prompts, _ = prompts_of_chain(vocabulary, ["a", "b"], [output, "x"])
    assert spell(tokenizer, prompts[1]) == published([("a", "<QUE> A? <ANS> b </END>")], "b")


def test_own_ids_are_kept_even_where_the_tokenizer_would_choose_others(vocabulary):
    prompt_format = IptFormat(vocabulary, SynthesisConfig())
    text = pairs_text([Pair("A?", "b")])
    # a model may write single characters
    ids = [vocabulary.encode(character)[0] for character in text]
    assert ids != vocabulary.encode(text)
    assert prompt_format.finish(Prompt([7]), ids, text, parse(text)).ids == [
        7,
        *ids,
        vocabulary.eos,
    ]
    # leaves no text, but must not stand in a later prompt
    stop_inside = [*ids[:3], vocabulary.bos[0], *ids[3:]]
    assert prompt_format.finish(Prompt([7]), stop_inside, text, parse(text)).ids == [
        7,
        *vocabulary.encode(text),
        vocabulary.eos,
    ]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer that, as Llama's and Mistral's, puts a space before what it encodes and takes one
    from what it decodes.
    """
    characters = [chr(code) for code in range(33, 127)] + ["▁"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    backend = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(vocabulary)},
            [],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("rejected", ["", "\n\n<QUE> cut"])
def test_no_space_slips_in_with_tokenizers_that_add_one(rejected):
    tokenizer = sentencepiece_like()
    # the case: a space was put before
    assert tokenizer.decode(tokenizer("a", add_special_tokens=False)["input_ids"][1:]) == "a"
    vocabulary = Vocabulary(tokenizer)
    pairs = pairs_text([Pair("A 心?", "b")])
    assert vocabulary.decode_continuation(vocabulary.encode_continuation(pairs)) == pairs
    prompts, _ = prompts_of_chain(vocabulary, ["x", "y"], [pairs + rejected, "z"])
    assert tokenizer.decode(prompts[1]).replace("<s>  <CON>", "<s> <CON>") == published(
        [("x", pairs)], "y"
    )


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


@examples(60)
@given(
    document=TEXT,
    output=st.lists(
        st.sampled_from(["<QUE>", "<ANS>", "</END>", " word", "🫀", "\n\n", " "]), max_size=20
    ).map("".join),
)
def test_any_output_gives_a_published_prompt(vocabulary, tokenizer, document, output):
    prompts, rounds = prompts_of_chain(vocabulary, [document, "next"], [output, ""])
    pairs = parse(output).pairs
    assert spell(tokenizer, prompts[1]) == published(
        [(document, pairs_text(pairs))] if pairs else [], "next"
    )
    assert [finished.prompt_tokens for finished in rounds] == [len(prompt) for prompt in prompts]

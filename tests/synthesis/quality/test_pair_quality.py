from collections import Counter

import pytest
import sacrebleu
from synthesis_cases import OracleEngine, write_documents

from ipt.config import SynthesisConfig
from ipt.corpus.words import words_of
from ipt.synthesis import worker
from ipt.synthesis.chains import Piece, Round
from ipt.synthesis.engines import Generation
from ipt.synthesis.formats.tags import Pair, Parsed, pairs_text, parse
from ipt.synthesis.quality.statistics import (
    diversity,
    examples,
    frame,
    read_document,
    read_pair,
    self_bleu,
    statistics,
)
from ipt.synthesis.run import synthesize
from ipt.synthesis.shards import Shard, ShardPlan

HEART = "The heart pumps blood through the body."
KIDNEY = "The kidney filters blood."


@pytest.fixture
def pairs(tmp_path):
    """Three generations: a well-formed one, one that was cut, and one without pairs. Their figures
    can be counted by hand.
    """
    heart = [
        ("What is the heart?", "the heart pumps blood"),
        ("What pumps blood?", "a muscle in the chest"),
    ]
    kidney = [("What is the kidney?", "The kidney filters red blood"), ("WHAT IS THE HEART?", "-")]
    outputs = [
        (HEART, _written(heart), "stop"),
        (KIDNEY, _written(kidney) + " <QUE> x", "length"),
        ("Nothing.", "no pairs here", "stop"),
    ]
    pieces = [[Piece(str(n), text, [1] * 10, n)] for n, (text, _, _) in enumerate(outputs)]
    shard = Shard(tmp_path, 0, ShardPlan(4, pieces, Counter(empty=1), Counter()))
    for chain, (_, output, reason) in enumerate(outputs):
        shard.add(
            chain,
            Round(
                0,
                pieces[chain][0],
                10,
                Generation([5] * 7, output, reason, 4),
                parse(output),
                False,
            ),
        )
    return tmp_path


def _written(pairs):
    return pairs_text([Pair(*pair) for pair in pairs])


def test_every_figure_as_counted_by_hand(pairs):
    stats = statistics(pairs)
    assert stats["documents"] == 4
    assert (stats["documents_with_pairs"], stats["documents_without_pairs"], stats["dropped"]) == (
        2,
        1,
        {"empty": 1},
    )
    assert (stats["rows"], stats["pairs"], stats["pairs_per_row"]) == (3, 4, 1.3333)
    assert stats["well_formed_rate"] == 0.3333
    assert stats["distinct_question_rate"] == 0.75  # "What is the heart?" twice, upper case or not
    assert stats["grounded_rate"] == 0.5  # 4 of 4 words; 0 of 5; 4 of 5; no word at all
    assert stats["what_is_share"] == 0.75
    assert stats["frames"] == {"what is the _": 2, "what _": 1, "what is the heart": 1}
    assert stats["stock_question_share"] == 1.0
    assert (stats["question_words"], stats["answer_words"]) == (3.75, 3.5)
    assert (stats["prompt_tokens"], stats["generated_tokens"], stats["cached_tokens"]) == (
        30,
        21,
        12,
    )
    assert stats["rejected"] == {"truncated": 2}
    assert stats["finish_reasons"] == {"stop": 2, "length": 1}


def test_histograms_kinds_and_costs_as_counted_by_hand(pairs):
    stats = statistics(pairs, max_new_tokens=10, parameters=1000)
    assert stats["kinds"] == {"definition": 3, "fact": 1}
    assert stats["verbatim_rate"] == 0.25  # "the heart pumps blood"
    histograms = {
        name: dict(zip(*histogram.values(), strict=True))
        for name, histogram in stats["histograms"].items()
    }
    assert {low: n for low, n in histograms["pairs_per_row"].items() if n} == {0: 1, 2: 2}
    assert {low: n for low, n in histograms["answer_words"].items() if n} == {0: 1, 4: 3}
    assert {low: n for low, n in histograms["document_words"].items() if n} == {0: 3}
    assert stats["generator_flops"] == 2 * 1000 * (30 - 12 + 21)
    assert stats["tokens_not_generated"] == 0
    without = statistics(pairs)
    assert without["generator_flops"] is None and without["tokens_not_generated"] is None


def test_tokens_that_a_repetition_saved(tmp_path):
    piece = Piece("a", HEART, prompt=None, document=0)
    shard = Shard(tmp_path, 0, ShardPlan(1, [[piece]], Counter(), Counter()))
    output = _written([("What?", "The heart."), ("What?", "Blood.")])
    shard.add(
        0, Round(0, piece, 10, Generation([5] * 7, output, "repetition", 0), parse(output), False)
    )
    stats = statistics(tmp_path, max_new_tokens=400)
    assert stats["tokens_not_generated"] == 393
    assert stats["rejected"] == {"repeated_question": 1} and stats["repeated_question_rate"] == 0.5


def test_a_rewrite_is_counted_and_shown(tmp_path):
    piece = Piece("a", HEART, prompt=None, document=0)
    shard = Shard(tmp_path, 0, ShardPlan(1, [[piece]], Counter(), Counter()))
    parsed = Parsed([], Counter(), "Blood is what the heart moves.")
    shard.add(0, Round(0, piece, 10, Generation([5], parsed.rewrite, "stop", 0), parsed, False))
    stats = statistics(tmp_path)
    assert (stats["rewrites"], stats["rewrite_words"], stats["pairs"], stats["grounded_rate"]) == (
        1,
        6.0,
        0,
        None,
    )
    assert [row["rewrite"] for row in examples(tmp_path, 3, 0)] == [parsed.rewrite]


def test_an_answer_is_close_to_its_document_in_any_script():
    document = read_document("心臓は血液を送る。")
    assert read_pair("何?", "血液を送る", document)[2:] == (1.0, True)
    assert read_pair("何?", "送る血液", document)[2:] == (1.0, False)
    assert read_pair("何?", "肺", document).grounded == 0
    # an answer without words
    assert read_pair("Where?", "...", read_document("Nothing.")).grounded == 0


def test_a_frame_is_the_question_without_its_documents_words():
    document = read_document("Type B lymphoma is what a doctor of the blood treats.").known
    assert (
        frame(words_of("What is the main type of B lymphoma blood?"), document)
        == "what is the main type of _"
    )
    assert frame(words_of("Lymphoma treats doctor?"), document) == "_"


def test_self_bleu_tells_stock_questions_from_different_ones():
    same = ["what is the heart in the body"] * 5
    assert self_bleu(same) == 1.0
    different = [
        "what is the heart in the body",
        "which organ in the body filters blood",
        "who found the heart in the chest",
    ]
    assert 0 < self_bleu(different) < 0.6
    scores = [bleu_against_others(different, place) for place in range(3)]
    assert self_bleu(different) == pytest.approx(sum(scores) / 300, abs=1e-4)
    assert self_bleu(["alone"]) is None


def bleu_against_others(texts, place):
    others = [[text] for text in texts[:place] + texts[place + 1 :]]
    return sacrebleu.corpus_bleu(
        [texts[place]], others, tokenize="none", use_effective_order=True
    ).score


def test_distinct_4grams_of_questions_and_answers():
    pairs = [(list("abcde"), list("abcd")), (list("abcde"), ["x"])]
    assert diversity(pairs)["distinct_4grams"] == 0.4  # abcd bcde abcd abcd bcde: two of five


def test_examples_are_random_in_order_and_repeatable(tmp_path, monkeypatch, vocabulary, tokenizer):
    monkeypatch.setattr(worker, "start_engine", lambda *_: OracleEngine(vocabulary))
    monkeypatch.setattr("ipt.models.load_tokenizer", lambda name: tokenizer)
    config = SynthesisConfig(
        model="embedded:tiny", engine="transformers", max_model_len=400, max_new_tokens=80
    )
    stats = synthesize(
        config,
        write_documents(tmp_path / "documents", [f"Page {n}." for n in range(40)]),
        tmp_path,
        0,
    )
    folder = tmp_path / "pairs"
    chosen = examples(folder, 5, 1)
    assert len({row["doc_id"] for row in chosen}) == 5 and all(row["pairs"] for row in chosen)
    assert chosen == examples(folder, 5, 1) != examples(folder, 5, 2)
    everything = [row["doc_id"] for row in examples(folder, 1000, 0)]
    assert len(everything) == stats["documents_with_pairs"]
    assert [row["doc_id"] for row in chosen] == [
        doc_id for doc_id in everything if doc_id in {row["doc_id"] for row in chosen}
    ]

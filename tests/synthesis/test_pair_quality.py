from collections import Counter

import pytest
from synthesis_cases import OracleEngine, write_documents

from ipt.config import SynthesisConfig
from ipt.synthesis import run
from ipt.synthesis.chains import Piece, Round
from ipt.synthesis.engines import Generation
from ipt.synthesis.format import Pair, pairs_text, parse
from ipt.synthesis.quality import examples, frame, is_grounded, statistics, words
from ipt.synthesis.shards import Plan, Shard

HEART = "The heart pumps blood through the body."
KIDNEY = "The kidney filters blood."


@pytest.fixture
def pairs(tmp_path):
    """Three generations: a well-formed one, one that was cut, and one without pairs. Their figures can be counted by hand."""
    heart = [("What is the heart?", "the heart pumps blood"), ("What pumps blood?", "a muscle in the chest")]
    kidney = [("What is the kidney?", "The kidney filters red blood"), ("WHAT IS THE HEART?", "-")]
    outputs = [(HEART, _written(heart), "stop"), (KIDNEY, _written(kidney) + " <QUE> x", "length"), ("Nothing.", "no pairs here", "stop")]
    pieces = [[Piece(str(n), text, [1] * 10, n)] for n, (text, _, _) in enumerate(outputs)]
    shard = Shard(tmp_path, 0, Plan(4, pieces, Counter(empty=1), Counter()))
    for chain, (_, output, reason) in enumerate(outputs):
        shard.add(chain, Round(0, pieces[chain][0], 10, Generation([5] * 7, output, reason, 4), parse(output), False))
    return tmp_path


def _written(pairs):
    return pairs_text([Pair(*pair) for pair in pairs])


def test_every_figure_as_counted_by_hand(pairs):
    stats = statistics(pairs)
    assert stats["documents"] == 4
    assert (stats["documents_with_pairs"], stats["documents_without_pairs"], stats["dropped"]) == (2, 1, {"empty": 1})
    assert (stats["rows"], stats["pairs"], stats["pairs_per_row"]) == (3, 4, 1.3333)
    assert stats["well_formed_rate"] == 0.3333
    assert stats["distinct_question_rate"] == 0.75  # "What is the heart?" twice, upper case or not
    assert stats["grounded_rate"] == 0.5  # 4 of 4 words; 0 of 5; 4 of 5; no word at all
    assert stats["what_is_share"] == 0.75
    assert stats["frames"] == {"what is the _": 2, "what _": 1, "what is the heart": 1}
    assert stats["stock_question_share"] == 1.0
    assert (stats["question_words"], stats["answer_words"]) == (3.75, 3.5)
    assert (stats["prompt_tokens"], stats["generated_tokens"], stats["cached_tokens"]) == (30, 21, 12)
    assert stats["rejected"] == {"truncated": 2}
    assert stats["finish_reasons"] == {"stop": 2, "length": 1}


def test_words_of_any_script():
    assert words("Don't, the 3rd_one é!") == ["don", "t", "the", "3rd_one", "é"]
    assert words("心臓は heart หัวใจ") == ["心", "臓", "は", "heart", *"หัวใจ"]
    assert is_grounded(words("血液を送る"), frozenset(words("心臓は血液を送る。")))


def test_a_frame_is_the_question_without_its_documents_words():
    document = frozenset(words("Type B lymphoma is what a doctor of the blood treats."))
    assert frame(words("What is the main type of B lymphoma blood?"), document) == "what is the main type of _"
    assert frame(words("Lymphoma treats doctor?"), document) == "_"


def test_examples_are_random_in_order_and_repeatable(tmp_path, monkeypatch, vocabulary, tokenizer):
    monkeypatch.setattr(run, "start_engine", lambda *_: OracleEngine(vocabulary))
    monkeypatch.setattr("ipt.models.load_tokenizer", lambda name: tokenizer)
    config = SynthesisConfig(model="embedded:tiny", engine="transformers", max_model_len=400, max_new_tokens=80)
    stats = run.synthesize(config, write_documents(tmp_path / "documents", [f"Page {n}." for n in range(40)]), tmp_path, 0)
    folder = tmp_path / "pairs"
    chosen = examples(folder, 5, 1)
    assert len({row["doc_id"] for row in chosen}) == 5 and all(row["pairs"] for row in chosen)
    assert chosen == examples(folder, 5, 1) != examples(folder, 5, 2)
    everything = [row["doc_id"] for row in examples(folder, 1000, 0)]
    assert len(everything) == stats["documents_with_pairs"]
    assert [row["doc_id"] for row in chosen] == [doc_id for doc_id in everything if doc_id in {row["doc_id"] for row in chosen}]

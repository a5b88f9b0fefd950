import math

import pytest
import torch
from evaluation_cases import DOCUMENTS, TASK, make_scorer

from ipt.evaluation.task import Task
from ipt.evaluation.task_types import perplexity
from ipt.evaluation.task_types.perplexity import ScoredDocument


@torch.no_grad()
def loop_nll(model, ids, context):
    """Each token's loss one by one, from the tokens that its window shows."""
    total = 0.0
    for position in range(1, len(ids)):
        logits = model(input_ids=torch.tensor([ids[context(position) : position]])).logits[0, -1]
        total -= float(logits.double().log_softmax(-1)[ids[position]])
    return total


@pytest.mark.parametrize("bos", [None, True])
def test_documents_equal_a_plain_loop(model, tokenizer, bos):
    scorer = make_scorer(model, tokenizer, add_bos_token=bos)
    start = [tokenizer.bos_token_id] if bos else []
    found = perplexity.score(TASK, [ScoredDocument(text, text) for text in DOCUMENTS], scorer)
    for row, text in zip(found, DOCUMENTS, strict=True):
        ids = start + tokenizer(text)["input_ids"]
        assert row["tokens"] == len(ids) - 1
        assert row["nll"] == pytest.approx(loop_nll(model, ids, lambda position: 0), abs=1e-3)
        assert (row["bytes"] == len(text.encode())) == bool(bos)


def test_a_long_document_is_read_in_windows(model, tokenizer):
    scorer = make_scorer(model, tokenizer, max_length=12)
    (row,) = perplexity.score(TASK, [ScoredDocument("a", DOCUMENTS[3])], scorer)
    ids = tokenizer(DOCUMENTS[3])["input_ids"]
    assert row["windows"] == math.ceil((len(ids) - 1 - 12) / 7) + 1 > 2, (
        "the case needs several windows"
    )

    def context(position):
        """The first window holds tokens 0 to 11 and scores up to token 12; each later one repeats 6
        tokens and scores 7.
        """
        return 0 if position <= 12 else 13 + (position - 13) // 7 * 7 - 6

    assert row["tokens"] == len(ids) - 1
    assert row["nll"] == pytest.approx(loop_nll(model, ids, context), abs=1e-3)
    assert perplexity.counts([row]) == {
        "windowed_documents": 1,
        "empty_documents": 0,
        "truncated_contexts": 0,
    }


def test_metrics_by_hand():
    rows = [
        {"nll": 6.0, "tokens": 2, "bytes": 10, "windows": 1, "truncated": True},
        {"nll": 4.0, "tokens": 3, "bytes": 8, "windows": 1, "truncated": False},
        {"nll": 0.0, "tokens": 0, "bytes": 0, "windows": 0, "truncated": False},
    ]
    found = perplexity.metrics(TASK, rows)
    assert found["nll"].value == pytest.approx(10 / 5)
    assert found["perplexity"].value == pytest.approx(math.exp(2))
    assert found["bits_per_byte"].value == pytest.approx(10 / math.log(2) / 18)
    # Clusters: residuals 6 - 2 * 2 and 4 - 2 * 3 around the ratio, over five tokens.
    assert found["nll"].stderr == pytest.approx(math.sqrt(2 / 1 * (2**2 + 2**2)) / 5)
    assert {metric.n for metric in found.values()} == {2}
    assert perplexity.counts(rows) == {
        "windowed_documents": 0,
        "empty_documents": 1,
        "truncated_contexts": 1,
    }


def test_documents_with_nothing_to_score(scorer):
    rows = perplexity.score(
        TASK, [ScoredDocument("a", ""), ScoredDocument("b", DOCUMENTS[0])], scorer
    )
    assert (rows[0]["tokens"], rows[0]["nll"]) == (0, 0.0) and rows[1]["tokens"] > 0
    with pytest.raises(
        ValueError, match=r"task test: none of its 1 documents has two tokens or more"
    ):
        perplexity.score(TASK, [ScoredDocument("a", "")], scorer)


def test_the_end_of_a_text_behind_its_context(model, tokenizer, scorer):
    context, ends = (
        "Cells that carry oxygen through the vessels are called",
        [" red blood cells", " red", " neurons"],
    )
    task = Task("test", "perplexity", "x.jsonl", context="{{ c }}", text="{{ t }}")
    said = scorer.generate([tokenizer(context)["input_ids"]], [], 2, "greedy")[0].text
    rows = perplexity.score(
        task, [ScoredDocument(end, context + end, len(context)) for end in [*ends, said]], scorer
    )
    begin = len(tokenizer(context)["input_ids"])
    for row in rows:
        ids = tokenizer(context + row["id"])["input_ids"]
        whole, before = (loop_nll(model, part, lambda position: 0) for part in (ids, ids[:begin]))
        assert (
            row["nll"] == pytest.approx(whole - before, abs=1e-3)
            and row["tokens"] == len(ids) - begin
        )
        assert row["bytes"] == len(row["id"].encode()) and row["greedy"] is (row["id"] == said)
    found = perplexity.metrics(task, rows)
    assert found["accuracy"].value == pytest.approx(1 / 4)
    assert found["text_perplexity"].value == pytest.approx(
        math.exp(sum(row["nll"] for row in rows) / 4)
    )


def test_a_prefix_of_the_text_is_not_the_text(model, tokenizer, scorer):
    """The model writes more than the text's token, which begins what it writes: the first token is
    another one.
    """
    context = "Cells that carry oxygen through the vessels are called"
    (said,) = scorer.generate([tokenizer(context)["input_ids"]], [], 1, "greedy")
    piece = next(said.text[:size] for size in range(1, len(said.text)) if said.text[:size].strip())
    task = Task("test", "perplexity", "x.jsonl", context="{{ c }}", text="{{ t }}")
    rows = perplexity.score(
        task,
        [ScoredDocument(end, context + end, len(context)) for end in (piece, said.text)],
        scorer,
    )
    assert [row["greedy"] for row in rows] == [False, True]


def test_parts_of_characters_have_bytes(scorer):
    rows = perplexity.score(TASK, [ScoredDocument("a", "①"), ScoredDocument("b", "Ж")], scorer)
    assert [row["bytes"] for row in rows] == [2, 1]
    assert perplexity.metrics(TASK, rows[:1])["bits_per_byte"].value == pytest.approx(
        rows[0]["nll"] / math.log(2) / 2
    )
    nothing = [{**row, "bytes": 0} for row in rows]
    assert math.isnan(perplexity.metrics(TASK, nothing)["bits_per_byte"].value)

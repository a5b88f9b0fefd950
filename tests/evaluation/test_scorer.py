import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_cases import DOCUMENTS, TASK, loop_sums, make_scorer, opinionated
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from ipt.evaluation import choice, perplexity, scorer
from ipt.evaluation.encoding import plain_rows, tree_row

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def sums(found):
    return [value for prediction in found for value in prediction["sums"]]


def test_tree_equals_each_option_alone(model, tokenizer, scorer, questions):
    tree = make_scorer(model, tokenizer, scoring="tree")
    expected = loop_sums(model, scorer, questions)
    assert sums(choice.score(TASK, questions, tree)) == pytest.approx(expected, abs=1e-3)
    # The fixture would show a leak: with a mask that lets options see each other, figures move far.
    row = tree_row(tree.encoder.question(questions[0].prompt, questions[0].options))
    leaking = row._replace(segments=[min(segment, 1) for segment in row.segments])
    assert np.abs(tree._score([leaking]) - tree._score([row])).max() > 0.1


def test_auto_takes_the_tree_for_a_llama(scorer):
    assert scorer.tree_length > 0 and not scorer.projects_itself


def test_plain_scoring_is_the_same(model, tokenizer, scorer, questions):
    plain = make_scorer(model, tokenizer, scoring="plain")
    assert plain.tree_length == 0 and plain.projects_itself
    assert sums(choice.score(TASK, questions, plain)) == pytest.approx(sums(choice.score(TASK, questions, scorer)), abs=1e-3)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_figures_do_not_depend_on_batch_size_or_order(model, tokenizer, scorer, questions, batch_tokens):
    other = make_scorer(model, tokenizer, batch_tokens=batch_tokens)
    shuffled = random.Random(batch_tokens).sample(questions, len(questions))
    expected = {row["id"]: row["sums"] for row in choice.score(TASK, questions, scorer)}
    for row in choice.score(TASK, shuffled, other):
        assert row["sums"] == pytest.approx(expected[row["id"]], abs=1e-4)
    documents = [perplexity.Document(str(number), text) for number, text in enumerate(DOCUMENTS)]
    whole = {row["id"]: row["nll"] for row in perplexity.score(TASK, documents, scorer)}
    assert {row["id"]: row["nll"] for row in perplexity.score(TASK, documents[::-1], other)} == pytest.approx(whole, abs=1e-3)


def test_vocabulary_chunks_change_nothing(model, tokenizer, questions, monkeypatch):
    expected = sums(choice.score(TASK, questions, make_scorer(model, tokenizer)))
    monkeypatch.setattr(scorer, "LOGITS", 3 * 49152)
    assert sums(choice.score(TASK, questions, make_scorer(model, tokenizer))) == pytest.approx(expected, abs=1e-5)


def test_bfloat16_is_close(model, tokenizer, scorer, questions):
    rounded = make_scorer(opinionated_copy(model), tokenizer)
    assert rounded.tree_length > 0
    exact, found = np.array(sums(choice.score(TASK, questions, scorer))), np.array(sums(choice.score(TASK, questions, rounded)))
    assert found == pytest.approx(exact, rel=0.05)


def opinionated_copy(model):
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(torch.bfloat16).eval()


def test_questions_longer_than_a_sliding_window_are_scored_option_by_option(tokenizer, questions):
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=len(tokenizer), sliding_window=9, **SMALL)
    windowed = opinionated(MistralForCausalLM(config))
    ours = make_scorer(windowed, tokenizer)
    assert ours.tree_length == 9
    encoded = [ours.encoder.question(question.prompt, question.options) for question in questions]
    assert {len(ours.option_rows(question)) == 1 for question in encoded} == {True, False}
    assert sums(choice.score(TASK, questions, ours)) == pytest.approx(loop_sums(windowed, ours, questions), abs=1e-3)


def test_logits_that_a_model_transforms_are_its_own(tokenizer, questions):
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=len(tokenizer), head_dim=16, final_logit_softcapping=2.0, sliding_window=64, **SMALL)
    capped = opinionated(Gemma2ForCausalLM(config))
    ours = make_scorer(capped, tokenizer)
    assert ours.projects_itself
    assert sums(choice.score(TASK, questions, ours)) == pytest.approx(loop_sums(capped, ours, questions), abs=1e-3)


def test_a_model_without_attention_is_scored_the_plain_way(tokenizer, questions):
    torch.manual_seed(0)
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=32, state_size=4, num_hidden_layers=2)).eval()
    with torch.no_grad():
        recurrent.backbone.embeddings.weight.mul_(20)
    ours = make_scorer(recurrent, tokenizer)
    assert ours.tree_length == 0
    assert sums(choice.score(TASK, questions, ours)) == pytest.approx(loop_sums(recurrent, ours, questions), abs=1e-3)


def test_broken_weights_are_named(model, tokenizer, questions):
    broken = opinionated_copy(model).float()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^my_task: the model's log-probabilities are not finite"):
        choice.score(replace(TASK, name="my_task"), questions, make_scorer(broken, tokenizer, scoring="tree"))


def test_tree_mask_by_hand():
    mask = scorer.tree_mask(torch.tensor([[0, 1, 1, 2, 0]]), torch.float32)[0, 0]
    sees = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]
    assert (mask == 0).int().tolist() == sees
    assert mask.min() == torch.finfo(torch.float32).min


def test_plain_rows_have_no_branches(scorer, questions):
    encoded = scorer.encoder.question(questions[0].prompt, questions[0].options)
    for row, option in zip(plain_rows(encoded), encoded.options, strict=True):
        assert row.ids + row.targets[-1:] == encoded.prompt + option
        assert "attention_mask" not in scorer._inputs([row])


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_each_row_once_within_the_limit(lengths, batch_tokens):
    found = list(scorer.batches(lengths, batch_tokens))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= batch_tokens

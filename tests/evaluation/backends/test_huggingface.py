import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_cases import DOCUMENTS, TASK, loop_sums, make_scorer, opinionated
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from ipt.config import EvaluationConfig
from ipt.evaluation.backends import batching, huggingface
from ipt.evaluation.backends.encoding import plain_rows, tree_row
from ipt.evaluation.task import load_tasks
from ipt.evaluation.task_types import multiple_choice, perplexity
from ipt.models import load_model

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def sums(found):
    return [value for prediction in found for value in prediction["sums"]]


def test_tree_equals_each_option_alone(model, tokenizer, scorer, questions):
    tree = make_scorer(model, tokenizer, scoring="tree")
    expected = loop_sums(model, scorer, questions)
    assert sums(multiple_choice.score(TASK, questions, tree)) == pytest.approx(expected, abs=1e-3)
    # The fixture would show a leak: with a mask that lets options see each other, figures move far.
    row = tree_row(tree.encoder.question(questions[0].prompt, questions[0].options))
    leaking = row._replace(segments=[min(segment, 1) for segment in row.segments])
    assert np.abs(tree._score([leaking]) - tree._score([row])).max() > 0.1


def test_auto_takes_the_tree_for_a_llama(scorer):
    assert scorer.tree_length > 0 and not scorer.projects_itself


def test_plain_scoring_is_the_same(model, tokenizer, scorer, questions):
    plain = make_scorer(model, tokenizer, scoring="plain")
    assert plain.tree_length == 0 and plain.projects_itself
    assert sums(multiple_choice.score(TASK, questions, plain)) == pytest.approx(
        sums(multiple_choice.score(TASK, questions, scorer)), abs=1e-3
    )


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_figures_do_not_depend_on_batch_size_or_order(
    model, tokenizer, scorer, questions, batch_tokens
):
    other = make_scorer(model, tokenizer, batch_tokens=batch_tokens)
    shuffled = random.Random(batch_tokens).sample(questions, len(questions))
    expected = {row["id"]: row["sums"] for row in multiple_choice.score(TASK, questions, scorer)}
    for row in multiple_choice.score(TASK, shuffled, other):
        assert row["sums"] == pytest.approx(expected[row["id"]], abs=1e-4)
    documents = [
        perplexity.ScoredDocument(str(number), text) for number, text in enumerate(DOCUMENTS)
    ]
    whole = {row["id"]: row["nll"] for row in perplexity.score(TASK, documents, scorer)}
    assert {
        row["id"]: row["nll"] for row in perplexity.score(TASK, documents[::-1], other)
    } == pytest.approx(whole, abs=1e-3)


def test_vocabulary_chunks_change_nothing(model, tokenizer, questions, monkeypatch):
    expected = sums(multiple_choice.score(TASK, questions, make_scorer(model, tokenizer)))
    monkeypatch.setattr(huggingface, "LOGITS", 3 * 49152)
    assert sums(
        multiple_choice.score(TASK, questions, make_scorer(model, tokenizer))
    ) == pytest.approx(expected, abs=1e-5)


def test_bfloat16_is_close(model, tokenizer, scorer, questions):
    rounded = make_scorer(opinionated_copy(model), tokenizer)
    assert rounded.tree_length > 0
    exact, found = (
        np.array(sums(multiple_choice.score(TASK, questions, scorer))),
        np.array(sums(multiple_choice.score(TASK, questions, rounded))),
    )
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
    assert sums(multiple_choice.score(TASK, questions, ours)) == pytest.approx(
        loop_sums(windowed, ours, questions), abs=1e-3
    )


def test_logits_that_a_model_transforms_are_its_own(tokenizer, questions):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        head_dim=16,
        final_logit_softcapping=2.0,
        sliding_window=64,
        **SMALL,
    )
    capped = opinionated(Gemma2ForCausalLM(config))
    ours = make_scorer(capped, tokenizer)
    # only the outputs that are read are projected, then capped as the model does
    assert not ours.projects_itself
    assert sums(multiple_choice.score(TASK, questions, ours)) == pytest.approx(
        loop_sums(capped, ours, questions), abs=1e-3
    )


def test_a_model_without_attention_is_scored_the_plain_way(tokenizer, questions):
    torch.manual_seed(0)
    recurrent = MambaForCausalLM(
        MambaConfig(vocab_size=len(tokenizer), hidden_size=32, state_size=4, num_hidden_layers=2)
    ).eval()
    with torch.no_grad():
        recurrent.backbone.embeddings.weight.mul_(20)
    ours = make_scorer(recurrent, tokenizer)
    assert ours.tree_length == 0
    assert sums(multiple_choice.score(TASK, questions, ours)) == pytest.approx(
        loop_sums(recurrent, ours, questions), abs=1e-3
    )


def test_broken_weights_are_named(model, tokenizer, questions):
    broken = opinionated_copy(model).float()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^my_task: the model's log-probabilities are not finite"):
        multiple_choice.score(
            replace(TASK, name="my_task"), questions, make_scorer(broken, tokenizer, scoring="tree")
        )


def test_tree_mask_by_hand():
    mask = huggingface.tree_mask(torch.tensor([[0, 1, 1, 2, 0]]), torch.float32)[0, 0]
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
    found = list(batching.batches(lengths, batch_tokens))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        assert (
            len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= batch_tokens
        )


# Shared prefixes
# ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_shot(questions):
    """The questions behind demonstrations that they share, and some that share nothing."""
    shots = (
        "Q: Is the skull a bone? yes\n\nQ: Is the heart a bone? no\n\nQ: What is bile? a fluid of "
        "the liver\n\n"
    )
    return [
        question._replace(id=f"{question.id}-shots", prompt=shots + question.prompt)
        for question in questions
    ] + questions


@pytest.mark.parametrize("scoring", ["auto", "plain"])
def test_a_shared_prefix_changes_nothing(model, tokenizer, scorer, few_shot, scoring):
    sharing = make_scorer(model, tokenizer, batch_tokens=80, scoring=scoring)
    rows = [
        row
        for question in few_shot
        for row in sharing.option_rows(sharing.encoder.question(question.prompt, question.options))
    ]
    prefixed = [job for job in sharing._jobs(rows) if job.prefix]
    assert sum(len(job.rows) for job in prefixed) == (4 if scoring == "auto" else 0), (
        "the case is not exercised"
    )
    found = multiple_choice.score(TASK, few_shot, sharing)
    assert sums(found) == pytest.approx(loop_sums(model, scorer, few_shot), abs=1e-3)
    sharing.prefix_length = 0
    assert not any(job.prefix for job in sharing._jobs(rows))
    assert sums(multiple_choice.score(TASK, few_shot, sharing)) == pytest.approx(
        sums(found), abs=1e-4
    )


def test_rows_without_branches_share_a_prefix_too(model, tokenizer, few_shot):
    sharing = make_scorer(model, tokenizer, batch_tokens=80)
    encoded = [sharing.encoder.question(question.prompt, question.options) for question in few_shot]
    rows = [row for question in encoded for row in plain_rows(question)]
    assert any(job.prefix for job in sharing._jobs(rows))
    found, expected = (
        np.concatenate(scorer.logprobs(rows, "test"))
        for scorer in (sharing, make_scorer(model, tokenizer, scoring="plain"))
    )
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_prefix_is_never_read_from(scorer):
    """Rows that are the same up to their options leave their prompt's last token to themselves."""
    row = tree_row(scorer.encoder.question("It is", [" so", " not so"]))
    assert (
        scorer._shareable(row)
        == len(scorer.encoder.question("It is", [" so", " not so"]).prompt) - 1
    )
    assert scorer._shareable(scorer.encoder.document("It is not so.").windows[0]) == 0


def test_questions_behind_a_sliding_window_share_nothing(tokenizer, few_shot):
    torch.manual_seed(0)
    windowed = opinionated(
        MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), sliding_window=30, **SMALL))
    )
    ours = make_scorer(windowed, tokenizer, batch_tokens=8)
    assert ours.prefix_length == 30
    assert sums(multiple_choice.score(TASK, few_shot, ours)) == pytest.approx(
        loop_sums(windowed, ours, few_shot), abs=1e-3
    )


def test_keys_behind_a_prefix_are_bounded():
    whole = list(batching.batches([2] * 100, 100, prefix=0))
    behind = list(batching.batches([2] * 100, 100, prefix=198))
    assert {len(batch) for batch in whole} == {50} and {len(batch) for batch in behind} == {
        batching.KEYS * 100 // 200,
        100 % 8,
    }


def test_tree_mask_behind_a_prefix():
    segments = torch.tensor([[0, 1, 2]])
    mask = huggingface.tree_mask(segments, torch.float32, prefix=2)
    assert (mask[..., :2] == 0).all() and torch.equal(
        mask[..., 2:], huggingface.tree_mask(segments, torch.float32)
    )


# Other weights and devices
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantize", "bound"), [("8bit", 0.1), ("4bit", 0.5)])
def test_quantised_weights_are_close(tmp_path, tokenizer, questions, quantize, bound):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    exact = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **shape)
    ).eval()
    exact.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rounded = huggingface.load_scorer(
        EvaluationConfig(quantize=quantize, device="cpu"), str(tmp_path)
    )
    assert (
        "bitsandbytes" in type(rounded.model.model.layers[0].mlp.up_proj).__module__
        and rounded.tree_length > 0
    )
    expected = np.array(sums(multiple_choice.score(TASK, questions, make_scorer(exact, tokenizer))))
    off = np.abs(np.array(sums(multiple_choice.score(TASK, questions, rounded))) - expected)
    assert 1e-6 < off.max() < bound * np.abs(expected).mean()


def test_a_sharded_model_scores_the_same(tiny_model, tokenizer, questions, tmp_path):
    """Layers on the CPU and on disk, as accelerate leaves what does not fit on a GPU."""
    expected = sums(
        multiple_choice.score(
            TASK, questions, make_scorer(load_model(tiny_model, torch.float32).eval(), tokenizer)
        )
    )
    whole = huggingface.load_scorer(EvaluationConfig(device="sharded"), tiny_model)
    assert sums(multiple_choice.score(TASK, questions, whole)) == pytest.approx(expected, abs=1e-4)
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    places["model.rotary_emb"] = "cpu"
    offloaded = load_model(
        tiny_model, torch.float32, device_map=places, offload_folder=str(tmp_path)
    ).eval()
    assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta, "nothing lies on disk"
    assert sums(
        multiple_choice.score(TASK, questions, make_scorer(offloaded, tokenizer))
    ) == pytest.approx(expected, abs=1e-4)


def test_lora_layers_are_scored(model, tokenizer, questions):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        opinionated_copy(model).float(),
        peft.LoraConfig(target_modules="all-linear", init_lora_weights=False),
    ).eval()
    ours = make_scorer(adapted, tokenizer)
    assert ours.tree_length > 0 and ours.prefix_length > 0
    assert sums(multiple_choice.score(TASK, questions, ours)) == pytest.approx(
        loop_sums(adapted, ours, questions), abs=1e-3
    )


def test_half_precision_is_close(model, tokenizer, scorer, questions):
    halved = make_scorer(opinionated_copy(model).to(torch.float16), tokenizer)
    assert halved.tree_length > 0
    expected = np.array(sums(multiple_choice.score(TASK, questions, scorer)))
    assert np.array(sums(multiple_choice.score(TASK, questions, halved))) == pytest.approx(
        expected, rel=0.02
    )


# Against lm-evaluation-harness
# ----------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_log_likelihoods_are_those_of_the_harness(shared_data):
    """Real items with the real small model: each option's log-probability, and so each item's
    answer.
    """
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    (task,) = load_tasks(["arc_easy_local"], shared_data)
    questions = multiple_choice.read(task, None)[:3]
    ours = huggingface.load_scorer(EvaluationConfig(), "embedded:smollm2-135m")
    theirs = lm_eval.HFLM(pretrained=ours.model, tokenizer=ours.encoder.tokenizer, batch_size=4)
    requests = [
        Instance("loglikelihood", {}, (question.prompt, option), 0)
        for question in questions
        for option in question.options
    ]
    expected = [total for total, _ in theirs.loglikelihood(requests, disable_tqdm=True)]
    assert sums(multiple_choice.score(task, questions, ours)) == pytest.approx(expected, abs=2e-3)

import copy
import inspect
import json
import random

import generation_ranks
import pytest
import torch
from evaluation_cases import opinionated
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from ipt.evaluation.backends.base import Generation, cut
from ipt.evaluation.backends.generate import SHARED, Greedy
from tests.processes import run_ranks

STOP = ["\n"]
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def greedy_loop(model, tokenizer, prompt, stop, new):
    """The plain way: the whole text through the model for each token, no cache, no padding."""
    ids = []
    while len(ids) < new:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            return Generation(tokenizer.decode(ids[:-1]), len(ids), "eos", tuple(ids))
        text = tokenizer.decode(ids)
        if any(mark in text for mark in stop):
            return Generation(
                min((text.split(mark)[0] for mark in stop), key=len), len(ids), "stop", tuple(ids)
            )
    return Generation(tokenizer.decode(ids), len(ids), "length", tuple(ids))


def generate(model, tokenizer, prompts, stop, new, batch_tokens=100_000):
    return Greedy(model, tokenizer, stop, new).run(prompts, batch_tokens, "test")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    rng = random.Random(0)
    return [
        [rng.randrange(100, len(tokenizer)) for _ in range(length)]
        for length in (3, 9, 1, 14, 9, 30, 5, 2)
    ]


def frequent_texts(model, tokenizer, prompts, new):
    """Two texts that the model says in some of its answers and not in others: so that sequences
    stop at different times.
    """
    spoken = [greedy_loop(model, tokenizer, prompt, [], new).text for prompt in prompts]
    found = [
        mark
        for mark in sorted(set("".join(spoken)))
        if 1 < sum(mark in text for text in spoken) < len(spoken)
    ]
    assert len(found) >= 2, "the fixture must have sequences that stop and others that do not"
    return found[:2]


def test_each_sequence_is_what_the_plain_loop_says_and_stops_on_its_own(
    scorer, model, tokenizer, prompts
):
    stop = frequent_texts(model, tokenizer, prompts, 12)
    expected = [greedy_loop(model, tokenizer, prompt, stop, 12) for prompt in prompts]
    assert {generation.finish for generation in expected} >= {"stop", "length"}
    assert len({generation.tokens for generation in expected}) > 2
    assert scorer.generate(prompts, stop, 12, "test") == expected


@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
def test_batches_and_order_do_not_matter(model, tokenizer, prompts, batch_tokens):
    expected = [greedy_loop(model, tokenizer, prompt, STOP, 8) for prompt in prompts]
    order = random.Random(1).sample(range(len(prompts)), len(prompts))
    found = generate(model, tokenizer, [prompts[index] for index in order], STOP, 8, batch_tokens)
    assert found == [expected[index] for index in order]


def test_finished_sequences_leave_the_batch(model, tokenizer, prompts, monkeypatch):
    stop = frequent_texts(model, tokenizer, prompts, 12)
    rows, forward = [], model.forward

    def counted(*args, **inputs):
        rows.append(len(inputs["input_ids"]))
        return forward(*args, **inputs)

    counted.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", counted)
    generations = generate(model, tokenizer, prompts, stop, 12)
    steps = range(1, max(generation.tokens for generation in generations) + 1)
    assert rows == [sum(generation.tokens >= step for generation in generations) for step in steps]


def test_a_beginning_that_all_share_is_computed_once(model, tokenizer, prompts, monkeypatch):
    beginning = [100 + token for token in range(SHARED)]
    longer = [beginning + prompt for prompt in prompts]
    expected = [greedy_loop(model, tokenizer, prompt, STOP, 6) for prompt in longer]
    widths, forward = [], type(model).forward

    def counted(self, **inputs):
        widths.append(tuple(inputs["input_ids"].shape))
        return forward(self, **inputs)

    counted.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(model), "forward", counted)
    found = generate(model, tokenizer, longer, STOP, 6)
    assert widths[:2] == [(1, SHARED), (len(prompts), max(map(len, prompts)))]
    assert found == expected


@pytest.mark.parametrize("kind", ["sliding window", "recurrent"])
def test_other_architectures(tokenizer, prompts, kind):
    torch.manual_seed(0)
    if kind == "recurrent":
        config = MambaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=2,
            state_size=4,
            eos_token_id=0,
        )
        model = opinionated(MambaForCausalLM(config))
    else:
        config = MistralConfig(vocab_size=len(tokenizer), sliding_window=6, eos_token_id=0, **SHAPE)
        model = opinionated(MistralForCausalLM(config))
    expected = [greedy_loop(model, tokenizer, prompt, STOP, 8) for prompt in prompts]
    beginning = [100 + token for token in range(SHARED)]
    assert generate(model, tokenizer, prompts, STOP, 8) == expected
    longer = [beginning + prompt for prompt in prompts]
    assert generate(model, tokenizer, longer, STOP, 3) == [
        greedy_loop(model, tokenizer, prompt, STOP, 3) for prompt in longer
    ]


def test_the_end_of_text_ends_a_sequence(model, tokenizer, prompts, monkeypatch):
    spoken = greedy_loop(model, tokenizer, prompts[0], [], 6)
    assert spoken.tokens == 6
    ids = tokenizer(spoken.text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ids)  # whatever comes first
    found = generate(model, tokenizer, [prompts[0]], [], 6)
    assert found[0].finish == "eos" and found[0].tokens < 6


def test_broken_weights_are_told(tokenizer, model, prompts):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generate(broken, tokenizer, prompts, STOP, 2)


def test_cut():
    assert [cut("a\nb.c", stop) for stop in (["\n"], [".", "\n"], [], ["x"])] == [
        "a",
        "a",
        "a\nb.c",
        "a\nb.c",
    ]


def test_two_processes_divide_the_batches_and_call_a_sharded_model_alike(
    model, tokenizer, prompts, tmp_path
):
    several = [
        *prompts,
        *([100 + token for token in range(SHARED)] + prompt for prompt in prompts[:3]),
    ]
    (tmp_path / "asked.json").write_text(
        json.dumps({"prompts": several, "new": 6, "batch_tokens": 250})
    )
    assert len(list(Greedy(model, tokenizer, STOP, 6)._batches(several, 250))) % 2, (
        "the fixture must leave a process without a batch"
    )
    ended = run_ranks(generation_ranks.main, tmp_path)
    assert ended.codes == [0, 0], ended.output
    expected = json.loads(
        json.dumps([greedy_loop(model, tokenizer, prompt, STOP, 6) for prompt in several])
    )
    said = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(2)]
    assert all(answers[kind] == expected for answers in said for kind in ("whole", "sharded"))
    assert said[0]["calls"] == said[1]["calls"]

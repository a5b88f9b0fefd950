"""Which config keys take part in cache keys."""

from dataclasses import replace

import pytest

from ipt.config import (
    EvaluationConfig,
    FilterConfig,
    JudgeConfig,
    MixtureConfig,
    SynthesisConfig,
    TokensConfig,
    TrainerConfig,
    key_settings,
)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (SynthesisConfig(), {"max_num_seqs": 1}),
        (SynthesisConfig(), {"cluster": "ray"}),
        (FilterConfig(), {"judge": JudgeConfig(concurrency=1)}),
        (TokensConfig(), {"workers": 3}),
        (TrainerConfig(), {"devices": 8}),
        (TrainerConfig(), {"profiler": "torch"}),
        (MixtureConfig(), {"ratios": {"raw": 1.0}}),  # the schedule is part of the key instead
        (EvaluationConfig(), {"contamination": ["folder"]}),
    ],
    ids=str,
)
def test_keys_without_an_effect_on_the_result_are_left_out(config, changes):
    assert key_settings(replace(config, **changes)) == key_settings(config)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (SynthesisConfig(), {"temperature": 0.5}),
        (SynthesisConfig(), {"engine": "openai"}),
        (FilterConfig(), {"judge": JudgeConfig(max_tokens=1)}),
        (TokensConfig(), {"eos": False}),
        (TrainerConfig(), {"max_steps": 8}),
        (MixtureConfig(), {"seq_len": 8}),
        (EvaluationConfig(), {"limit": 1}),
    ],
    ids=str,
)
def test_all_other_keys_take_part(config, changes):
    changed = key_settings(replace(config, **changes))
    assert changed != key_settings(config)
    assert list(changed) == list(key_settings(config))

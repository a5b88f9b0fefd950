"""What stages know of a model."""

import pytest

from ipt.config import SynthesisConfig
from ipt.models import load_tokenizer, model_identity
from ipt.synthesis.run import synthesis_inputs


@pytest.fixture
def folder(tmp_path):
    load_tokenizer("embedded:tiny").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "is_tokenizer"),
    [
        ("chat_template.jinja", False),
        ("additional_chat_templates/tools.jinja", False),
        ("generation_config.json", False),
        ("tokenizer_config.json", True),
        ("special_tokens_map.json", True),
        ("merges.txt", True),
        ("spiece.model", True),
    ],
)
def test_every_file_that_decides_what_a_model_reads_is_part_of_its_identity(folder, file, is_tokenizer):
    before = [model_identity(str(folder), tokenizer_only) for tokenizer_only in (False, True)]
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text('{"changed": true}')
    after = [model_identity(str(folder), tokenizer_only) for tokenizer_only in (False, True)]
    assert [one != other for one, other in zip(before, after, strict=True)] == [True, is_tokenizer]


@pytest.mark.parametrize("key", ["model", "tokenizer"])
def test_the_chat_template_of_a_servers_tokenizer_decides_its_prompts(folder, key):
    names = {"model": "served", "tokenizer": None} | {key: str(folder)}
    config = SynthesisConfig(engine="openai", format="chat", prompt="faq", **names)
    before = synthesis_inputs(config)
    (folder / "chat_template.jinja").write_text("changed")
    assert synthesis_inputs(config) != before

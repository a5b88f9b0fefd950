"""What stages know of a model."""

import shutil

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
def test_every_file_that_decides_what_a_model_reads_is_part_of_its_identity(
    folder, file, is_tokenizer
):
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


def test_a_tokenizer_is_the_caller_s_own_and_that_of_the_files_as_they_are(tiny_model, tmp_path):
    folder = str(shutil.copytree(tiny_model, tmp_path / "model"))
    first, plain = load_tokenizer(folder), load_tokenizer(folder).encode("The heart")
    first.add_tokens(["heart"])
    first.chat_template = "{{ 1 }}"
    second = load_tokenizer(folder)
    assert first.encode("The heart") != plain == second.encode("The heart")
    assert second.chat_template != "{{ 1 }}"
    first.save_pretrained(folder)
    assert load_tokenizer(folder).encode("The heart") == first.encode("The heart")
    assert load_tokenizer(folder).chat_template == "{{ 1 }}"

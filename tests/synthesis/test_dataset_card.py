import pytest
import yaml
from quality_cases import HEART, write_chains

from ipt.config import SynthesisConfig
from ipt.synthesis.dataset_card import write_card
from ipt.synthesis.quality.statistics import statistics
from ipt.synthesis.run import synthesis_settings

HOSTILE = "````\n---\n# Not a heading {{ 7 * 7 }} | x |\n````"


@pytest.fixture
def output(tmp_path):
    pairs = [("What pumps blood?", "The heart"), (HOSTILE, "No | idea")]
    write_chains(
        tmp_path / "pairs",
        [[("a", HEART, pairs), ("b", HEART, [])], [("c", HEART, [], "Blood is pumped.")]],
        dropped={"empty": 2},
    )
    return tmp_path


def card(output, extra=None, **changes):
    stats = {**statistics(output / "pairs"), **(extra or {})}
    write_card(output, stats, synthesis_settings(SynthesisConfig(**changes)), 0)
    return (output / "README.md").read_text()


def test_the_header_is_that_of_a_hub(output):
    text = card(output)
    start, header, body = text.split("---\n", 2)
    assert start == "" and yaml.safe_load(header)["configs"] == [
        {"config_name": "default", "data_files": "pairs/part-*.parquet"}
    ]
    assert yaml.safe_load(header)["size_categories"] == ["n<1K"] and body.startswith("# ")


def test_a_hub_reads_the_pairs_by_the_card(output):
    datasets = pytest.importorskip("datasets")
    card(output)
    rows = datasets.load_dataset(str(output), split="train", cache_dir=str(output / ".cache"))
    assert rows["doc_id"] == ["a", "b", "c"] and rows[0]["pairs"][0]["answer"] == "The heart"


def test_it_says_how_many_of_what_and_how(output):
    text = card(output, model="some/model", shots=2)
    for line in (
        "- documents: 5 (all inputs)",
        "- dropped: empty 2 (not included, by reason)",
        "- pairs: 2",
        "- rows with a rewrite: 1",
    ):
        assert f"\n{line}\n" in text
    assert "the model `some/model`" in text and "\nshots: 2\n" in text and "\nseed: 0\n" in text
    assert "| verbatim answers | 50.0% | occur in the document word for word |" in text
    assert "| fact | 1 | 50.0% |" in text and "The documents keep their licence" in text


def test_a_judge_is_quoted_with_its_intervals(output):
    judge = {"judged": 500, "accuracy": 0.775, "accuracy_ci95": [0.7363, 0.8094], "relevance": None}
    text = card(output, {"judge": judge})
    assert (
        "| correct answers | 77.5% | 95%: 73.6% to 80.9%, by a judge model, of 500 |" in text
        and "pairs about their document |" not in text
    )


def test_examples_are_shown_as_they_are_whatever_they_hold(output):
    text = card(output)
    assert (
        f"\n`````text\n{HEART}\n\nQ: What pumps blood?\nA: The heart\n\nQ: {HOSTILE}\nA: No | "
        "idea\n`````\n" in text
    )
    assert f"\n```text\n{HEART}\n\nBlood is pumped.\n```\n" in text


def test_the_same_pairs_have_the_same_card(output):
    stats = {"cached_tokens": 5, "generator_flops": 10, "session": {"seconds": 3}}
    assert card(output) == card(output, stats)


def test_rules_are_named_where_no_model_wrote(output):
    text = card(output, format="rule_based")
    assert (
        "pairs that rules wrote about it" in text
        and "- Rules wrote the pairs" in text
        and "model" not in text.partition("## Limits")[2]
    )

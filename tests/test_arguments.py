"""Values on the command line, as Hydra reads them."""

import os

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from ipt.arguments import plain_arguments
from ipt.config import Config, compose_config
from ipt.errors import UserError

NAMES = [
    "year=2024/c.jsonl",
    "ünï/Größe 心.jsonl",
    "a b (1).jsonl",
    "a,b.jsonl",
    "[a]",
    "{a}",
    "it's",
    'say "a"',
    "'a' b",
    "#1: 100%",
    "$x & y; z!",
    "<a>|b",
    " a ",
    "a\nb",
    "007",
    "1e3",
    "2024.10",
    "1_000",
    "true",
    "nan",
    "run(1)",
    "r{1}",
    "a\\",
    "back\\slash",
    "x=y=z",
    "a]",
    "\udcff",
    "1" * 5_000,
    "a'\\",
]


@pytest.mark.parametrize("key", ["output_dir", "corpus.path", "model", "title"])
@pytest.mark.parametrize("name", NAMES)
def test_a_plain_value_arrives_as_it_was_typed(key, name):
    (argument,) = plain_arguments([f"{key}={name}"], Config)
    assert OverridesParser.create().parse_override(argument).value() == name


def test_values_arrive_in_the_config():
    config = compose_config(
        "train",
        [
            "corpus.path=a=1, (x)/ü.jsonl",
            "title=Raw, augmented: a=b",
            "+mixture.sources.d.path=[x],y",
            "tasks=[a=b/c.yaml,d e.yaml]",
        ],
    )
    assert (config.corpus.path, config.title) == ("a=1, (x)/ü.jsonl", "Raw, augmented: a=b")
    assert (config.mixture.sources["d"].path, config.tasks) == ("[x],y", ["a=b/c.yaml", "d e.yaml"])


@pytest.mark.parametrize(
    "argument",
    [
        "output_dir=null",
        "output_dir='a,b'",
        'output_dir="a b"',
        "output_dir=a\\,b",
        "output_dir=runs/${seed}",
        "optimizer.lr=1e-3",
        "optimizer.lr=1e-3,1e-4",
        "tasks=[a,b]",
        "mixture.ratios={raw: 0.5, instruction: 0.5}",
        "mixture.ratios.instruction=interval(0,1)",
        "trainer.seed=range(1,3)",
        "corpus.path=choice(a,b)",
        "~trainer.seed",
        "~logger.wandb.tags=[a]",
        "+mixture.ratios.web=1",
        "++trainer.max_steps=1",
        "experiment=tiny",
        "--cfg",
        "job",
    ],
)
def test_what_hydra_understands_keeps_its_meaning(argument):
    assert plain_arguments([argument], Config) == [argument]


def test_values_of_options_are_no_overrides():
    assert plain_arguments(["--config-dir", "x/y=ü", "seed=1"], Config) == [
        "--config-dir",
        "x/y=ü",
        "seed=1",
    ]


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("corpus.path=a,b", ["a", "b"]),
        ("corpus.path=y=1/a.jsonl,y=2/ü.jsonl", ["y=1/a.jsonl", "y=2/ü.jsonl"]),
        ("corpus.path=choice(y=1,y=2)", ["y=1", "y=2"]),
        ("corpus.path='a,b',c=d", ["a,b", "c=d"]),
        ("output_dir=001,1e3", ["001", "1e3"]),
        ("trainer.seed=1,2", [1, 2]),
    ],
)
def test_a_sweep_has_each_value_as_it_was_typed(argument, values):
    _, plain = plain_arguments(["-m", argument], Config)
    sweep = OverridesParser.create().parse_override(plain).value()
    assert [getattr(value, "text", value) for value in sweep.list] == values


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = [
        "output_dir=~/runs",
        "corpus.path=~/a.jsonl,~/b=c",
        "tasks=[~/t.yaml,medicine]",
        "+mixture.sources.d.path=~/d",
    ]
    config = compose_config("train", overrides)
    assert config.output_dir == f"{tmp_path}/runs"
    assert config.corpus.path == f"{tmp_path}/a.jsonl,{tmp_path}/b=c"
    assert config.tasks == [f"{tmp_path}/t.yaml", "medicine"]
    assert config.mixture.sources["d"].path == f"{tmp_path}/d"


def test_a_tilde_without_a_home_folder_is_named(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)  # which has no entry in the list of users
    with pytest.raises(UserError, match=r"~/runs: HOME is not set: write the full path"):
        compose_config("train", ["output_dir=~/runs"])

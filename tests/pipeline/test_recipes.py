"""Recipes: each composes and dry-runs without a network, and its arithmetic is the published
one.
"""

import os
import re
import socket
from copy import deepcopy
from dataclasses import asdict
from functools import cache, partial

import pytest

from ipt.config import Config, compose_config, conf_dir
from ipt.evaluation.task import load_tasks
from ipt.files import hash_json
from ipt.mixture.schedule import resolve_ratios, used_sources
from ipt.pipeline.dry_run import training as dry_run_module
from ipt.pipeline.dry_run.arms import dry_run_arms, plan_arms
from ipt.pipeline.dry_run.inputs import FETCHED, HERE, MISSING, training_inputs
from ipt.pipeline.dry_run.training import Needs, dry_run, remedies, training_needs
from ipt.pipeline.stages import arm_config
from tests.commands import ROOT, run, run_here

RECIPES = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
# recipe: tokens of a step, steps, sequence length, peak learning rate, warm-up steps (paper,
# sections 1, 3 and 4)
PUBLISHED = {
    "medicine_llama3_8b": (2**18, 4_000, 4096, 1e-5, 1000),
    "finance_llama3_8b": (2**18, 4_000, 4096, 1e-5, 1000),
    "general_500m": (2**19, 200_000, 2048, 3e-4, 2000),
    "general_1b3": (2**20, 100_000, 2048, 2e-4, 2000),
    "synthesizer_mistral_7b": (16_384, 61_000, 4096, 5e-6, 1000),
}
TABLES = {  # recipe of a table of the paper: the recipe that it is built on
    "table1": "general_500m",
    "table1_1b3": "general_1b3",
    "table3_medicine": "medicine_llama3_8b",
    "table3_finance": "finance_llama3_8b",
    "table4_ablation": "medicine_llama3_8b",
}
WITH_ARMS = [
    name for name in RECIPES if "arms:" in (conf_dir() / "experiment" / f"{name}.yaml").read_text()
]
CONTINUAL, SCRATCH = ("medicine_llama3_8b", "finance_llama3_8b"), ("general_500m", "general_1b3")


def recipe(name: str, *overrides: str, command: str = "train") -> Config:
    """A copy of the composed config, which the test may change."""
    return deepcopy(_composed(command, f"experiment={name}", *overrides))


@cache
def _composed(command: str, *overrides: str) -> Config:
    return compose_config(command, overrides)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """In an empty folder, where every attempt to reach another machine is an error that no library
    could take for bad luck.
    """

    def refuse(*arguments):
        raise AssertionError("a dry run reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def _trainings_traced_once():
    """Recipes share trainings, and arms of a recipe have the same one: what each needs is computed
    once for all tests.
    """
    known: dict[str, Needs] = {}

    def needs(config: Config) -> Needs:
        model = [config.model, config.architecture, asdict(config.lora), config.mixture.seq_len]
        key = hash_json(
            [
                asdict(config.trainer),
                asdict(config.optimizer),
                *model,
                config.dry_run_gpu,
                config.dry_run_mfu,
            ]
        )
        if key not in known:
            known[key] = training_needs(config)
        return known[key]

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("ipt.pipeline.dry_run.training.training_needs", needs)
        patches.setattr("ipt.pipeline.dry_run.arms.training_needs", needs)
        yield


@cache
def needs_of(name: str) -> Needs:
    return dry_run_module.training_needs(recipe(name))


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_dry_runs_and_leaves_nothing_behind(name, offline, capsys, tmp_path):
    dry_run(recipe(name))
    text = said(capsys)
    for part in (
        "dry run of " + name,
        "Inputs",
        "Mixture",
        "FLOPs",
        "optimizer state",
        "activations",
        "fits",
    ):
        assert part in text
    assert "does not fit" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WITH_ARMS)
def test_every_recipe_with_arms_is_planned_without_a_network(name, offline, capsys, tmp_path):
    config = recipe(name, "seeds=[]", command="reproduce")
    labels = [step.label for step in plan_arms(config)]
    assert [label for label in labels if label.startswith("training")] == [
        f"training {arm}" for arm in config.only or config.arms
    ]
    assert ("evaluation start" in labels) == (not config.architecture)
    dry_run_arms(config)
    text = said(capsys)
    assert "Stages of all arms" in text and f"{len(labels)} of {len(labels)} left" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "base"), TABLES.items())
def test_recipes_of_the_papers_tables_are_their_bases_with_scores(name, base):
    table, config = recipe(name), recipe(base)
    for key in ("name", "title", "tasks", "only", "published", "evaluation", "arms"):
        setattr(table, key, getattr(config, key))
    assert table == config


@pytest.mark.parametrize("name", TABLES)
def test_published_names_are_those_of_the_tasks_and_arms_those_of_the_base(name):
    config = recipe(name)
    known = {model for task in load_tasks(config.tasks) for model in task.published}
    named = [config.arms[arm].get("published") for arm in config.only]
    assert known.issuperset(filter(None, [config.published, *named])) and any(named)
    base = recipe(TABLES[name]).arms
    assert {arm: {**changes, "published": None} for arm, changes in config.arms.items()} == {
        arm: {**changes, "published": None} for arm, changes in base.items()
    }


@pytest.mark.parametrize("name", ["mini_medicine", "mini_medicine_cpu"])
def test_arms_of_mini_medicine_have_one_budget_and_change_what_they_are_named_for(name):
    config = recipe(name)
    arms = {arm: arm_config(config, changes) for arm, changes in config.arms.items()}
    assert set(config.only) <= set(arms)
    for arm in arms.values():
        assert (arm.trainer, arm.lr_scheduler, arm.model, arm.corpus) == (
            config.trainer,
            config.lr_scheduler,
            config.model,
            config.corpus,
        )
        assert sum(resolve_ratios(arm.mixture.ratios).values()) == pytest.approx(1)
    changed = {arm for arm, changes in arms.items() if changes.optimizer != config.optimizer}
    assert changed == {"vanilla_repeated_decay_1", "vanilla_repeated_decay_3"}
    assert used_sources(arms["vanilla_repeated"].mixture) == ["raw"]
    assert config.seeds == [0, 1, 2] and config.corpus.held_out_by == "chapter"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_numbers(name):
    config, (tokens_per_step, steps, seq_len, lr, warmup) = recipe(name), PUBLISHED[name]
    trainer = config.trainer
    assert (
        trainer.world_size
        * trainer.micro_batch_size
        * trainer.accumulate_grad_batches
        * config.mixture.seq_len
        == tokens_per_step
    )
    assert (
        trainer.max_steps,
        config.mixture.seq_len,
        config.optimizer.lr,
        config.lr_scheduler.warmup_steps,
    ) == (steps, seq_len, lr, warmup)
    assert (config.optimizer.betas, config.optimizer.weight_decay, trainer.gradient_clip_val) == (
        [0.9, 0.95],
        0.1,
        1.0,
    )
    assert config.lr_scheduler.name == "cosine"
    needs = needs_of(name)
    assert (needs.tokens_per_step, needs.tokens) == (tokens_per_step, tokens_per_step * steps)
    assert needs.parameters == needs.trainable


def test_models_have_the_published_sizes():
    sizes = {
        "general_500m": 567.9,
        "general_1b3": 1347.5,
        "medicine_llama3_8b": 8030.3,
        "synthesizer_mistral_7b": 7241.7,
    }
    assert {name: round(needs_of(name).parameters / 1e6, 1) for name in sizes} == sizes


@pytest.mark.parametrize("name", [*CONTINUAL, *SCRATCH])
def test_arms_change_their_data_and_nothing_else(name):
    config = recipe(name)
    arms = {arm: arm_config(config, changes) for arm, changes in config.arms.items()}
    assert list(arms) == ["vanilla", "mix", "instruct", "without_corpora", "rule_based", "one_shot"]
    for arm in arms.values():
        assert (arm.trainer, arm.optimizer, arm.lr_scheduler, arm.model) == (
            config.trainer,
            config.optimizer,
            config.lr_scheduler,
            config.model,
        )
    assert set(used_sources(arms["vanilla"].mixture)) <= {"raw", "unconverted"}
    assert set(used_sources(arms["mix"].mixture)) <= {"raw", "unconverted", "collection"}
    assert arms["instruct"] == config
    assert (
        arms["without_corpora"].rendering.arrangement
        == "pairs_only"
        != config.rendering.arrangement
    )
    assert (arms["rule_based"].synthesis.format, config.synthesis.format) == ("rule_based", "ipt")
    assert (arms["one_shot"].synthesis.shots, config.synthesis.shots) == (
        1,
        3 if name in CONTINUAL else 2,
    )


def test_shares_of_the_domain_mixtures():
    for name, domain in zip(CONTINUAL, (1 / 2, 1 / 3), strict=True):
        shares = resolve_ratios(recipe(name).mixture.ratios)
        assert shares["instruction"] == pytest.approx(domain)
        assert shares["openorca"] + shares["wizardlm"] + shares["lima"] == pytest.approx(1 - domain)


@pytest.mark.parametrize("name", SCRATCH)
def test_shares_of_the_mixture_from_scratch(name):
    """80 B raw tokens, 20 B with 10 B of pairs, and 0.2 B of tuning data four times, in a run of
    104.86 B.
    """
    config = recipe(name)
    tokens, shares = needs_of(name).tokens, resolve_ratios(config.mixture.ratios)
    assert shares["collection"] * tokens == pytest.approx(4 * 0.2e9, rel=1e-3)
    assert shares["unconverted"] / shares["instruction"] == pytest.approx(80 / 30, rel=1e-3)
    vanilla, mix = (
        resolve_ratios(arm_config(config, config.arms[arm]).mixture.ratios)
        for arm in ("vanilla", "mix")
    )
    assert mix["collection"] == pytest.approx(shares["collection"])
    assert vanilla["unconverted"] / vanilla["raw"] == pytest.approx(
        mix["unconverted"] / mix["raw"], rel=1e-3
    )


@pytest.mark.parametrize(
    ("command", "start"), [("train", run_here), ("reproduce", partial(run, "-m", "ipt"))]
)
def test_from_the_command_line(command, start, tmp_path):
    result = start(command, "experiment=medicine_llama3_8b", "dry_run=true", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "8,030,261,248" in result.stderr and "262,144" in result.stderr
    assert "arms of" in result.stderr and "without_corpora" in result.stderr
    assert "bitsandbytes" not in result.stderr and "Traceback" not in result.stderr


def test_what_does_not_fit_is_said_with_what_to_change(offline, capsys):
    config = recipe(
        "medicine_llama3_8b",
        "dry_run_gpu=RTX4090",
        "trainer.devices=1",
        "trainer.accumulate_grad_batches=64",
        "trainer.micro_batch_size=1",
    )
    dry_run(config)
    text = said(capsys)
    assert "does not fit:" in text and "Possible changes:" in text
    assert re.search(
        r"trainer\.devices=\d+ trainer\.accumulate_grad_batches=\d+: [\d.]+ GiB, fits", text
    )
    *others, (changes, needs) = remedies(config)
    assert needs.fits and not any(other.fits for _, other in others)
    assert needs.tokens_per_step == 2**18
    changed = recipe(
        "medicine_llama3_8b",
        "dry_run_gpu=RTX4090",
        "trainer.devices=1",
        "trainer.accumulate_grad_batches=64",
        *changes.split(),
    )
    assert training_needs(changed) == needs  # what is printed can be typed


def test_what_fits_nowhere_is_said(offline, capsys):
    smallest = [
        "trainer.activation_checkpointing=full",
        "optimizer=adamw_8bit",
        "trainer.micro_batch_size=1",
        "trainer.accumulate_grad_batches=1",
    ]
    dry_run(recipe("general_500m", "mixture.seq_len=524288", *smallest, "dry_run_gpu=RTX4090"))
    assert (
        "a GPU with more memory, LoRA (lora.rank=16), shorter sequences or a smaller model"
        in said(capsys)
    )


def test_lora_makes_an_8b_model_smaller():
    whole, lora = (
        training_needs(recipe("medicine_llama3_8b", "trainer.devices=1", *more))
        for more in ([], ["lora.rank=16"])
    )
    assert lora.trainable < 0.01 * lora.parameters
    assert lora.memory.optimizer < 0.01 * whole.memory.optimizer
    assert lora.flops_per_token < 0.75 * whole.flops_per_token


def test_time_is_flops_over_peak_and_mfu_and_unknown_says_unknown(offline, capsys):
    needs = needs_of("medicine_llama3_8b")
    # a day on four A100, as published
    assert needs.seconds == pytest.approx(51.47e9 * 1.048576e9 / (4 * 312e12 * 0.5), rel=1e-3)
    dry_run(recipe("medicine_llama3_8b", "dry_run_gpu=MI300X"))
    text = said(capsys)
    assert "the peak FLOP/s of MI300X are not known" in text
    assert "the memory of MI300X is not known" in text
    with pytest.raises(ValueError, match=r"dry_run_mfu=1\.5"):
        dry_run(recipe("tiny", "dry_run_mfu=1.5"))


def test_inputs_are_here_missing_or_to_be_fetched(offline, tmp_path, monkeypatch):
    states = {item.what: item for item in training_inputs(recipe("medicine_llama3_8b"))}
    assert (
        states["model"].state
        == states["source openorca"].state
        == states["synthesizer"].state
        == FETCHED
    )
    assert states["corpus"].state == MISSING and "data/pubmed_abstracts" in states["corpus"].problem
    (tmp_path / "data" / "pubmed_abstracts").mkdir(parents=True)
    (tmp_path / "data" / "pubmed_abstracts" / "0.jsonl").write_text('{"text": "An abstract."}\n')
    assert {item.what: item for item in training_inputs(recipe("medicine_llama3_8b"))}[
        "corpus"
    ].state == HERE
    remote = recipe("medicine_llama3_8b", "corpus.path=https://example.org/abstracts.jsonl")
    assert {item.what: item for item in training_inputs(remote)}["corpus"].state == FETCHED
    flan = {item.what: item for item in training_inputs(recipe("instruction_tuning"))}[
        "source flan"
    ]
    assert flan.problem.startswith("mixture.sources.flan.path=data/flan: no such file")
    with pytest.raises(ValueError, match=r"mixture\.ratios\.web: no such source"):
        training_inputs(recipe("medicine_llama3_8b", "+mixture.ratios.web=1"))


def test_a_token_store_tells_its_tokens_and_repeats(offline, capsys, tmp_path):
    import numpy as np

    from ipt.tokens.store import EncodedDocument, write_store

    write_store(
        tmp_path / "store",
        [EncodedDocument(np.arange(1000, dtype=np.uint32))],
        "fingerprint",
        10_000,
    )
    store = ["+mixture.ratios.mine=1", "mixture.ratios.raw=0", "mixture.ratios.instruction=0"]
    dry_run(
        recipe(
            "tiny",
            *store,
            "+mixture.sources.mine.kind=store",
            f"+mixture.sources.mine.path={tmp_path / 'store'}",
        )
    )
    assert "│ mine │ 100.00% │ 3,072 │ 1,000 │ 3.07 │" in said(capsys)


def test_other_commands_have_no_dry_run(tmp_path):
    result = run_here("evaluate", "dry_run=true", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == (
        "error: dry_run=true describes a training: use it with train or reproduce, not with "
        "evaluate\n"
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_hours_in_the_docs_are_those_of_the_dry_run(name):
    row = next(
        line
        for line in (ROOT / "docs" / "recipes.md").read_text().splitlines()
        if line.startswith(f"| `{name}`")
    )
    config = recipe(name)
    needs = needs_of(name)
    assert needs.seconds is not None
    assert f"{needs.seconds / 3600:,.0f} h" in row
    assert f"{config.trainer.devices} A100" in row
    page = page_of(name)
    assert f"{needs.seconds * config.trainer.devices / 3600:,.1f} GPU-hours" in page
    assert f"{PUBLISHED[name][0] * PUBLISHED[name][1]:,}" in page


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_its_section_in_the_docs(name):
    assert f"\n## `{name}`\n" in page_of(name)


def test_the_network_is_off_in_these_tests():
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def page_of(name: str) -> str:
    """The page that the recipe's row in docs/recipes.md leads to."""
    row = next(
        line
        for line in (ROOT / "docs" / "recipes.md").read_text().splitlines()
        if line.startswith(f"| `{name}` |")
    )
    link = re.search(rf"\((recipes/\w+\.md)#{name}\)", row)
    assert link, f"the row of {name} leads to no section of a page"
    return (ROOT / "docs" / link[1]).read_text()

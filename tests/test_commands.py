"""The commands as a user runs them: help, mistakes, and every recipe of conf/."""

import resource
from functools import partial
from itertools import zip_longest
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ipt.cli import _check_current_folder
from ipt.config import Config, conf_dir, to_config
from ipt.pipeline.stages import arm_config
from ipt.pipeline.validation import check_evaluate, check_reproduce, check_synthesize
from tests.commands import ROOT, run, run_here

# also in a process of their own, which imports anew
ALONE = ("model={no_tokenizer}", "corpus.path={no_text}", "trainer.max_step=3")
RECIPES = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
CHOICES = {
    group.name: sorted(path.stem for path in group.glob("*.yaml"))
    for group in conf_dir().iterdir()
    if group.is_dir() and group.name != "experiment"
}


def composed(command: str, *overrides: str) -> Config:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(compose(command, list(overrides)))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes_into_the_typed_config(name):
    config = composed("train", f"experiment={name}")
    assert isinstance(config, Config)
    for changes in config.arms.values():
        arm_config(config, changes)


@pytest.mark.parametrize(
    "choices",
    zip_longest(
        *([f"{group}={name}" for name in names] for group, names in sorted(CHOICES.items()))
    ),
)
def test_every_other_file_of_conf_composes_into_the_typed_config(choices):
    """The first files of all groups, then the second ones, and so on: each replaces another part of
    the config.
    """
    assert isinstance(composed("train", *filter(None, choices)), Config)


def test_recipes_with_arms_pass_their_checks_and_the_others_say_so(monkeypatch):
    for path in (conf_dir() / "experiment").glob("*.yaml"):
        config = composed("reproduce", f"experiment={path.stem}")
        if not config.arms:
            with pytest.raises(
                ValueError, match=f"train it with `python train.py experiment={path.stem}`"
            ):
                check_reproduce(config)
        elif config.corpus.path is None:  # the others read data that a user has to fetch
            check_reproduce(config)
    check_evaluate(composed("evaluate"))
    check_synthesize(composed("synthesize"))


@pytest.mark.parametrize("command", ["synthesize", "train", "evaluate"])
def test_help_and_config_are_quick(command, tmp_path):
    for flags, expected in (
        (["--help"], "Keys you are likely to set"),
        (["--cfg", "job"], "output_dir: null"),
    ):
        before = _seconds_of_children()
        result = run("-X", "importtime", str(ROOT / f"{command}.py"), *flags, cwd=tmp_path)
        assert _seconds_of_children() - before < 10  # of the processor: 1.3 s on a machine of today
        assert result.returncode == 0, result.stderr
        assert expected in result.stdout
        imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
        assert not imported & {"torch", "transformers", "lightning", "vllm"}
    assert list(tmp_path.iterdir()) == []


def _seconds_of_children() -> float:
    """Processor time of the processes that have ended, which other load on the machine does not
    lengthen.
    """
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_current_folder_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit):
        _check_current_folder()
    assert capsys.readouterr().err.startswith(
        "error: the current folder cannot be used (No such file or directory)"
    )


def _broken_model(folder: Path) -> str:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return str(folder / "model")


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        (
            "train",
            ["trainer.max_step=3"],
            "there is no key trainer.max_step: did you mean trainer.max_steps?",
        ),
        ("evaluate", [f"tasks=[{'a' * 300}]"], "File name too long: "),
        ("train", [f"{'a' * 300}=1"], "File name too long: "),
        (
            "train",
            ["trainer.max_steps=many"],
            "Value 'many' of type 'str' could not be converted to Integer",
        ),
        ("train", ["mixture.ratios.instruction=0,1"], "put -m before the keys"),
        (
            "train",
            ["-m", "trainer.seed=1,2", "dry_run=true"],
            "dry_run=true describes one run: leave out -m",
        ),
        (
            "train",
            ["experiment=tiny", "trainer.accelerator=gpu"],
            "finds no GPU here; use trainer=cpu",
        ),
        ("evaluate", ["tasks=ontology"], "write a list in brackets, as KEY=[a,b]"),
        ("train", ["corpus=web"], "Could not find 'corpus/web'; there are: files, hub, ontology"),
        (
            "train",
            ["mixture.ratios.instruction=-1"],
            "mixture.ratios.instruction=-1.0: a ratio must be zero or more",
        ),
        (
            "train",
            ["mixture.ratios.instruction=0", "mixture.ratios.raw=0"],
            "mixture.ratios sum to 0",
        ),
        ("train", ["+mixture.ratios.web=1"], "mixture.ratios.web: no such source"),
        (
            "train",
            ["mixture.ratios.web=1"],
            "there is no key mixture.ratios.web yet: write +mixture.ratios.web=… to add it",
        ),
        (
            "train",
            ["architecture={{model_type: llama}}"],
            "architecture has no such keys yet: write ++architecture={…} to add them",
        ),
        ("train", ["+mixture.sources.web.paths=a"], "there is no key mixture.sources.web.paths"),
        (
            "train",
            ["+mixture.ratios.web=1", "+mixture.sources.web.kind=texts"],
            "mixture.sources.web: set either path (files) or dataset",
        ),
        ("train", ["model=nowhere/to/be/found"], "no such folder"),
        ("train", ["model={no_tokenizer}"], "the folder has no tokenizer"),
        ("train", ["optimizer.name=sgd"], "optimizer.name=sgd: must be one of adamw, adamw_8bit"),
        ("synthesize", ["corpus.path={folder}/missing.jsonl"], "missing.jsonl"),
        ("synthesize", ["corpus.path={empty}"], "empty"),
        ("synthesize", ["corpus.path={no_text}"], "text"),
        ("synthesize", ["synthesis.shots=0"], "synthesis.shots"),
        ("evaluate", ["tasks=[nonsense]"], "nonsense"),
        ("evaluate", ["tasks=[]"], "tasks"),
        ("reproduce", ["experiment=synthesizer_smollm2"], "has no arms"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_1(command, overrides, message, tmp_path):
    places = {
        "folder": tmp_path,
        "empty": tmp_path / "empty.jsonl",
        "no_text": tmp_path / "no_text.jsonl",
        "no_tokenizer": _broken_model(tmp_path),
    }
    places["empty"].write_text("")
    places["no_text"].write_text('{"body": "a document"}\n')
    arguments = [override.format(**places) for override in overrides]
    results = [run_here(command, *arguments, cwd=tmp_path)]
    if overrides[0] in ALONE:
        results.append(run("-m", "ipt", command, *arguments, cwd=tmp_path))
    for result in results:
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert result.stdout == ""
    assert not (tmp_path / "outputs").exists()


def test_a_mistake_is_one_line_under_a_debugger_too(tmp_path, monkeypatch):
    """There, as with this variable, OmegaConf makes an error its own cause."""
    monkeypatch.setenv("OC_CAUSE", "1")
    result = run_here("train", "architecture={model_type: llama}", cwd=tmp_path)
    assert result.returncode == 1
    assert (
        "architecture has no such keys yet: write ++architecture={…} to add them" in result.stderr
    )


@pytest.mark.parametrize(
    ("overrides", "environment", "message"),
    [
        (["output_dir={file}"], {}, "output_dir={file}: {file} is a file, expected a folder"),
        (["output_dir=/proc/below"], {}, "output_dir=/proc/below: not writable"),
        ([], {}, "stages_dir=outputs/stages: not writable"),
        (
            ["stages_dir={folder}", "synthesis=smollm2", "synthesis.engine=transformers"],
            {"IPT_CACHE": "/proc/below"},
            "IPT_CACHE=/proc/below",
        ),
        (["-m", "seed=1,2"], {}, "hydra.sweep.dir=outputs/sweeps/"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(overrides, environment, message, tmp_path):
    """In /proc, which is a folder that nobody can write, root included."""
    places = {"file": tmp_path / "file", "folder": tmp_path / "folder"}
    places["file"].write_text("")
    (tmp_path / "c.jsonl").write_text('{"text": "a document"}\n')
    settings = ["experiment=tiny", "synthesis=rule_based", f"corpus.path={tmp_path}/c.jsonl"]
    arguments = [*settings, *(override.format(**places) for override in overrides)]
    if overrides[:1] == ["-m"]:
        arguments = [*overrides, *settings]
    # this process has a cache already
    start = partial(run, "-m", "ipt") if environment else run_here
    result = start("synthesize", *arguments, cwd=Path("/proc"), **environment)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {message.format(**places)}"), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "file"]


def test_nothing_is_left_in_the_current_folder(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "c, d=1.jsonl").write_text('{"text": "a document"}\n')
    places = [
        f"corpus.path={tmp_path}/c, d=1.jsonl",
        f"stages_dir={tmp_path}/stages",
        "corpus.held_out_fraction=0",
    ]
    result = run_here(
        "synthesize", "experiment=tiny", "synthesis=rule_based", *places, cwd=tmp_path / "here"
    )
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "here").iterdir()) == []


def test_a_bug_keeps_its_traceback(tmp_path):
    script = "from ipt.cli import run_command\nrun_command('train', lambda config: int('x'))"
    result = run("-c", script, cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_the_config_of_an_arm_is_checked_like_the_command_line():
    with pytest.raises(Exception, match="max_step"):
        arm_config(Config(), {"trainer": {"max_step": 3}})
    assert OmegaConf.is_config(OmegaConf.structured(arm_config(Config(), {"seed": 3})))

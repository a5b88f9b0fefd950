"""Searches by Optuna, with jobs that only compute a function; tests/sweeps/test_sweep.py has jobs
that train.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")

from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from hydra.plugins.launcher import Launcher  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

from ipt.config import conf_dir  # noqa: E402
from ipt.sweeps.job import load_job, save_job  # noqa: E402
from ipt.sweeps.sweep import name_sweep  # noqa: E402
from ipt.sweeps.sweeper import SearchSettings, _distribution, figure, run_grid, run_search  # noqa: E402

SETTINGS = SearchSettings(
    metric="bits per byte",
    direction="minimize",
    n_trials=8,
    n_jobs=3,
    sampler="tpe",
    seed=0,
    storage=None,
)
SPACE = ["experiment=tiny", "mixture.ratios.instruction=interval(0,1)", "seed=choice(1,2)"]


class Parabola(Launcher):
    """Jobs that have their best result at an instruction ratio of 0.3. What is to happen at a job,
    `events` says by its number.
    """

    def __init__(self, folder: Path, events: dict[int, str]) -> None:
        self.folder, self.events, self.ratios = folder, events, []

    def setup(self, **_) -> None:
        pass

    def launch(self, job_overrides, initial_job_idx):
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            ratio = float(
                next(
                    text for text in overrides if text.startswith("mixture.ratios.instruction=")
                ).partition("=")[2]
            )
            self.ratios.append(ratio)
            event = self.events.pop(number, "")
            if event == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "stop":
                raise KeyboardInterrupt
            job = load_job(self.folder, number)
            figures = {} if event == "fail" else {"bits per byte": (ratio - 0.3) ** 2}
            save_job(
                self.folder,
                replace(job, status="failed" if event == "fail" else "finished", figures=figures),
            )


def search(
    folder: Path,
    settings: SearchSettings = SETTINGS,
    events: dict[int, str] | None = None,
    space=SPACE,
) -> "optuna.Study":
    os.chdir(folder)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", ["hydra.mode=MULTIRUN"], return_hydra_config=True)
        config.hydra.job.config_name = "train"
        launcher = Parabola(name_sweep(config), events or {})
        study = run_search(
            config, launcher, OverridesParser.create().parse_overrides(space), settings
        )
        study.set_user_attr("ratios", launcher.ratios)
        return study


@pytest.fixture(autouse=True)
def _back_home():
    home = Path.cwd()
    yield
    os.chdir(home)


def test_the_search_finds_the_best_ratio_and_tells_it(tmp_path, capsys):
    study = search(tmp_path, replace(SETTINGS, n_trials=15))
    assert len(study.trials) == 15
    assert study.best_params["mixture.ratios.instruction"] == pytest.approx(0.3, abs=0.1)
    (best,) = tmp_path.glob("outputs/sweeps/*/best.json")
    assert json.loads(best.read_text())["params"] == study.best_params
    (sweep,) = tmp_path.glob("outputs/sweeps/*/sweep.json")
    assert len(json.loads(sweep.read_text())["jobs"]) == 15
    assert "best of 15 trials" in capsys.readouterr().err


def test_a_search_goes_on_where_it_was_stopped_and_counts_no_trial_twice(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, events={4: "stop"})
    study = search(tmp_path)
    assert len(study.get_trials(states=(TrialState.COMPLETE,))) == 8
    jobs = json.loads(next(tmp_path.glob("outputs/sweeps/*/sweep.json")).read_text())["jobs"]
    assert len(jobs) == 8
    assert {job["status"] for job in jobs} == {"finished"}
    first = [trial.params for trial in study.trials]
    # a new start draws nothing again
    assert len({params["mixture.ratios.instruction"] for params in first}) == 8
    assert search(tmp_path).user_attrs["ratios"] == []  # nothing is left to do
    assert len(search(tmp_path, replace(SETTINGS, n_trials=10)).user_attrs["ratios"]) == 2


def test_a_killed_search_repeats_the_trials_that_were_running(tmp_path):
    script = (
        f"from tests.sweeps.test_sweeper import *; search(Path({str(tmp_path)!r}), events={{4: "
        f"'kill'}})"
    )
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    study = search(tmp_path)
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    assert len(complete) == 8
    interrupted = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert len(interrupted) == 2  # of a batch of three, the first had ended
    for trial in interrupted:
        assert sum(other.params == trial.params for other in complete) == 1


def test_failed_jobs_are_failed_trials_and_the_exit_tells(tmp_path):
    with pytest.raises(ValueError, match="1 of 8 jobs failed"):
        search(tmp_path, events={2: "fail"})
    storage = f"sqlite:///{next(tmp_path.glob('outputs/sweeps/*/study.db'))}"
    study = optuna.load_study(study_name=None, storage=storage)
    assert [trial.number for trial in study.trials if trial.state == TrialState.FAIL] == [2]
    assert len(study.trials) == 8


def test_a_grid_has_each_combination_once(tmp_path):
    space = ["experiment=tiny", "mixture.ratios.instruction=choice(0.1,0.3,0.6)", "seed=range(1,3)"]
    study = search(tmp_path, replace(SETTINGS, sampler="grid", n_trials=20), space=space)
    found = sorted(
        (trial.params["mixture.ratios.instruction"], trial.params["seed"]) for trial in study.trials
    )
    assert found == [(ratio, seed) for ratio in ("0.1", "0.3", "0.6") for seed in ("1", "2")]
    assert study.best_params["mixture.ratios.instruction"] == "0.3"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=interval(0,1)", optuna.distributions.FloatDistribution(0, 1)),
        (
            "a=tag(log,interval(1e-5,1e-2))",
            optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True),
        ),
        ("a=int(interval(1,8))", optuna.distributions.IntDistribution(1, 8)),
        ("a=range(1,10,2)", optuna.distributions.IntDistribution(1, 9, step=2)),
        ("a=x,y", optuna.distributions.CategoricalDistribution(["x", "y"])),
    ],
)
def test_hydras_syntax_describes_the_space(text, expected):
    assert _distribution(OverridesParser.create().parse_override(text), grid=False) == expected


@pytest.mark.parametrize(
    ("settings", "space", "message"),
    [
        ({"sampler": "cma"}, SPACE, "hydra.sweeper.sampler=cma: expected one of tpe, random, grid"),
        ({"direction": "up"}, SPACE, "hydra.sweeper.direction=up"),
        (
            {"metric": "accuracy"},
            SPACE,
            "hydra.sweeper.metric=accuracy: the jobs do not report it; expected one of "
            "bits_per_byte",
        ),
        ({}, ["seed=1"], "nothing to search"),
        ({"sampler": "grid"}, SPACE, r"instruction=interval\(0,1\): .*grid needs values"),
        ({}, ["seed=tag(log,interval(0,1))"], "seed=tag"),
    ],
)
def test_mistakes_are_told_in_one_line(settings, space, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        search(tmp_path, replace(SETTINGS, **settings), space=space)
    assert "\n" not in str(caught.value)


def test_a_figure_is_found_whatever_its_signs():
    assert (
        figure(
            {"final loss": 1.0, "held_out_perplexity bits_per_byte": 2.0},
            "held_out_perplexity.bits_per_byte",
        )
        == 2
    )


def test_a_plain_grid_takes_no_interval(tmp_path):
    with pytest.raises(ValueError, match=r"a grid needs values, as seed=0,0\.5,1"):
        run_grid(None, None, OverridesParser.create().parse_overrides(["seed=interval(0,1)"]))

"""The jobs of a sweep: all combinations of values, or the trials of an Optuna study."""

import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from ipt.errors import UserError
from ipt.files import write_json
from ipt.sweeps.job import FINISHED, Job, load_job
from ipt.sweeps.sweep import close_sweep, open_sweep, plan_jobs

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

SAMPLERS = ("tpe", "random", "grid")
DIRECTIONS = ("minimize", "maximize")
# Attributes of a trial: the number of its job, and the interrupted trial that it repeats.
JOB, INSTEAD_OF = "job", "instead_of"


@dataclass(frozen=True)
class SearchSettings:
    """The keys of hydra/sweeper=optuna, which are documented in ipt/plugins."""

    metric: str
    direction: str
    n_trials: int
    n_jobs: int | None
    sampler: str
    seed: int | None
    storage: str | None


def run_grid(config: DictConfig, launcher: Launcher, overrides: Sequence[Override]) -> list[Job]:
    """Run a job for each combination of values.

    Raises UserError for an interval, and if a job has failed.
    """
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            key = override.get_key_element()
            raise UserError(
                f"{override.input_line}: a grid needs values, as {key}=0,0.5,1; use "
                "hydra/sweeper=optuna to search an interval"
            )
    values = []
    for override in overrides:
        key = override.get_key_element()
        values.append([f"{key}={value}" for value in _values(override)])
    with _open_jobs(config, launcher, list(_space(overrides))) as jobs:
        return jobs.run(list(itertools.product(*values)))


def run_search(
    config: DictConfig, launcher: Launcher, overrides: Sequence[Override], settings: SearchSettings
) -> "Study":
    """Run trials until the study has `settings.n_trials`, those of earlier runs included.

    Interrupted trials are repeated first. A failed job is a failed trial. Raises UserError for
    invalid settings, for a metric that the jobs do not report, and at the end if a job has failed.
    """
    _check(settings)
    space = _space(overrides)
    if not space:
        raise UserError(
            "hydra/sweeper=optuna has nothing to search: give a key an interval, as "
            "'mixture.ratios.instruction=interval(0,1)'"
        )
    fixed = []
    for override in overrides:
        if not override.is_sweep_override():
            fixed.append(f"{override.get_key_element()}={override.get_value_element_as_str()}")
    is_grid = settings.sampler == "grid"
    distributions = {key: _distribution(override, is_grid) for key, override in space.items()}
    n_jobs = settings.n_jobs or config.hydra.launcher.get("n_jobs") or 1
    with _open_jobs(config, launcher, list(space)) as jobs:
        study = _open_study(settings, jobs.folder)
        _resume(study, jobs, settings)
        if is_grid:
            for values in itertools.product(*(_values(override) for override in space.values())):
                study.enqueue_trial(dict(zip(space, values, strict=True)), skip_if_exists=True)
        missing = _missing(study, settings)
        while missing > 0:
            trials = [study.ask(distributions) for _ in range(min(n_jobs, missing))]
            _run_trials(study, trials, fixed, jobs, settings)
            missing = _missing(study, settings)
        jobs.summary = _best(study, jobs, settings)
    return study


# Jobs
# ----------------------------------------------------------------------------------------------


@dataclass
class _Jobs:
    """The jobs of a sweep, run in batches."""

    config: DictConfig
    launcher: Launcher
    varying: list[str]
    numbers: list[int] = field(default_factory=list)
    summary: str = ""  # printed at the end

    @property
    def folder(self) -> Path:
        return Path(self.config.hydra.sweep.dir)

    def run(self, batch: Sequence[Sequence[str]]) -> list[Job]:
        """Run a job for each list of overrides and return them with their results."""
        first = max(self.numbers, default=-1) + 1
        numbers = plan_jobs(
            self.config.hydra.job.config_name, self.folder, batch, first, self.varying
        )
        self.numbers += numbers
        try:
            self.launcher.launch(batch, first)
        except RuntimeError as error:  # submitit's, for a job without a result
            raise UserError(
                f"{type(self.launcher).__name__}: {str(error).strip().splitlines()[0]}"
            ) from error
        return self.load(numbers)

    def load(self, numbers: Sequence[int]) -> list[Job]:
        jobs = [load_job(self.folder, number) for number in numbers]
        return [job for job in jobs if job is not None]


@contextmanager
def _open_jobs(config: DictConfig, launcher: Launcher, varying: list[str]) -> Iterator[_Jobs]:
    """The jobs of a sweep, whose table and report are written even after an exception."""
    jobs = _Jobs(config, launcher, varying)
    with open_sweep(jobs.folder):
        try:
            yield jobs
        except BaseException:
            with suppress(UserError):  # the first exception is the one to report
                close_sweep(jobs.folder, jobs.numbers, config, jobs.summary)
            raise
        close_sweep(jobs.folder, jobs.numbers, config, jobs.summary)


# Trials
# ----------------------------------------------------------------------------------------------


def _check(settings: SearchSettings) -> None:
    for key, choices in (("sampler", SAMPLERS), ("direction", DIRECTIONS)):
        value = getattr(settings, key)
        if value not in choices:
            raise UserError(f"hydra.sweeper.{key}={value}: expected one of {', '.join(choices)}")
    try:
        import optuna
    except ImportError:
        raise UserError(
            "hydra/sweeper=optuna needs the package optuna: pip install 'ipt[sweeps]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _open_study(settings: SearchSettings, folder: Path) -> "Study":
    import optuna

    storage = settings.storage or f"sqlite:///{folder.absolute() / 'study.db'}"
    direction = cast(Literal["minimize", "maximize"], settings.direction)
    study = optuna.create_study(
        storage=storage, study_name=folder.name, direction=direction, load_if_exists=True
    )
    if study.direction.name.lower() != settings.direction:
        raise UserError(
            f"hydra.sweeper.direction={settings.direction}: the study in {storage} has the "
            "opposite direction: use that one, or another hydra.sweep.dir"
        )
    study.sampler = _sampler(settings, len(study.trials))
    return study


def _sampler(settings: SearchSettings, trials: int) -> "BaseSampler":
    """`trials`: number of existing trials, so that a resumed study does not repeat its draws."""
    import optuna

    seed = None if settings.seed is None else settings.seed + trials
    if settings.sampler != "tpe":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # constant_liar: concurrent trials avoid each other.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _resume(study: "Study", jobs: _Jobs, settings: SearchSettings) -> None:
    """Record jobs that ended after an earlier run stopped; queue interrupted ones again."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        job = load_job(jobs.folder, trial.user_attrs.get(JOB, -1))
        if job is None or not _tell(study, trial.number, job, settings):
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs={INSTEAD_OF: trial.number})
    repeated = {trial.user_attrs.get(INSTEAD_OF) for trial in study.trials}
    for trial in study.trials:
        if JOB in trial.user_attrs and trial.number not in repeated:
            jobs.numbers.append(trial.user_attrs[JOB])


def _missing(study: "Study", settings: SearchSettings) -> int:
    """The number of trials to run. A trial and its repetition count once."""
    from optuna.trial import TrialState

    ended = sum(trial.state.is_finished() for trial in study.trials)
    ended -= sum(INSTEAD_OF in trial.user_attrs for trial in study.trials)
    missing = settings.n_trials - ended
    if settings.sampler == "grid":
        return min(missing, len(study.get_trials(states=(TrialState.WAITING,))))
    return missing


def _run_trials(
    study: "Study",
    trials: Sequence["Trial"],
    fixed: Sequence[str],
    jobs: _Jobs,
    settings: SearchSettings,
) -> None:
    """Run the job of each trial and record its result in the study.

    If the sweep is stopped, trials that have not ended stay open.
    """
    from optuna.trial import TrialState

    first = max(jobs.numbers, default=-1) + 1
    batch = []
    for number, trial in enumerate(trials, first):
        trial.set_user_attr(JOB, number)
        batch.append([*fixed, *(f"{key}={value}" for key, value in trial.params.items())])
    try:
        jobs.run(batch)
    except BaseException:
        for number, trial in enumerate(trials, first):
            job = load_job(jobs.folder, number)
            if job is not None:
                _tell(study, trial.number, job, settings)
        raise
    for number, trial in enumerate(trials, first):
        job = load_job(jobs.folder, number)
        if job is None or not _tell(study, trial.number, job, settings):
            study.tell(trial.number, state=TrialState.FAIL)


def _tell(study: "Study", trial: int, job: Job, settings: SearchSettings) -> bool:
    """Record the result of a trial's job in the study; False if the job has not ended."""
    from optuna.trial import TrialState

    if job.status in FINISHED:
        value = figure(job.figures, settings.metric)
        if math.isfinite(value):
            study.tell(trial, value)
        else:
            study.tell(trial, state=TrialState.FAIL)
    elif job.status == "failed":
        study.tell(trial, state=TrialState.FAIL)
    return job.status != "interrupted"


def figure(figures: Mapping[str, float], name: str) -> float:
    """The figure of this name, in which spaces and punctuation are alike.

    Raises UserError if the job did not report it.
    """
    known = {_plain(key): value for key, value in figures.items()}
    if _plain(name) not in known:
        raise UserError(
            f"hydra.sweeper.metric={name}: the jobs do not report it; expected one of "
            f"{', '.join(known)}"
        )
    return known[_plain(name)]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _best(study: "Study", jobs: _Jobs, settings: SearchSettings) -> str:
    """Write the best trial to best.json and describe it in a sentence."""
    from optuna.trial import TrialState

    complete = study.get_trials(states=(TrialState.COMPLETE,))
    if not complete:
        return "no trial has finished"
    best = study.best_trial
    job = best.user_attrs[JOB]
    write_json(
        jobs.folder / "best.json",
        {"metric": settings.metric, "value": best.value, "params": best.params, "job": job},
    )
    params = " ".join(f"{key}={value}" for key, value in best.params.items())
    return (
        f"best of {len(complete)} trials: job {job}, {params}, {settings.metric}={best.value:.6g}"
    )


# Search spaces
# ----------------------------------------------------------------------------------------------


def _space(overrides: Sequence[Override]) -> dict[str, Override]:
    """Key -> override, for the keys that vary."""
    varying = [override for override in overrides if override.is_sweep_override()]
    return {override.get_key_element(): override for override in varying}


def _values(override: Override) -> list[str]:
    """The values of an override in a grid, as written on a command line."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def _distribution(override: Override, grid: bool) -> "BaseDistribution":
    """The search space of an override: choice(…), range(…), interval(…), tag(log, interval(…))."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep = override.value()
    try:
        if isinstance(sweep, RangeSweep) and not grid:
            values = sorted(sweep.range())
            if all(isinstance(value, int) for value in values):
                return IntDistribution(int(values[0]), int(values[-1]), step=abs(int(sweep.step)))
            return FloatDistribution(values[0], values[-1], step=abs(sweep.step))
        if override.is_discrete_sweep():
            return CategoricalDistribution(_values(override))
        assert (
            isinstance(sweep, IntervalSweep) and sweep.start is not None and sweep.end is not None
        )
        if grid:
            raise UserError("hydra.sweeper.sampler=grid needs values, as choice(0,0.5,1)")
        if isinstance(sweep.start, int):
            return IntDistribution(sweep.start, int(sweep.end), log="log" in sweep.tags)
        return FloatDistribution(sweep.start, sweep.end, log="log" in sweep.tags)
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}") from None

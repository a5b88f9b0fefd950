"""The commands `synthesize`, `train` and `evaluate`, and their results."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ipt import distributed
from ipt.config import Config
from ipt.console import console
from ipt.distributed import rank
from ipt.files import read_json
from ipt.models import model_identity
from ipt.pipeline.plan import start_job
from ipt.pipeline.stages import Evaluation, StageNotFinished, Stages, Training
from ipt.sweeps.job import job_result, report_result

Json = dict[str, Any]
# the metric of a task that a sweep shows: the first of these that the task has
MAIN_METRICS = ("logprob", "nll", "correct", "paper")

log = logging.getLogger(__name__)


def synthesize(config: Config) -> None:
    stages = Stages(config, log=start_job([(config, _synthesized)]))
    result = _synthesized(stages)
    log.info(f"pairs: {Path(result['folder']) / 'pairs'}")
    report_result(result)


def train(config: Config) -> None:
    job = start_job([(config, _training)])
    stages = Stages(config, before_work=model_check([config]), log=job)
    stage = stages.training(folder=_folder(config))
    distributed.leave()
    if rank() > 0:
        return
    result = _trained(stages)
    log.info(f"model: {stage.export}")
    report_result(result)


def evaluate(config: Config) -> None:
    from ipt.evaluation.tables import table

    distributed.join()
    stages = Stages(config, log=start_job([(config, _evaluation)]))
    _evaluation(stages)
    distributed.leave()
    if rank() > 0:
        return
    result = _evaluated(stages)
    folder = Path(result["folder"])
    console.print(table({config.model: folder}))
    log.info(f"results: {folder / 'results.md'}, {folder / 'results.json'}")
    report_result(result)


def model_check(configs: Iterable[Config]) -> Callable[[], None]:
    """A function that probes the models of `configs` at its first call, before data are made.

    Raises UserError for a model that would be trained incorrectly. Later calls do nothing.
    """
    waiting = list(configs)

    def check() -> None:
        from ipt.training.probe import check_model

        while waiting:
            check_model(waiting[-1])
            waiting.pop()

    return check


def finished_result(command: str, config: Config) -> Json | None:
    """The result of a command if all of its stages are finished; otherwise None."""
    results = {"synthesize": _synthesized, "train": _trained, "evaluate": _evaluated}
    if command not in results:
        return None
    try:
        return results[command](Stages(config, only=()))
    except (StageNotFinished, ValueError, OSError):  # the command itself reports errors better
        return None


def main_scores_of(folder: Path) -> dict[str, float]:
    """One score per task, for the table of a sweep. The log-probability of the right answer is
    preferred because it distinguishes small models.
    """
    scores = {}
    for task, metrics in read_json(folder / "results.json").items():
        name = next(metric for metric in (*MAIN_METRICS, *metrics) if metric in metrics)
        scores[f"{task} {name}"] = metrics[name]["value"]
    return scores


def _synthesized(stages: Stages) -> Json:
    folder = _folder(stages.config)
    stages.synthesis(folder)
    stage = stages.pairs(_below(folder, "filtered"))
    names = [name for name in ("documents", "pairs") if name in stage.stats]
    return job_result(stage.folder, {name: stage.stats[name] for name in names})


def _training(stages: Stages) -> tuple[Training, Evaluation | None]:
    """The training of a config and, if it has tasks, the scores of its model."""
    folder = _folder(stages.config)
    training = stages.training(folder=folder)
    if not stages.config.tasks:
        return training, None
    scores = stages.evaluation(
        str(training.export), training.digest, folder=_below(folder, "evaluation"), trained=True
    )
    return training, scores


def _trained(stages: Stages) -> Json:
    training, scores = _training(stages)
    figures = {
        "steps": training.stats["steps"],
        "tokens": training.stats["tokens"],
        "final loss": training.stats["final_loss"],
    }
    if scores is None:
        return job_result(training.folder, figures, training=training.folder)
    figures |= _scores(scores)
    return job_result(training.folder, figures, training=training.folder, evaluation=scores.folder)


def _evaluated(stages: Stages) -> Json:
    scores = _evaluation(stages)
    return job_result(scores.folder, _scores(scores), evaluation=scores.folder)


def _evaluation(stages: Stages) -> Evaluation:
    config = stages.config
    return stages.evaluation(config.model, model_identity(config.model), folder=_folder(config))


def _folder(config: Config) -> Path | None:
    return Path(config.output_dir) if config.output_dir else None


def _below(folder: Path | None, name: str) -> Path | None:
    return folder / name if folder else None


def _scores(evaluation: Evaluation) -> dict[str, float]:
    """All scores of an evaluation; the main score of each task comes first."""
    scores = main_scores_of(evaluation.folder)
    for task, metrics in read_json(evaluation.folder / "results.json").items():
        for name, metric in metrics.items():
            scores[f"{task} {name}"] = metric["value"]
    return scores

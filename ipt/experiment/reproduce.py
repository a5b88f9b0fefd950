"""A recipe from documents to report: one model for each arm, at the same token budget, beside the model they start from."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ipt.config import Config
from ipt.console import console
from ipt.experiment.pipeline import Stages, arm_config
from ipt.experiment.report import write_report
from ipt.experiment.scores import Arm
from ipt.models import model_identity
from ipt.stage import MANIFEST, Stage, atomic, git_commit, hardware, installed_versions, write_json
from ipt.synthesis.prompts import RULE_BASED


def reproduce(config: Config) -> None:
    """Run the recipe and write its report to `output_dir` (default: outputs/<name>). Finished stages are reused."""
    started = time.monotonic()
    output = Path(config.output_dir or f"outputs/{config.name}")
    arms: list[Arm] = []
    done: list[tuple[str, Stage]] = []
    quality: dict[str, Any] = {}
    pairs = rendering = None
    for name, changes in config.arms.items():
        stages = Stages(arm_config(config, changes))  # what it shares with other arms is recognised by its key
        training = stages.training(f"training {name}")
        scores = stages.evaluation(str(training.folder / "export"), training.digest, f"evaluation {name}", trained=True)
        arms.append(Arm(name, training.folder, scores.folder))
        for label, stage in stages.done:
            if label in ("synthesis", "filters"):
                pairs, quality = stage.folder / "pairs", quality | stage.stats
        rendering = rendering or next((stage for label, stage in stages.done if label.startswith("rendering")), None)
        done = _merged(done, stages.done)
    start = Stages(config)
    scores = start.evaluation(config.model, model_identity(config.model), "evaluation start")
    arms.insert(0, Arm("start", None, scores.folder))
    _link(output, arms)
    with atomic(output / "config.yaml") as temporary:
        temporary.write_text(OmegaConf.to_yaml(asdict(config)))
    rows = [_row(label, stage) for label, stage in _merged(done, start.done)]
    write_json(output / "stages.json", rows)
    statistics = write_report(
        output,
        title=config.title or config.name,
        config_yaml=(output / "config.yaml").read_text(),
        arms=arms,
        pairs=pairs,
        texts=rendering.folder / "texts" if rendering else None,
        stages=rows,
        quality=quality,
        facts=_facts(config),
    )
    console.print(_scores_table(arms))
    console.print(f"report: {output / 'report.html'}  ({time.monotonic() - started:.0f} s)")
    write_json(output / "summary.json", {"seconds": round(time.monotonic() - started, 1), **statistics})


def _merged(known: list[tuple[str, Stage]], new: list[tuple[str, Stage]]) -> list[tuple[str, Stage]]:
    folders = {stage.folder for _, stage in known}
    return known + [(label, stage) for label, stage in new if stage.folder not in folders]


def _link(output: Path, arms: list[Arm]) -> None:
    """`arms/<name>/training` and `arms/<name>/evaluation` lead to the stages, wherever they are kept."""
    for arm in arms:
        for name, folder in (("training", arm.training), ("evaluation", arm.evaluation)):
            if folder is None:
                continue
            link = output / "arms" / arm.name / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)


def _row(label: str, stage: Stage) -> dict[str, Any]:
    manifest = json.loads((stage.folder / MANIFEST).read_text())
    return {
        "name": label,
        "folder": str(stage.folder),
        "seconds": stage.seconds,
        "reused": stage.reused,
        "key": manifest["key"],
        "digest": stage.digest,
        "stats": stage.stats,
    }


def _facts(config: Config) -> dict[str, Any]:
    machine = hardware()
    return {
        "command": f"make reproduce EXPERIMENT={config.name}",
        "model": config.model,
        "synthesizer": "rules" if config.synthesis.format == RULE_BASED else config.synthesis.model,
        "seed": config.seed,
        "token budget of each arm": config.trainer.max_steps
        * config.trainer.micro_batch_size
        * config.trainer.accumulate
        * config.mixture.seq_len,
        "hardware": ", ".join(machine["gpus"]) or f"{machine['cpus']} CPU cores ({machine['machine']})",
        "git commit": git_commit(),
        "versions": installed_versions(),
    }


def _scores_table(arms: list[Arm]) -> Any:
    from ipt.evaluation.tables import table

    return table({arm.name: arm.evaluation for arm in arms})

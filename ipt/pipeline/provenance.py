"""The manifest of a run of several stages: what a reader needs to run it again, and to see that
nothing has changed since.
"""

import os
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from ipt.config import Config
from ipt.files import hash_file, hash_json, read_json, sealed, write_json
from ipt.stage import MANIFEST, Stage, git_commit, hardware, hash_folder, installed_versions

ROOT = Path(__file__).parents[2]
SHOWN = 8  # hashes of data that are spelled out for readers; of more there is one for all


def command_line(command: str, config: Config) -> str:
    """The command that composed the running config, as it can be typed; without Hydra the recipe's
    name alone.
    """
    if not HydraConfig.initialized():
        return f"python -m ipt {command} experiment={config.name}"
    hydra = HydraConfig.get()
    flags = [
        f"--config-dir={source.path}"
        for source in hydra.runtime.config_sources
        if source.provider == "command-line"
    ]
    own = [
        override for override in hydra.overrides.hydra if not override.startswith("hydra.mode=")
    ]  # which Hydra adds itself
    return shlex.join(["python", "-m", "ipt", command, *flags, *own, *hydra.overrides.task])


def provenance(command: str, config: Config, stages: Iterable[tuple[str, Stage]]) -> dict[str, Any]:
    """The exact command, lock files by hash, the commit (and whether the checkout differed from
    it), hashes of data and models.
    """
    return {
        "command": command_line(command, config),
        "git_commit": git_commit(),
        "git_dirty": _is_dirty(),
        "lock_files": {
            path.name: hash_file(path) for path in sorted((ROOT / "requirements").glob("?pu.txt"))
        },
        "data": _data(stages),
        "versions": installed_versions(),
        "hardware": hardware(),
    }


def provenance_facts(found: dict[str, Any]) -> dict[str, Any]:
    """What a report says of it: short, but enough to tell whether two runs had the same."""
    data = {name: digest[:12] for name, digest in found["data"].items()}
    if len(data) > SHOWN:
        data = {f"all {len(data)} inputs, listed in {MANIFEST}": hash_json(found["data"])[:12]}
    commit = found["git_commit"] or "none: installed as a package"
    return {
        "git commit": f"{commit} and changes that were not committed"
        if found["git_dirty"]
        else commit,
        "lock files": {name: digest[:12] for name, digest in found["lock_files"].items()},
        "data": data,
    }


def write_manifest(
    output: Path, found: dict[str, Any], stages: Iterable[tuple[str, Stage]], **more: Any
) -> None:
    """Write manifest.json to the finished folder `output`: `found`, the stages it leads to, and the
    hashes of its own files.
    """
    leads_to = [
        {
            "name": label,
            "folder": os.path.relpath(stage.folder.resolve(), output.resolve()),
            "digest": stage.digest,
        }
        for label, stage in stages
    ]
    outputs = hash_folder(output)
    write_json(
        output / MANIFEST, sealed({**more, **found, "stages": leads_to, "outputs": outputs}, {})
    )


def _data(stages: Iterable[tuple[str, Stage]]) -> dict[str, str]:
    """Inputs of the stages that no stage has made: files, models, tasks."""
    manifests = {label: read_json(stage.folder / MANIFEST) for label, stage in stages}
    made = {manifest["digest"] for manifest in manifests.values()}
    found = {}
    for manifest in manifests.values():
        if manifest["stage"] == "contamination":  # reads what others have made or read
            continue
        for name, digest in manifest["inputs"].items():
            if digest not in made:
                found[f"{manifest['stage']}: {name}"] = digest
    return found


def _is_dirty() -> bool:
    result = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    return bool(result.stdout.strip())

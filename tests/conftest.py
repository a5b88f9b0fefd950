"""Shared fixtures and settings. Tests reach no hub, log to nobody, and do not depend on the shell
that starts them.
"""

import gc
import getpass
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from tests.forked_engines import FILES_RUN

# A launcher's or a tracker's settings, which would change what is tested, and whatever forces or
# forbids colours.
FOREIGN = ("SLURM_", "WANDB_", "TORCHELASTIC_", "IPT_JOB_", "IPT_LAUNCHER")
OTHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
OTHERS |= {"FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES"}
gc.disable()  # until all tests are collected: imports make two million objects that live to the end
for name in list(os.environ):
    if name.startswith(FOREIGN) or name in OTHERS:
        del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # servers that tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# The compiler's precompiled headers hold for one instruction set only, which its default cache does
# not tell apart.
CAPABILITY = os.environ.get("ATEN_CPU_CAPABILITY", "best")
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    f"{tempfile.gettempdir()}/ipt-tests-inductor-{getpass.getuser()}-{CAPABILITY}",
)
# models are tiny and workers many: more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a busy machine is slow
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=10, derandomize=True, **UNTIMED)
settings.register_profile("full", **UNTIMED)
settings.load_profile("quick")

# Files of minutes, the longest first: started at the end, they would keep one worker busy while the
# others have nothing left to do.
LONG = (
    "sweeps/test_sweep.py",
    "synthesis/test_ray.py",
    "synthesis/engines/test_vllm_engine.py",
    "pipeline/test_job.py",
    "pipeline/test_recipes.py",
    "pipeline/test_reproduce.py",
    "training/test_resume.py",
    "test_commands.py",
    "training/test_probe.py",
    "tokens/test_tokenize.py",
    "evaluation/backends/test_vllm_backend.py",
)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; workers take files in this order (`--no-loadscope-reorder`)."""
    places = {str(Path(__file__).parent / name): place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


def pytest_collection_finish() -> None:
    """Keep what the imports have made out of every later garbage collection; each stage ends with a
    full one.
    """
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FILES_RUN] = set()


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[FILES_RUN].add(str(item.path))


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Development data beside the checkout, which a fresh clone does not have."""
    if not SHARED.exists():
        pytest.skip("no development data beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model() -> str:
    """Folder of the tiny random Llama with the SmolLM2 tokenizer; made once, then cached."""
    from ipt.models import resolve_model

    return resolve_model("embedded:tiny")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, request) -> Callable[[str, Callable[[Path], None]], Path]:
    """Makes a folder by a function, once for all workers of the test run. The folder must not be
    changed afterwards.
    """
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent  # that of all workers

    def make(name: str, work: Callable[[Path], None]) -> Path:
        folder, finished = root / f"once-{name}", root / f"once-{name}.finished"
        with FileLock(root / f"once-{name}.lock"):
            if not finished.exists():
                folder.mkdir()  # fails if the work has failed in another worker
                work(folder)
                finished.touch()
        return folder

    return make

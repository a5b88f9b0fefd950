"""vLLM's processes as copies of this one: each saves the 9 s of CPU time that a fresh interpreter
takes to import vLLM.
"""

import multiprocessing
from importlib import import_module

import pytest
import torch

FILES_RUN = pytest.StashKey[set[str]]()


def fork_engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that are started from now on are forked, where vLLM runs on a CPU, which it would
    spawn there.

    They are spawned as before where this process holds a GPU, computes with several threads, or has
    run tests of other files, which may have left threads and locks behind: none of these survives a
    fork.
    """
    if request.config.stash[FILES_RUN] != {str(request.path)}:
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or torch.get_num_threads() > 1:
        return
    import_module("vllm.v1.worker.cpu_worker")
    for name in ("vllm.v1.engine.utils", "vllm.v1.executor.multiproc_executor"):
        monkeypatch.setattr(
            import_module(name), "get_mp_context", lambda: multiprocessing.get_context("fork")
        )

"""Shared fixtures. Tests reach no hub and log to nobody."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


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

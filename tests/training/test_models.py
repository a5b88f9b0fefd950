"""Each supported architecture, tiny and random: train equals alone, export equals trained, resume
equals uninterrupted.
"""

import shutil
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

from ipt.export.huggingface import export_checkpoint
from ipt.mixture.batches import IGNORE, PackedSequences
from ipt.mixture.plan import make_plan
from ipt.tokens.store import TokenStore
from tests.training.jobs import assert_same_steps, read_metrics, train
from tests.training.model_cases import SUPPORTED, load_case, write_case

STEPS, BATCH = 3, 2


@torch.no_grad()
def _loss_alone(folder, stores, config, step: int) -> float:
    """The mean loss of a step by the model's own logits, each document of its sequences run
    alone.
    """
    opened = {name: TokenStore(path) for name, path in stores.items()}
    plan = make_plan(opened, config.mixture, STEPS * BATCH, config.seed)
    sequences = PackedSequences(plan, [opened[name] for name in plan.sources])
    batch = sequences.batch(range(step * BATCH, (step + 1) * BATCH))
    model = load_case(folder)
    losses = []
    for ids, labels, positions in zip(
        batch["input_ids"], batch["labels"], batch["position_ids"], strict=True
    ):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        assert len(starts) > 2, "several documents must be packed"
        for start, end in pairwise(starts):
            logits = model(input_ids=ids[None, start:end], use_cache=False).logits[0].float()
            targets = labels[start:end] != IGNORE
            losses.append(
                cross_entropy(logits[targets], labels[start:end][targets], reduction="none")
            )
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("name", SUPPORTED)
def test_an_architecture_trains_exports_and_resumes(
    name, stores, make_config, small_model, tmp_path
):
    folder = write_case(name, tmp_path / "model", small_model)
    config = make_config(
        f"trainer.max_steps={STEPS}",
        "checkpoint.every_n_train_steps=2",
        "checkpoint.keep_last=2",
        "checkpoint.async_save=false",
        "optimizer.lr=1e-2",
        "trainer.export_dtype=float32",
    )
    config.model = folder
    train(config, stores, tmp_path / "whole")
    steps = read_metrics(tmp_path / "whole")
    cross_entropies = [_cross_entropy(step) for step in steps]
    assert cross_entropies[0] == pytest.approx(_loss_alone(folder, stores, config, 0), abs=1e-3)
    if name in ("Mixtral", "Qwen3-MoE"):
        for step, loss in zip(steps, cross_entropies, strict=True):
            assert step["aux_loss"] > 0.9  # 1 times top-k where the load is balanced
            assert step["loss"] == pytest.approx(loss + 0.5 * step["aux_loss"], rel=1e-6)

    # The checkpoint after two steps, exported, gives the loss of the third step.
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000002"
    export_checkpoint(checkpoint, tmp_path / "exported")
    assert cross_entropies[2] == pytest.approx(
        _loss_alone(tmp_path / "exported", stores, config, 2), abs=1e-3
    )
    assert abs(cross_entropies[2] - _loss_alone(folder, stores, config, 2)) > 5e-3, (
        "two steps must change the model"
    )

    # The same run resumed from that checkpoint ends with the same weights.
    (tmp_path / "resumed").mkdir()
    shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoints" / checkpoint.name)
    train(config, stores, tmp_path / "resumed")
    assert_same_steps(tmp_path / "resumed", tmp_path / "whole")
    for path in sorted((tmp_path / "whole" / "export").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "resumed" / "export" / path.name).read_bytes()


def _cross_entropy(step: dict) -> float:
    """Mean over the target tokens of all sources."""
    sources = [name.removeprefix("loss/") for name in step if name.startswith("loss/")]
    total = sum(step[f"loss/{source}"] * step[f"tokens/{source}"] for source in sources)
    return total / sum(step[f"tokens/{source}"] for source in sources)

from itertools import pairwise

import torch
from torch.nn.functional import cross_entropy

from ipt.config import MixtureConfig
from ipt.mixture.batches import IGNORE, PackedSequences
from ipt.mixture.plan import make_plan
from ipt.models import load_model
from ipt.tokens.store import TokenStore
from ipt.training.loss import CausalLMLoss
from ipt.training.model import build_model


def _batch(stores):
    opened = {name: TokenStore(folder) for name, folder in stores.items()}
    plan = make_plan(
        opened, MixtureConfig(ratios={"raw": 0.5, "instruction": 0.5}, seq_len=64), 4, 0
    )
    batch = PackedSequences(plan, [opened[name] for name in plan.sources]).batch(range(3))
    # several documents are really packed
    assert ((batch["position_ids"] == 0).sum(dim=1) > 1).all()
    return batch


def test_packed_documents_equal_documents_run_alone(stores, make_config, small_model):
    batch = _batch(stores)
    plain = load_model(small_model, torch.float32)
    expected = []
    for ids, labels, positions in zip(
        batch["input_ids"], batch["labels"], batch["position_ids"], strict=True
    ):
        bounds = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in pairwise(bounds):
            logits = plain(ids[None, start:end]).logits[0]
            targets = labels[start:end] != IGNORE
            expected.append(
                cross_entropy(logits[targets], labels[start:end][targets], reduction="none")
            )
    for attention in ("packed", "sdpa"):
        model = CausalLMLoss(
            build_model(make_config(f"trainer.attn_implementation={attention}")), chunk=17
        )
        _, losses = model(batch, 1.0, True)
        torch.testing.assert_close(losses, torch.cat(expected).detach(), rtol=1e-5, atol=1e-5)


def test_without_the_document_mask_documents_see_each_other(stores, make_config, small_model):
    batch = _batch(stores)
    plain = load_model(small_model, torch.float32)
    logits = plain(batch["input_ids"]).logits.flatten(0, 1)
    labels = batch["labels"].flatten()
    expected = cross_entropy(logits[labels != IGNORE], labels[labels != IGNORE], reduction="none")
    for attention in ("packed", "sdpa"):
        model = CausalLMLoss(
            build_model(make_config(f"trainer.attn_implementation={attention}")), chunk=64
        )
        _, losses = model(batch, 1.0, False)
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)

"""Checks that a model is trained on its own objective, and that packed documents do not attend to
each other.

transformers runs some models wrongly without an error: attention that ignores a soft-cap, state
that flows from one packed document into the next, logits that are scaled after the projection.
`check_model` runs before any data are made. It compares, on a small random copy of the model, the
losses of documents alone by the model's own forward pass and loss (the reference), of a document
alone by our loss, and of packed documents by our loss. `check_weights` compares once more on the
real weights before the first step.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ipt.config import Config, TrainerConfig
from ipt.errors import UserError
from ipt.mixture.batches import IGNORE, unpacked
from ipt.models.limits import positions_before_rope_changes
from ipt.models.small_copy import (
    TOLERANCE,
    CachedConfig,
    distance,
    is_small,
    losses_alone,
    random_documents,
    random_model,
    small_copies,
)
from ipt.training.attention import FEATURES, RECORDED, candidates, implementation, record_features
from ipt.training.loss import CausalLMLoss, logit_transform
from ipt.training.model import architecture_of, base_model, evaluation_mode

log = logging.getLogger(__name__)

PREFIX = 12  # tokens of a document whose losses must not depend on the tokens that follow
# trainer.precision -> allowed difference of the mean loss of a document, in nats per token.
REAL_TOLERANCE = {"32-true": 5e-3, "bf16-mixed": 1e-1, "bf16-true": 1e-1}
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attn_dropout")
LEAKS = "packed documents influence each other"
ON_CPU = ("packed", "sdpa", "eager")  # implementations that run without a GPU
CHUNK = 16  # targets per chunk of the loss, so that the small copies have several chunks


class Reference(NamedTuple):
    """A small copy of a model in eager attention, and the losses of documents alone."""

    architecture: Any
    weights: dict[str, Tensor]
    documents: list[Tensor]  # token ids
    losses: list[Tensor]  # [length - 1], of the model's own logits
    own_loss: float  # of the first document by `labels=`, with the load-balancing loss
    problem: str | None  # of the model itself, with any attention
    features: tuple[str, ...]  # of ipt.training.attention.FEATURES


def check_model(config: Config) -> str:
    """The attention implementation of the run: `trainer.attn_implementation`, or with `auto` the
    fastest one that is correct for the model.

    Raises UserError if the model would be trained on another objective than its own, or if packed
    documents would influence each other. The message has the difference and a setting that works.
    """
    architecture = architecture_of(config)
    _check_rope(config, architecture)
    reference = _reference_of(architecture)
    if reference is None:
        _check_unmeasured(config, architecture)
        return candidates(config.trainer)[0]
    names = candidates(config.trainer, reference.features)
    problems: dict[str, str] = {}
    for name in names:
        problem = _problem(reference, name, config.mixture.intra_document_mask)
        if problem is None:
            return name
        problems[name] = problem
    # With `auto`, the model's class may not run with some of them: prefer a leak, which says more.
    shown = next((name for name in names if problems[name].startswith(LEAKS)), names[0])
    raise UserError(
        f"{_name(config, architecture)}, trainer.attn_implementation={shown}: {problems[shown]}; "
        f"{_remedy(reference, config.trainer)}"
    )


def _check_rope(config: Config, architecture: Any) -> None:
    """Raise UserError if a long document would change the positions of short ones in its batch."""
    length = positions_before_rope_changes(architecture)
    if length is None or not config.mixture.intra_document_mask or config.mixture.seq_len <= length:
        return
    raise UserError(
        f"{_name(config, architecture)}: packed documents influence each other: its RoPE changes "
        f"for a whole batch when one document has more than {length} tokens; set "
        f"mixture.seq_len={length} or less, or mixture.intra_document_mask=false"
    )


def _check_unmeasured(config: Config, architecture: Any) -> None:
    """Raise UserError for a model without a small copy, unless the check of its real weights can
    decide.
    """
    name = _name(config, architecture)
    if config.architecture:  # random weights are so small that most faults do not show
        raise UserError(
            f"{name}: no small copy of it runs, so it cannot be checked; use other sizes, or "
            "another model"
        )
    if is_small(architecture):
        raise UserError(
            f"{name}: its class does not run as a causal language model; use another model"
        )
    log.warning(
        "%s: no small copy runs, so it is checked only on its weights, before the first step", name
    )


class Description(NamedTuple):
    """The result of the check for an architecture."""

    right: dict[str, bool]  # packed, sdpa and eager with packed documents; without mask
    features: str  # what the model does to its logits and in its attention


def describe_model(architecture: Any) -> Description:
    """The result for each implementation that runs without a GPU. Raises ValueError if no small
    copy runs.
    """
    reference = _reference_of(architecture)
    if reference is None:
        raise ValueError(f"{architecture.model_type}: no small copy of these sizes runs")
    right = {name: _problem(reference, name, True) is None for name in ON_CPU}
    right["without mask"] = any(_problem(reference, name, False) is None for name in ON_CPU)
    transform = logit_transform(architecture)
    features = [FEATURES[name] for name in reference.features if name != "dropout"]
    if transform.scale != 1:
        features.insert(0, "scaled logits")
    if transform.softcap is not None:
        features.insert(0, "soft-capped logits")
    return Description(right, ", ".join(features))


def check_weights(module: CausalLMLoss, config: Config) -> None:
    """Compare the losses of packed documents with the model's own losses of documents alone, on the
    weights of a run.

    Runs three forward passes of at most fifty tokens. All ranks must call it. Raises UserError.
    """
    base = base_model(module.model)
    device = base.get_input_embeddings().weight.device
    documents = [document.to(device) for document in random_documents(base.config)]
    targets = [len(document) - 1 for document in documents]
    with _evaluating(module):
        _, losses = module(_batch([documents]), 1.0, config.mixture.intra_document_mask)
        packed = [part.mean().item() for part in losses.split(targets)]
        alone = []
        for document in documents:
            own_loss, aux_loss = module.own_loss(_batch([[document]]))
            if module.load_balancing is not None:
                own_loss = own_loss - module.load_balancing.coefficient * aux_loss
            alone.append(own_loss.item())
    # Without the mask, the second document attends to the first.
    checked = len(documents) if config.mixture.intra_document_mask else 1
    differences = [abs(ours - own) for ours, own in zip(packed, alone, strict=True)][:checked]
    limit = REAL_TOLERANCE[config.trainer.precision] * max(1.0, *alone)
    if not max(differences) <= limit:
        raise UserError(
            f"{_name(config, base.config)}: on its weights the loss of packed documents differs by "
            f"{max(differences):.3f} nats per token from the model's own loss of each document; "
            "use another trainer.attn_implementation"
        )


# Reference
# ----------------------------------------------------------------------------------------------


def _reference_of(architecture: Any) -> Reference | None:
    return _reference(CachedConfig.of(architecture))


@functools.lru_cache(maxsize=8)
def _reference(cached: CachedConfig) -> Reference | None:
    """The reference of a config, or None if no small copy of it runs."""
    architecture = cached.config
    for small in small_copies(architecture):
        try:
            return _measure(small, architecture)
        except Exception as error:  # model classes raise all kinds of errors for unsupported sizes
            log.debug("a small copy of %s does not run: %s", architecture.model_type, error)
    return None


@torch.no_grad()
def _measure(small: Any, architecture: Any) -> Reference:
    model = random_model(small, "eager")
    documents = random_documents(small)
    losses = losses_alone(model, documents)
    ids = documents[0][None]
    own_loss = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    prefix = losses_alone(model, [documents[0][:PREFIX]])
    problem = None
    if distance(prefix, [losses[0][: PREFIX - 1]]) > TOLERANCE:
        problem = "the model sees the tokens that it should predict: it is no causal language model"
    reference = Reference(small, model.state_dict(), documents, losses, own_loss, problem, ())
    return reference._replace(features=_features(reference, architecture))


def _features(reference: Reference, architecture: Any) -> tuple[str, ...]:
    """The names of ipt.training.attention.FEATURES that the model uses."""
    recorded = record_features()
    try:
        _our_losses(_small_model(reference, RECORDED), [[reference.documents[0]]], True)
    except Exception as error:  # _problem reports it
        log.debug("packed attention does not run: %s", error)
    text = architecture.get_text_config()
    if any(getattr(text, name, None) for name in ATTENTION_DROPOUT):
        recorded.add("dropout")
    return tuple(sorted(recorded))


def _small_model(reference: Reference, attention: str) -> Any:
    """The small copy with another attention. Raises ValueError if the class lacks it."""
    model = random_model(reference.architecture, implementation(attention))
    model.load_state_dict(reference.weights)
    return model


# Comparison
# ----------------------------------------------------------------------------------------------


def _problem(reference: Reference, attention: str, document_mask: bool) -> str | None:
    """Why training the model with this attention is wrong; None if it is correct."""
    if reference.problem:
        return reference.problem
    # GPU kernels compute the same as packed attention; here only the model's call is checked.
    stand_in = attention if attention in ON_CPU else "packed"
    first, second = reference.documents
    expected, other = reference.losses
    try:
        model = _small_model(reference, stand_in)
        module = CausalLMLoss(model, CHUNK)
        alone = _our_losses(model, [[first]], True)
        difference = distance([alone], [expected])
        if difference > TOLERANCE:
            return f"our loss of a document differs by {difference:.3f} nats per token from its own"
        difference = abs(_objective(module, first) - reference.own_loss)
        if difference > TOLERANCE:
            return (
                f"our loss differs by {difference:.3f} nats per token from the loss that the model "
                "computes from labels"
            )
        if not document_mask:
            found = _our_losses(model, [[first, second]], False)
            expected = losses_alone(model, [torch.cat([first, second])])[0]
            # The first token of the second document is no target.
            parts = [expected[: len(first) - 1], expected[len(first) :]]
            return _compare(found, parts, "our loss of a packed sequence differs")
        found = _our_losses(model, [[first, second], [second, first]], True)
        return _compare(found, [expected, other, other, expected], LEAKS)
    except UserError as error:
        return str(error)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        return f"its class does not run this way ({type(error).__name__}: {reason[:150]})"


def _compare(found: Tensor, expected: list[Tensor], problem: str) -> str | None:
    difference = distance([found], [torch.cat(expected)])
    if difference > TOLERANCE:
        return f"{problem}: the losses differ by {difference:.3f} nats per token"
    return None


def _remedy(reference: Reference, trainer: TrainerConfig) -> str:
    """Settings with which the model is trained correctly."""
    if reference.problem:
        return "use another model"
    names = [name for name in ON_CPU if not (name == "packed" and trainer.compile)]
    for mask, key in ((True, ""), (False, " mixture.intra_document_mask=false")):
        for name in names:
            if _problem(reference, name, mask) is None:
                return f"set trainer.attn_implementation={name}{key}, or use another model"
    return "no setting is correct for it, use another model"


@torch.no_grad()
def _our_losses(model: Any, rows: list[list[Tensor]], document_mask: bool) -> Tensor:
    """The loss of each target of packed rows of documents, in order."""
    _, losses = CausalLMLoss(model, CHUNK)(_batch(rows), 1.0, document_mask)
    return losses


@torch.no_grad()
def _objective(module: CausalLMLoss, document: Tensor) -> float:
    """Our mean loss of a document, with the load-balancing loss."""
    loss, _ = module(_batch([[document]]), 1 / (len(document) - 1), True)
    if module.load_balancing is not None and module.aux_loss is not None:
        loss = loss + module.load_balancing.coefficient * module.aux_loss
    return float(loss)


def _batch(rows: list[list[Tensor]]) -> dict[str, Any]:
    """A batch of ipt.mixture.batches with these documents packed into rows of equal length."""
    device = rows[0][0].device
    sizes = [len(document) for row in rows for document in row]
    ids = torch.stack([torch.cat(row) for row in rows])
    labels, positions = [], []
    for row in rows:
        for document in row:
            labels += [document[1:], document.new_tensor([IGNORE])]
            positions.append(torch.arange(len(document), device=device))
    labels_BT = torch.cat(labels).view_as(ids)
    positions_BT = torch.cat(positions).view_as(ids)
    fields = torch.stack([ids, labels_BT, positions_BT, torch.zeros_like(ids)])
    batch = unpacked(fields, sizes)
    return {**batch, "cu_seq_lens": batch["cu_seq_lens"].to(device)}


@contextmanager
def _evaluating(module: CausalLMLoss) -> Iterator[None]:
    """Evaluation mode without gradients or compilation; restores the training state afterwards."""
    modes = {part: part.training for part in module.modules()}
    evaluation_mode(module)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if isinstance(module, FSDPModule):
            # forward passes without backward passes leave parameters gathered
            module.reset_iter_state()
        for part, mode in modes.items():
            part.training = mode
        module.aux_loss = None


def _name(config: Config, architecture: Any) -> str:
    name = "architecture" if config.architecture else f"model={config.model}"
    return f"{name} (model type {architecture.model_type})"

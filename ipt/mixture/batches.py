"""Packed batches of a plan, the same for any number of ranks and workers."""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ipt.mixture.plan import Plan
from ipt.tokens.store import TokenStore

IGNORE = -100  # label of a position that is not trained on


class PackedSequences(Dataset):
    """Sequence i of a plan as tensors of `seq_len`: input_ids, labels, position_ids and source_ids.

    Labels are already shifted: labels[t] is the token after input t in the same document, or IGNORE where there is none
    or where it is not a target. A document that goes on in a later sequence still has its next token as a label here, so
    each token but a document's first is a target exactly once in an epoch. Positions restart with each piece.
    """

    def __init__(self, plan: Plan, stores: Sequence[TokenStore]) -> None:
        self.plan, self.stores = plan, stores

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        length = self.plan.seq_len
        arrays = {name: np.empty(length, np.int64) for name in ("input_ids", "labels", "position_ids", "source_ids")}
        filled = 0
        for piece in self.plan.sequence(index):
            size = piece.end - piece.start
            place = slice(filled, filled + size)
            arrays["input_ids"][place] = self.stores[piece.source].tokens(piece.document, piece.start, piece.end)
            arrays["labels"][place] = self._labels(piece.source, piece.document, piece.start, piece.end)
            arrays["position_ids"][place] = np.arange(size)
            arrays["source_ids"][place] = piece.source
            filled += size
        assert filled == length
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def target_count(self, index: int) -> int:
        """Number of labels of sequence `index` that are trained on."""
        return sum(int((self._labels(*piece) != IGNORE).sum()) for piece in self.plan.sequence(index))

    def _labels(self, source: int, document: int, start: int, end: int) -> np.ndarray:
        store = self.stores[source]
        labels = np.full(end - start, IGNORE, np.int64)
        following = store.tokens(document, start + 1, end + 1)
        labels[: len(following)] = following
        is_target = store.is_target(document, start + 1, end + 1)
        if is_target is not None:
            labels[: len(following)][~is_target] = IGNORE
        return labels


class PackedLoader:
    """Micro-batches of one rank; resumable, and independent of the number of ranks.

    Step s trains on sequences `s * global_batch` up to `(s + 1) * global_batch`. State is the number of sequences that
    all ranks together have taken. It has a length on purpose: of a loader without one, Lightning takes a batch ahead of
    the step that it saves. Each batch carries `step_targets`, the number of target tokens of its whole optimizer step.
    """

    def __init__(self, data: PackedSequences, micro_batch: int, accumulate: int, rank: int = 0, world: int = 1, workers: int = 0) -> None:
        self.data, self.micro_batch, self.accumulate = data, micro_batch, accumulate
        self.rank, self.world, self.workers = rank, world, workers
        self.global_batch = micro_batch * accumulate * world
        if len(data) % self.global_batch:
            raise ValueError(f"the plan has {len(data)} sequences, not a multiple of the global batch of {self.global_batch}")
        self._taken = 0

    def __len__(self) -> int:
        return len(self.data) // (self.micro_batch * self.world)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first = self._taken // (self.micro_batch * self.world)
        batches = [self._indices(number) for number in range(first, len(self))]
        loader = DataLoader(self.data, batch_sampler=batches, num_workers=self.workers, pin_memory=torch.cuda.is_available())
        for number, batch in enumerate(loader, start=first):
            if number % self.accumulate == 0 or number == first:
                targets = self._step_targets(number // self.accumulate)
            self._taken += self.micro_batch * self.world
            yield {**batch, "step_targets": targets}
        self._taken = 0

    def state_dict(self) -> dict[str, int]:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._taken = state["taken"]

    def _indices(self, number: int) -> list[int]:
        start = (number * self.world + self.rank) * self.micro_batch
        return list(range(start, start + self.micro_batch))

    def _step_targets(self, step: int) -> int:
        return sum(self.data.target_count(index) for index in range(step * self.global_batch, (step + 1) * self.global_batch))


class PackedDataModule(L.LightningDataModule):
    """The loader as Lightning wants it; rank and world size are known once the trainer is attached."""

    def __init__(self, data: PackedSequences, micro_batch: int, accumulate: int, workers: int = 0) -> None:
        super().__init__()
        self.data, self.micro_batch, self.accumulate, self.workers = data, micro_batch, accumulate, workers

    def train_dataloader(self) -> PackedLoader:
        assert self.trainer is not None
        return PackedLoader(self.data, self.micro_batch, self.accumulate, self.trainer.global_rank, self.trainer.world_size, self.workers)

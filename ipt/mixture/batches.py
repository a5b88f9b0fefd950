"""Packed batches of a plan, identical for any number of ranks and workers."""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ipt.errors import UserError
from ipt.mixture.order import Recent
from ipt.mixture.plan import Piece, Plan
from ipt.tokens.store import TokenStore

IGNORE = -100  # label of a position that is not trained on
PADDING = -1  # source of a position that is padding; its token is 0
FIELDS = ("input_ids", "labels", "position_ids", "source_ids")


class PackedSequences:
    """The sequences of a plan, filled from the stores of its sources.

    `vocabulary` is the number of the model's embeddings. A batch with a larger token id raises
    UserError.
    """

    def __init__(
        self, plan: Plan, stores: Sequence[TokenStore], vocabulary: int | None = None
    ) -> None:
        self.plan, self.stores, self.vocabulary = plan, stores, vocabulary
        self._has_mask = [any(index.has_loss_mask for index in store.indices) for store in stores]
        self._positions = np.arange(plan.seq_len)

    def __len__(self) -> int:
        return len(self.plan)

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Sequences as one micro-batch.

        int64 [B, T]: `input_ids`, `labels`, `position_ids`, `source_ids`. Labels are shifted:
        labels[b, t] is the token after input t in the same document, or IGNORE if there is none or
        if it is not a target. The last token of a piece has the document's next token as its label,
        even if that is in another sequence. So each token except a document's first is a target
        exactly once per epoch. Positions restart with each piece. Padding is a document of its own
        with source -1 and is not trained on.

        For attention without a mask, over the flattened batch: `cu_seq_lens` int32 [pieces + 1],
        the start of each piece and the end of the last; `document_sizes`, their lengths as a list
        on the host; `max_length`, the largest length.
        """
        return unpacked(*self.fields(indices))

    def fields(self, indices: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """The four tensors of `batch` stacked to [4, B, T], and the piece lengths. This form is
        cheap to pass between processes.
        """
        fields = np.empty((len(FIELDS), len(indices), self.plan.seq_len), np.int64)
        sizes = [
            size for row, index in enumerate(indices) for size in self._fill(index, *fields[:, row])
        ]
        if self.vocabulary is not None and fields[:2].max() >= self.vocabulary:
            raise UserError(
                f"a token store holds the token {fields[:2].max()}, and the model has "
                f"{self.vocabulary}"
                " embeddings: tokenise its texts with the model's tokenizer"
            )
        return torch.from_numpy(fields), sizes

    def target_count(self, index: int) -> int:
        """Number of labels of sequence `index` that are trained on. Reads no tokens, and loss masks
        only of sources that have them.
        """
        return sum(self._targets(piece) for piece in self.plan.sequence(index))

    def _fill(
        self,
        index: int,
        ids: np.ndarray,
        labels: np.ndarray,
        positions: np.ndarray,
        sources: np.ndarray,
    ) -> Iterator[int]:
        """Write a sequence into its rows [T]. Returns the lengths of its pieces."""
        filled = 0
        for piece in self.plan.sequence(index):
            size = piece.end - piece.start
            store, place = self.stores[piece.source], slice(filled, filled + size)
            # one more than inputs, if the document has it
            tokens = store.tokens(piece.document, piece.start, piece.end + 1)
            ids[place] = tokens[:size]
            labels[filled : filled + len(tokens) - 1] = tokens[1:]
            labels[filled + len(tokens) - 1 : filled + size] = IGNORE
            is_target = self._is_target(piece)
            if is_target is not None:
                labels[filled : filled + len(is_target)][~is_target] = IGNORE
            positions[place] = self._positions[:size]
            sources[place] = piece.source
            filled += size
            yield size
        if filled < len(ids):
            ids[filled:], labels[filled:], sources[filled:] = 0, IGNORE, PADDING
            positions[filled:] = self._positions[: len(ids) - filled]
            yield len(ids) - filled

    def _targets(self, piece: Piece) -> int:
        is_target = self._is_target(piece)
        return (
            min(piece.end + 1, piece.length) - piece.start - 1
            if is_target is None
            else int(is_target.sum())
        )

    def _is_target(self, piece: Piece) -> np.ndarray | None:
        """Whether each label of a piece is trained on; None when all are."""
        if not self._has_mask[piece.source]:
            return None
        return self.stores[piece.source].is_target(piece.document, piece.start + 1, piece.end + 1)


class MicroBatches(Dataset):
    """Micro-batch `number` of one rank: `PackedSequences.fields` of its sequences, and the number
    of targets of its optimizer step.

    Step s trains on sequences `s * global_batch` to `(s + 1) * global_batch`. The number of targets
    covers all of them, whatever the rank and the micro-batch.
    """

    def __init__(
        self, data: PackedSequences, micro_batch: int, accumulate: int, rank: int, world: int
    ) -> None:
        self.data = data
        self.micro_batch = micro_batch
        self.accumulate = accumulate
        self.rank = rank
        self.world = world
        self.global_batch = micro_batch * accumulate * world
        self._recent = Recent(1)

    def __len__(self) -> int:
        return len(self.data) // (self.micro_batch * self.world)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, list[int], int]:
        start = (number * self.world + self.rank) * self.micro_batch
        step = number // self.accumulate
        targets = self._recent.get(step, lambda: self._step_targets(step))
        return *self.data.fields(range(start, start + self.micro_batch)), targets

    def _step_targets(self, step: int) -> int:
        return sum(
            self.data.target_count(index)
            for index in range(step * self.global_batch, (step + 1) * self.global_batch)
        )


class PackedLoader:
    """Micro-batches of one rank; resumable, and independent of the number of ranks.

    Each batch is that of `PackedSequences.batch` plus `step_targets`, the number of target tokens
    of its optimizer step over all ranks.

    The state is one integer: the number of sequences that all ranks together have consumed. The
    loader defines a length because Lightning prefetches a batch from a loader without one, so the
    saved state would be one batch ahead. `workers` processes prefetch batches, in pinned memory if
    there is a GPU, and live until the end of the run. With 0 workers a batch is filled on demand.
    """

    def __init__(
        self,
        data: PackedSequences,
        micro_batch: int,
        accumulate: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        self.batches = MicroBatches(data, micro_batch, accumulate, rank, world)
        self.workers = workers
        if len(data) % self.batches.global_batch:
            raise ValueError(
                f"the plan has {len(data)} sequences, not a multiple of the global batch of "
                f"{self.batches.global_batch}"
            )
        self._at_once = micro_batch * world
        self._taken = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=range(self._taken // self._at_once, len(self)),  # numbers, never a list of them
            collate_fn=_as_it_is,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if self.workers else None,
        )
        for fields, sizes, targets in loader:
            self._taken += self._at_once
            yield {**unpacked(fields, sizes), "step_targets": targets}
        self._taken = 0

    def state_dict(self) -> dict[str, int]:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._taken = state["taken"]


def unpacked(fields: torch.Tensor, sizes: list[int]) -> dict[str, Any]:
    """The batch of `PackedSequences.batch` from its four tensors stacked to [4, B, T] and the
    document lengths.
    """
    bounds = torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32))
    return {
        **dict(zip(FIELDS, fields, strict=True)),
        "cu_seq_lens": bounds,
        "document_sizes": sizes,
        "max_length": max(sizes),
    }


def _as_it_is(batch: Any) -> Any:
    return batch


class PackedDataModule(L.LightningDataModule):
    """LightningDataModule of the loader. Rank and world size come from the attached trainer."""

    def __init__(
        self, data: PackedSequences, micro_batch: int, accumulate: int, workers: int = 0
    ) -> None:
        super().__init__()
        self.data = data
        self.micro_batch = micro_batch
        self.accumulate = accumulate
        self.workers = workers

    def train_dataloader(self) -> PackedLoader:
        assert self.trainer is not None
        return PackedLoader(
            self.data,
            self.micro_batch,
            self.accumulate,
            self.trainer.global_rank,
            self.trainer.world_size,
            self.workers,
        )
